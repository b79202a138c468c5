"""The bar of long work: on a terminal, and where it is asked for after a while, not before."""

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
