import hashlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ROOT
from tiktoken_ext import openai_public

from sparse_gpt.data import load_tokenizer, open_shards, prepare, tokenizer_beside, train_vocab
from sparse_gpt.data.shards.manifest import SPLITS
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.data.vocabulary import PATTERNS, VOCABULARY
from sparse_gpt.errors import DataError


def test_known_ids_and_attributes() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("Hello world")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.vocab_hash == hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert PATTERNS["r50k"] == openai_public.r50k_pat_str


@settings(max_examples=200)
@given(st.lists(st.integers(0, 50256) | st.integers(128, 255)))
def test_any_ids_are_decoded_as_by_tiktoken(ids: list[int]) -> None:
    """Most are no whole UTF-8; and in pieces that end within characters."""
    tokenizer = load_tokenizer()
    expected = tokenizer._encoding.decode(ids)
    assert tokenizer.decode(np.array(ids, np.uint16)) == expected
    with mock.patch("sparse_gpt.data.tokenizer._JOINED", 3):
        assert tokenizer.decode(ids) == expected


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_literal_end_of_text_stays_text() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eot, *tokenizer.encode("b")]) == "<|endoftext|>b"


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="50256"):
        load_tokenizer().decode([15496, 50257])


def test_altered_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(VOCABULARY.read_bytes().replace(b"IQ== 0", b"IQ== 1", 1))
    monkeypatch.setattr("sparse_gpt.data.tokenizer.VOCABULARY", altered)
    load_tokenizer.cache_clear()
    with pytest.raises(DataError, match=r"gpt2\.tiktoken: not GPT-2's vocabulary"):
        load_tokenizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"IQ== 0", b"IQ== 1"), "its ranks are not 0, 1, 2"),
        ((b"IQ== 0\n", b"IQ== zero\n"), r"ranks\.tiktoken:1: is not a base64 token and its rank"),
        ((b"IQ== 0\n", b"I?== 0\n"), r"ranks\.tiktoken:1: is not a base64 token"),
        ((b"IQ== 0\n", b"IQ== +0\n"), r"ranks\.tiktoken:1: is not a base64 token"),
        ((b"Ig== 1\nIw== 2\n", b"Iw== 2\nIg== 1\n"), "its ranks are not 0, 1, 2, …, in this order"),
        ((b"IQ== 0\n", b"IXp6IXp6IXp6 0\n"), "1 bytes have no rank, the first 0x21"),
    ],
)
def test_a_file_that_is_no_rank_file_is_refused(
    tmp_path: Path, change: tuple[bytes, bytes], message: str
) -> None:
    ranks = tmp_path / "ranks.tiktoken"
    ranks.write_bytes(VOCABULARY.read_bytes().replace(*change, 1))
    with pytest.raises(DataError, match=message):
        load_tokenizer(ranks)
    with pytest.raises(DataError, match="cannot read the vocabulary"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("name", ["cl100k", "o200k"])
def test_patterns_are_tiktokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # a download
    assert PATTERNS[name] == getattr(openai_public, f"{name}_base")()["pat_str"]


def test_patterns_and_engines_that_are_not_there() -> None:
    with pytest.raises(DataError, match="pattern is 'p50k'; there are r50k, cl100k, o200k"):
        load_tokenizer(pattern="p50k")
    with pytest.raises(DataError, match="engine is 'bpe'; there are auto, tiktoken, gigatoken"):
        load_tokenizer(engine="bpe")


@pytest.fixture(scope="module", params=PATTERNS)
def fast(request: pytest.FixtureRequest) -> Tokenizer:
    pytest.importorskip("gigatoken", reason="the extra fast is not installed")
    tokenizer = load_tokenizer(pattern=request.param, engine="gigatoken")
    assert tokenizer.engine.startswith("gigatoken ")
    assert tokenizer.identity() == load_tokenizer(pattern=request.param).identity()
    return tokenizer


HARD = st.one_of(
    st.text(max_size=40),
    st.characters(categories=["Cs"]),  # halves of surrogate pairs
    st.text(st.characters(min_codepoint=0x10000), max_size=5),
    st.text(st.characters(max_codepoint=0xFFFF, categories=["Cc", "Cf", "Zs", "Zl", "Mn"])),
    st.builds(str.__mul__, st.characters(), st.sampled_from([499, 500, 501, 5_000])),
    st.sampled_from([" ", "\n", "\r\n", "  ", "<|endoftext|>", "'ll", "don't", "I'VE", "123456"]),
)


@settings(max_examples=300)
@given(text=st.lists(HARD, max_size=6).map("".join))
def test_the_fast_engine_gives_tiktokens_ids(fast: Tokenizer, text: str) -> None:
    try:
        expected = fast.reference(text)
    except DataError:  # half a surrogate pair
        with pytest.raises(DataError):
            fast.encode(text)
        return
    ids = fast.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == expected.tolist()
    assert fast.eot not in ids


def test_every_character_that_goes_to_the_fast_engine(fast: Tokenizer) -> None:
    """Alone, in a word, in a number and among spaces: all 63,488 of the basic plane."""
    for block in range(0, 0x10000, 64):
        characters = [chr(c) for c in range(block, block + 64) if not 0xD800 <= c < 0xE000]
        text = "".join(f"{c} a{c}b {c}{c}1{c}  {c}\n{c}" for c in characters)
        assert np.array_equal(fast.encode(text), fast.reference(text)), hex(block)


@pytest.mark.parametrize("run", [" ", "\n", "\u2003"])
def test_what_tiktoken_refuses_no_engine_takes(fast: Tokenizer, run: str) -> None:
    text = "a" + run * 1_100_000 + "b"
    if fast.pattern == "r50k":
        with pytest.raises(DataError, match="Max stack size"):
            fast.reference(text)
    try:
        expected = fast.reference(text)
    except DataError:
        with pytest.raises(DataError, match="Max stack size"):
            fast.encode(text)
    else:
        assert np.array_equal(fast.encode(text), expected)


def test_engines_make_the_same_shards_and_a_wrong_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken", reason="the extra fast is not installed")
    import awkward

    source = tmp_path / "a.jsonl"
    source.write_text("".join(f'{{"text": "document {n} \\ud83d\\ude00"}}\n' for n in range(3_000)))
    made = {e: prepare([source], tmp_path / e, engine=e) for e in ("tiktoken", "gigatoken", "auto")}
    for split in SPLITS:
        assert made["tiktoken"].splits[split] == made["gigatoken"].splits[split]
    assert made["auto"] == made["gigatoken"]
    for engine in ("tiktoken", "gigatoken"):
        (found,) = made[engine].tokenizer["engines"]
        assert found.startswith(f"{engine} ")

    class Wrong:
        def encode_batch(self, texts: list[str], parallel: bool) -> awkward.Array:
            return awkward.Array([[1, 2]] * len(texts))

    source.write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(3_000)))
    monkeypatch.setattr(load_tokenizer(None, "r50k", "gigatoken"), "_fast", Wrong())
    with pytest.raises(
        DataError, match=r"a\.jsonl:\d+: gigatoken .* gives other ids than tiktoken"
    ):
        prepare([source], tmp_path / "wrong", engine="gigatoken")
    assert not (tmp_path / "wrong").exists()


def test_shards_bring_their_vocabulary_with_them(tmp_path: Path) -> None:
    novel = ROOT / "data/novels/persuasion.txt"
    split = {"separator": "\nChapter ", "held_out": 0.2}
    train_vocab([str(novel)], tmp_path / "bpe", size=300, **split, progress=False)
    prepare([novel], tmp_path / "own", vocab=tmp_path / "bpe", **split)
    prepare([novel], tmp_path / "gpt2", **split)
    manifest = open_shards(tmp_path / "own").manifest
    (tmp_path / "bpe").rename(tmp_path / "gone")
    tokenizer = tokenizer_beside(tmp_path / "own", manifest.tokenizer)
    assert tokenizer.decode(tokenizer.encode("Anne Elliot")) == "Anne Elliot"
    assert tokenizer.vocab_hash == manifest.tokenizer["vocab_hash"]
    assert not (tmp_path / "gpt2/vocab.tiktoken").exists()
    of_gpt2 = open_shards(tmp_path / "gpt2").manifest.tokenizer
    assert tokenizer_beside(tmp_path / "gpt2", of_gpt2).vocab_size == 50257
    for put, says in ((None, "cannot read the vocabulary"), (VOCABULARY, "is another vocabulary")):
        (tmp_path / "own/vocab.tiktoken").unlink(missing_ok=True)
        if put:
            (tmp_path / "own/vocab.tiktoken").write_bytes(put.read_bytes())
        load_tokenizer.cache_clear()
        with pytest.raises(DataError, match=says):
            tokenizer_beside(tmp_path / "own", manifest.tokenizer)


def test_a_vocabulary_that_changes_meanwhile_is_not_passed_off(tmp_path: Path) -> None:
    ranks = VOCABULARY.read_bytes()[:-20].rpartition(b"\n")[0] + b"\n"
    (tmp_path / "bpe").write_bytes(ranks)
    tokenizer = load_tokenizer(tmp_path / "bpe")
    (tmp_path / "bpe").write_bytes(VOCABULARY.read_bytes())
    with pytest.raises(DataError, match="has changed since"):
        tokenizer.publish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bpe"]


def test_the_lengths_are_those_of_the_bytes() -> None:
    tokenizer = load_tokenizer()
    text = "naïve 日本語 — fine"
    assert tokenizer.lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert (tokenizer.lengths[tokenizer.eot], len(tokenizer.lengths)) == (0, 50257)
