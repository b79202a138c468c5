"""Files to hold out: `held_out_from`."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_gpt.data import open_shards, prepare, tokenizer_beside
from sparse_gpt.data.shards.manifest import SPLITS, Manifest
from sparse_gpt.data.shards.reader import Split
from sparse_gpt.errors import DataError


def json_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(split: Split, manifest: Manifest) -> list[str]:
    decode = tokenizer_beside(split.folder, manifest.tokenizer).decode
    return [decode(split.document(number).tolist()) for number in range(split.n_documents)]


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[list[str], list[str]]:
    """The texts of `train` and of `test`: two files each; one text is in both."""
    sides = [[f"{name} {n}" for n in range(60)] for name in ("to train on", "to hold out")]
    sides[1][7] = sides[0][3]
    for folder, side in zip(("train", "test"), sides, strict=True):
        for part in range(2):
            json_lines(tmp_path / folder / f"{part}.jsonl", side[part::2])
    return sides[0], sides[1]


def ordered(side: list[str]) -> list[str]:
    return side[::2] + side[1::2]


@pytest.mark.parametrize("options", [{}, {"workers": 2, "shard_tokens": 40}, {"part": "1/1"}])
def test_each_file_is_on_its_side(
    tmp_path: Path, corpus: tuple[list[str], list[str]], options: dict[str, Any]
) -> None:
    train, test = corpus
    made = prepare(
        [tmp_path / "train"], tmp_path / "out", held_out_from=[tmp_path / "test"], **options
    )
    assert made is not None
    dataset = open_shards(tmp_path / "out")
    assert texts(dataset.train, made) == ordered(train)
    assert texts(dataset.held_out, made) == ordered(test)
    assert [row.get("split", "train") for row in made.sources] == ["train"] * 2 + ["held_out"] * 2
    again = prepare(
        [tmp_path / "train"], tmp_path / "out", held_out_from=[tmp_path / "test/*"], **options
    )
    assert again == made


def test_parts_share_both_sides_and_dedup_leaves_held_out_what_is_trained_on(
    tmp_path: Path, corpus: tuple[list[str], list[str]]
) -> None:
    train, test = corpus
    sources, held_out = [tmp_path / "train"], [tmp_path / "test"]
    whole = prepare(sources, tmp_path / "whole", held_out_from=held_out, shard_tokens=40)
    for part in ("2/2", "1/2"):
        parts = prepare(
            sources, tmp_path / "parts", held_out_from=held_out, shard_tokens=40, part=part
        )
    assert parts == whole
    made = prepare(sources, tmp_path / "dedup", held_out_from=held_out, dedup=True)
    assert made is not None
    dataset = open_shards(tmp_path / "dedup")
    assert texts(dataset.train, made) == ordered(train)
    assert texts(dataset.held_out, made) == [text for text in ordered(test) if text not in train]


def test_both_sides_grow_and_no_file_changes_sides(
    tmp_path: Path, corpus: tuple[list[str], list[str]]
) -> None:
    sources, held_out = [tmp_path / "train"], [tmp_path / "test"]
    old = prepare(sources, tmp_path / "out", held_out_from=held_out)
    json_lines(tmp_path / "train/more.jsonl", ["more to train on"])
    json_lines(tmp_path / "test/more.jsonl", ["more to hold out"])
    new = prepare(sources, tmp_path / "out", held_out_from=held_out, append=True)
    assert old is not None
    assert new is not None
    for split in SPLITS:
        assert new.splits[split][: len(old.splits[split])] == old.splits[split]
        assert new.documents(split) == old.documents(split) + 1
    says = "more.jsonl: is to be held out, but its content is also that of more.jsonl, which is"
    held_out = [tmp_path / "train/more.jsonl"]
    with pytest.raises(DataError, match=says):
        prepare([tmp_path / "train/0.jsonl"], tmp_path / "out", held_out_from=held_out, append=True)


@pytest.mark.parametrize(
    ("test", "options", "says"),
    [
        ("train/0.jsonl", {}, r"train/0\.jsonl: is to be held out, and among the sources too"),
        (
            "copy.jsonl",
            {},
            r"copy\.jsonl: is to be held out, but its content is also that of 0",
        ),
        ("test", {"held_out": 0.1}, "held_out 0.1 and held_out_from: give one of them"),
        ("empty.jsonl", {}, "the files to hold out hold no text"),
        ("nothing.jsonl", {}, "the files to hold out hold no text"),
        ("nowhere", {}, "nowhere: no such file or folder"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, corpus: tuple[list[str], list[str]], test: str, options: dict, says: str
) -> None:
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "train/0.jsonl").read_bytes())
    json_lines(tmp_path / "empty.jsonl", [" "])
    json_lines(tmp_path / "nothing.jsonl", [])
    with pytest.raises(DataError, match=says) as error:
        prepare([tmp_path / "train"], tmp_path / "out", held_out_from=[tmp_path / test], **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_to_train_on_without_text_are_told(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", ["", " "])
    json_lines(tmp_path / "test.jsonl", ["text"])
    with pytest.raises(DataError, match="the files to train on hold no text"):
        prepare(
            [tmp_path / "train.jsonl"], tmp_path / "out", held_out_from=[tmp_path / "test.jsonl"]
        )
