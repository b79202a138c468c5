"""What long work says: a bar on a terminal, a line now and then elsewhere."""

import io

import pytest
from rich.console import Console

from sparse_gpt import progress
from sparse_gpt.progress import Progress


@pytest.fixture
def terminal(monkeypatch):
    """What stands on stderr, a terminal."""
    screen = io.StringIO()
    console = Console(file=screen, width=60, force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda stderr: console)
    return screen


@pytest.mark.parametrize(("passed", "drawn"), [(1.9, False), (2.1, True)])
def test_a_bar_waits(terminal, monkeypatch, passed, drawn):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("refits", 1, wanted=True, of_bytes=False, after=2) as bar:
        assert terminal.getvalue() == ""
        now[0] = passed
        bar.at(0.5)
        assert ("refits" in terminal.getvalue()) is drawn
    assert ("50%" in terminal.getvalue()) is drawn


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with Progress("tokenizing", 4e6, wanted=True) as bar:
        bar.advance(1_000_000, tokens=10)
    said = capsys.readouterr().err
    assert said.startswith("tokenizing: 25% of 4 MB, ")
    assert "tokens/s" in said
    assert said.endswith("left\n")


def test_what_is_short_or_not_wanted_says_nothing(monkeypatch, capsys):
    with Progress("tokenizing", 4e6, wanted=True) as bar:
        bar.advance(1_000_000)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with Progress("tokenizing", 4e6, wanted=False) as bar:
        bar.advance(1_000_000)
    assert capsys.readouterr().err == ""
