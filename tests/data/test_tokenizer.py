import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from data import DataError, load_tokenizer
from data.tokenizer import PATTERNS, VOCABULARY


def test_known_ids_and_attributes() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("Hello world")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.vocab_hash == hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert PATTERNS["r50k"] == r50k_pat_str


@settings(max_examples=100, deadline=None)
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
    monkeypatch.setattr("data.tokenizer.VOCABULARY", altered)
    load_tokenizer.cache_clear()
    with pytest.raises(DataError, match=r"gpt2\.tiktoken: not GPT-2's vocabulary"):
        load_tokenizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"IQ== 0", b"IQ== 1"), "its ranks are not 0, 1, 2"),
        ((b"IQ== 0\n", b"IQ== zero\n"), r"ranks\.tiktoken:1: is not a base64 token and its rank"),
        ((b"IQ== 0\n", b"I?== 0\n"), r"ranks\.tiktoken:1: is not a base64 token"),
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
