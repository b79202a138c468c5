"""`shards stats`: what is counted over the maps is what a look at each document gives."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import quantiles

import numpy as np
import pytest

from sparse_gpt.cli.main import main
from sparse_gpt.cli.shards_commands import show_stats
from sparse_gpt.data import load_tokenizer, open_shards, prepare, tokenizer_beside
from sparse_gpt.data.shards.manifest import SPLITS
from sparse_gpt.data.shards.stats import PERCENTILES, SplitStats, plot_lengths, statistics
from sparse_gpt.data.vocabulary import VOCAB_HASH
from sparse_gpt.errors import DataError


def test_numbers_are_those_of_the_documents(novels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sparse_gpt.data.shards.stats"], "_PIECE", 7_001)
    dataset = open_shards(novels)
    tokenizer = tokenizer_beside(novels, dataset.manifest.tokenizer)
    found, sources, on_both_sides = statistics(novels)
    assert (sources, on_both_sides) == (dataset.manifest.sources, 0)
    for split, stats in zip((dataset.train, dataset.held_out), found, strict=True):
        documents = [split.document(number).tolist() for number in range(split.n_documents)]
        assert stats.lengths.tolist() == list(map(len, documents))
        assert stats.tokens == split.n_tokens == sum(map(len, documents)) + len(documents)
        assert stats.bytes == sum(len(tokenizer.decode_bytes(ids)) for ids in documents)
        assert stats.ids == len(set().union(*documents)) + 1  # end of text
        fields = stats.fields()
        assert fields["documents"] == len(documents)
        assert fields["bytes_per_token"] == stats.bytes / sum(map(len, documents))
        length = fields["length"]
        assert (length["min"], length["max"]) == (min(stats.lengths), max(stats.lengths))
        assert length["mean"] == pytest.approx(np.mean(stats.lengths))
        hundredths = quantiles(stats.lengths.tolist(), n=100, method="inclusive")
        for share in PERCENTILES:
            assert length[f"p{share}"] == pytest.approx(hundredths[share - 1])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_of_any_shape(tmp_path: Path, make_shards: Callable[..., Path], dtype: str) -> None:
    """Shards of one document and of several, and no held-out split."""
    shards = [[[4, 4], [5]], [[7, 8, 9]], [[1], [2]]]
    made = [[np.array([50256, *ids], dtype) for ids in shard] for shard in shards]
    folder = make_shards(tmp_path / "a", made, dtype=dtype, vocab_hash="ab" * 32)
    split = open_shards(folder).train
    assert split.lengths().tolist() == [2, 1, 3, 1, 1]
    pieces = [piece.tolist() for piece in split.pieces(2)]
    assert max(map(len, pieces)) == 2
    expected = [50256, 4, 4, 50256, 5, 50256, 7, 8, 9, 50256, 1, 50256, 2]
    assert list(chain(*pieces)) == expected
    assert open_shards(folder).held_out.lengths().tolist() == []


def test_the_command_and_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: no display, and matplotlib's import only where it is wanted."""
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").write_text("one two three é\n" * (number + 1))
    prepare([tmp_path], tmp_path.parent / "out", held_out=0)
    command = [sys.executable, "-m", "sparse_gpt", "shards", "stats", str(tmp_path.parent / "out")]
    plot = tmp_path / "lengths.png"
    done = subprocess.run([*command, "--plot", str(plot)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert plot.read_bytes().startswith(b"\x89PNG")
    per_line = len(load_tokenizer().encode("one two three é\n"))
    assert f"│ length, max    │  {12 * per_line:>4} │" in done.stdout
    assert "12 source(s), the largest first:" in done.stdout
    assert "and 2 more, of 51 bytes; --json names them" in done.stdout
    show_stats(command[-1], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["train"]["documents"] == len(found["sources"]) == 12
    assert found["train"]["bytes"] == 17 * 78
    assert found["train"]["length"]["p50"] == 6.5 * per_line
    assert found["held_out"] == {
        "documents": 0, "tokens": 0, "bytes": 0, "bytes_per_token": None, "ids": 0, "length": {},
    }  # fmt: skip


def test_what_is_held_out_and_trained_on_is_told_and_names_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = tmp_path / "of [red] ones.jsonl", tmp_path / "y [b].jsonl"
    train.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(9)))
    held_out.write_text('{"text": "text 3"}\n{"text": "new"}\n{"text": "text  3"}\n')
    out = tmp_path / "shards [/x]"
    prepare([train], out, held_out_from=[held_out], shard_tokens=8)
    monkeypatch.setattr(sys, "argv", ["sparse-gpt", "shards", "stats", str(out)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out
    assert not stopped.value.code
    assert "held-out documents whose text is trained on too: 2; prepare with --dedup" in said
    for name in (train.name, held_out.name, out.name):
        assert name in said


def test_what_cannot_be_counted_or_drawn_is_one_line(
    tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    ids = np.array([50256, 1, 60_000], np.uint16)
    folder = make_shards(tmp_path / "a", [[ids]], vocab_hash=VOCAB_HASH)
    manifest = open_shards(folder).manifest
    assert manifest.tokenizer["vocab_size"] == 50257
    with pytest.raises(DataError, match="train holds the id 60000, of 50,257 in the vocabulary"):
        statistics(folder)
    splits = [SplitStats(name, 0, 0, 0, np.ones(1, np.uint32)) for name in SPLITS]
    with pytest.raises(DataError, match=r"a\.txt: a plot is a \.png, \.svg or \.pdf file"):
        plot_lengths(splits, tmp_path / "a.txt")
    with pytest.raises(DataError, match="nowhere"):
        plot_lengths(splits, tmp_path / "nowhere" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
