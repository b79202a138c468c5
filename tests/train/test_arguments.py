"""Words that a rank gets, through whatever shells."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.train.arguments import encoded, parse

LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
WORDS = st.lists(st.text(LETTERS | st.sampled_from(" ;$'\"`{}*&|\\")), max_size=4).map(
    lambda words: ["--config", "run.yaml", *(f"key={word}" for word in words)]
)


@settings(max_examples=50)
@given(WORDS)
def test_words_arrive_as_they_were_given(words):
    """Through a shell that gets them without any quotes, as DeepSpeed's runner sends them."""
    line = " ".join(encoded(words))
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True)
    arrived = parse(["--local_rank=0", *done.stdout.split("\0")[:-1]])
    assert (arrived.config, arrived.overrides) == ("run.yaml", words[2:])


def test_plain_words_stay_readable():
    words = ["--config", "configs/a-b.yaml", "optimizer.lr=1e-3"]
    assert encoded(words) == words
    assert parse(["--job", "x", *words]).overrides == ["optimizer.lr=1e-3"]


def test_a_rank_without_a_config_says_what_it_wants(capsys):
    with pytest.raises(SystemExit):
        parse([])
    assert "required: --config" in capsys.readouterr().err
