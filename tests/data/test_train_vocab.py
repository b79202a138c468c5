import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, load_tokenizer, open_shards, prepare, train_vocab
from data.shards import content_hash
from data.units import held_out_below

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
READING = {"separator": "\nChapter ", "held_out": 0.1}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocab") / "novels-600.tiktoken"
    train_vocab([SAMPLES], out, size=600, **READING)
    return out


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(ranks: Path, text: str) -> None:
    tokenizer = load_tokenizer(ranks)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot == 599
    assert not len(ids) or ids.max() < 599


def test_it_learned_the_text_it_was_given(ranks: Path) -> None:
    text = (SAMPLES / "persuasion.txt").read_text()[:50_000]
    tokenizer = load_tokenizer(ranks)
    assert len(tokenizer.encode(" the")) == len(tokenizer.encode(" Anne")) == 1
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_the_same_text_gives_the_same_file(ranks: Path, tmp_path: Path) -> None:
    again = tmp_path / ranks.name
    train_vocab([SAMPLES], again, size=600, **READING)
    assert again.read_bytes() == ranks.read_bytes()


def test_held_out_documents_are_not_learned_from(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"{a}{b}{c}" * 3 for a in letters for b in letters for c in "aeiou"]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": word * 20}) + "\n" for word in words))
    train_vocab([corpus], tmp_path / "v.tiktoken", size=6000, held_out=0.5)
    tokenizer = load_tokenizer(tmp_path / "v.tiktoken")
    lengths: dict[str, list[int]] = {"train": [], "held_out": []}
    for word in words:
        split = "held_out" if content_hash(word * 20) < held_out_below(0.5) else "train"
        lengths[split].append(len(tokenizer.encode(word * 20)))
    assert np.mean(lengths["held_out"]) > 2 * np.mean(lengths["train"])


def test_prepare_uses_it(ranks: Path, tmp_path: Path) -> None:
    prepare([SAMPLES], tmp_path / "shards", vocab=ranks, workers=2, **READING)
    dataset = open_shards(tmp_path / "shards")
    assert dataset.manifest.tokenizer["vocab_size"] == 600
    assert dataset.manifest.tokenizer["name"] == "novels-600"
    first = np.empty((1, 400), np.uint16)
    dataset.train.read(np.array([0]), first)
    first = first[0]
    assert first[0] == dataset.manifest.eot["id"] == 599
    assert load_tokenizer(ranks).decode(first[1:20]) in (SAMPLES / "persuasion.txt").read_text()


def test_bad_requests_end_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "v.tiktoken"
    with pytest.raises(DataError, match="size is 257"):
        train_vocab([SAMPLES], out, size=257)
    with pytest.raises(DataError, match=r"yields \d+ ids, not 500000; lower the size"):
        train_vocab([SAMPLES], out, size=500_000)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        train_vocab([SAMPLES], tmp_path / "nowhere" / "v.tiktoken")
    with pytest.raises(DataError, match="held_out is 2"):
        train_vocab([SAMPLES], out, held_out=2)
    assert not list(tmp_path.iterdir())
