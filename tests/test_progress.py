"""What long work says where there is no terminal."""

from sparse_gpt import progress


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress("tokenizing", 4e6, wanted=True) as bar:
        bar.advance(1_000_000, tokens=10)
    said = capsys.readouterr().err
    assert said.startswith("tokenizing: 25% of 4 MB, ")
    assert "tokens/s" in said
    assert said.endswith("left\n")


def test_what_is_short_or_not_wanted_says_nothing(monkeypatch, capsys):
    with progress.Progress("tokenizing", 4e6, wanted=True) as bar:
        bar.advance(1_000_000)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress("tokenizing", 4e6, wanted=False) as bar:
        bar.advance(1_000_000)
    assert capsys.readouterr().err == ""
