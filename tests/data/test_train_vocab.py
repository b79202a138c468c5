import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data import load_tokenizer, open_shards, prepare, train_vocab
from sparse_gpt.data.content_hash import content_hash
from sparse_gpt.data.preparation.options import held_out_below
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.data.train_vocab import learn
from sparse_gpt.data.vocabulary import PATTERNS
from sparse_gpt.errors import DataError

SAMPLES = Path(__file__).parents[2] / "data" / "novels"
train_vocab_module = sys.modules[
    "sparse_gpt.data.train_vocab"
]  # `data.train_vocab` is the function
READING = {"separator": "\nChapter ", "held_out": 0.1}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocab") / "novels-600.tiktoken"
    train_vocab([SAMPLES], out, size=600, **READING)
    return out


@settings(max_examples=100)
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


# What the patterns tell apart: digits, cases, contractions, marks, and every kind of space.
PIECES = [
    *("'s", "'LL", "'ſ", "don't", "Ⅷ", "1234567", "٣", "²", "ǅ", "ß", "İ", "한", "日本", "e\u0301"),
    *("\u0301", " ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u0085", "\u2028", "\u3000"),
    *("\x1c", "\u200b", "\ufeff", "/", "!?", "_", "😀", "𝒜", "the", "Anne", "\x00"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module", params=PATTERNS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Tokenizer]:
    """What `tokenizers` learned with a pattern from a novel and from random pieces, and our
    tokenizer of the rank file learned from the same."""
    random = np.random.default_rng(0)
    mixed = "".join(random.choice(PIECES, 50_000))
    novel = (SAMPLES / "persuasion.txt").read_text()
    folder = tmp_path_factory.mktemp("both")
    corpus, ranks = folder / "corpus.jsonl", folder / "ranks.tiktoken"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in (mixed, novel)))
    train_vocab([corpus], ranks, size=1500, held_out=0, pattern=request.param)
    return learn([mixed, novel], 1500, request.param), load_tokenizer(ranks, request.param)


@settings(max_examples=400)
@given(text=TEXTS.map("".join))
def test_ids_are_those_of_the_tokenizer_that_learned(
    both: tuple[Any, Tokenizer], text: str
) -> None:
    theirs, ours = both
    assert ours.encode(text).tolist() == theirs.encode(text).ids


def test_what_was_learned_follows_the_pattern(both: tuple[Any, Tokenizer]) -> None:
    _, ours = both
    tokens = [ours.decode([i]) for i in range(ours.vocab_size)]
    digits = max(len(token) for token in tokens if token.isdigit())
    assert digits == 3 if ours.pattern != "r50k" else digits >= 7
    assert ("don't" in tokens) == (ours.pattern == "o200k")


@pytest.mark.slow
def test_a_long_document_is_learned_from_as_a_whole(tmp_path: Path) -> None:
    """In parts, for the memory, which change nothing."""
    for pattern in PATTERNS:
        files = [tmp_path / f"{pattern}-{part}" for part in (50, 1 << 30)]
        for file, part in zip(files, (50, 1 << 30), strict=True):
            with mock.patch.object(train_vocab_module, "_PART", part):
                train_vocab([SAMPLES], file, size=600, held_out=0, pattern=pattern)
        assert files[0].read_bytes() == files[1].read_bytes()


@settings(max_examples=200)
@given(text=TEXTS.map("".join), part=st.integers(1, 5))
def test_parts_are_cut_where_pieces_are(both: tuple[Any, Tokenizer], text: str, part: int) -> None:
    theirs, _ = both
    with mock.patch.object(train_vocab_module, "_PART", part):
        parts = list(train_vocab_module._parts(text))
    assert "".join(parts) == text
    whole = theirs.pre_tokenizer.pre_tokenize_str(text)
    pieces = [piece for part in parts for piece, _ in theirs.pre_tokenizer.pre_tokenize_str(part)]
    assert pieces == [piece for piece, _ in whole]


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


def test_of_one_text_the_part_held_out_is_not_learned_from(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zzzz yyyy\n" * 90 + "qqqq wwww\n" * 10)
    train_vocab([tmp_path / "a.txt"], tmp_path / "v", size=262, held_out=0.1)
    tokenizer = load_tokenizer(tmp_path / "v")
    assert [len(tokenizer.encode(text)) for text in ("zzzz", "qqqq")] == [1, 4]


def test_documents_that_prepare_leaves_out_are_not_learned_from(tmp_path: Path) -> None:
    rows = [
        *({"text": f"zzzz {n} wanted", "lang": "en"} for n in range(100)),
        *({"text": f"qqqq {n} unwanted", "lang": "de"} for n in range(100)),
        *({"text": "xxxx", "lang": "en"} for _ in range(100)),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"where": {"lang": "en"}, "min_chars": 5, "held_out": 0}
    train_vocab([tmp_path / "a.jsonl"], tmp_path / "v", size=270, **options)
    tokenizer = load_tokenizer(tmp_path / "v")
    assert [len(tokenizer.encode(text)) for text in ("zzzz", "qqqq", "xxxx")] == [1, 4, 4]
    (tmp_path / "a.txt").write_text("text")
    says = r"a\.txt: where chooses among rows, but this file is plain text"
    with pytest.raises(DataError, match=says):
        train_vocab([tmp_path / "a.txt"], tmp_path / "w", **options)


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
    with pytest.raises(DataError, match="pattern is 'p50k'; there are r50k, cl100k, o200k"):
        train_vocab([SAMPLES], out, pattern="p50k")
    with pytest.raises(DataError, match="held_out is 2"):
        train_vocab([SAMPLES], out, held_out=2)
    assert not list(tmp_path.iterdir())
