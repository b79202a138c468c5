"""Text from a checkpoint: whole characters, stops, seeds, many prompts; for people and pipes."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ENVIRONMENT, ROOT

from sparse_gpt import Sampling
from sparse_gpt.data import load_tokenizer
from sparse_gpt.evaluate.checkpoint import load_trained
from sparse_gpt.evaluate.generate import TextStream, generate

TOKENIZER = load_tokenizer()
EXOTIC = st.text(st.characters(codec="utf-8"), max_size=40)


def pieces(ids, stop=()):
    """What a stream gives for each id and at the end, and why it ended."""
    stream = TextStream(TOKENIZER, stop)
    return [*(stream.feed(token) for token in ids), stream.end()], stream.finish


@given(EXOTIC)
def test_a_stream_never_cuts_a_character_in_two(text):
    """One whose bytes are several tokens comes with the last of them."""
    found, finish = pieces(TOKENIZER.encode(text).tolist())
    assert "".join(found) == text
    assert finish == "length"
    assert all("�" not in piece for piece in found) or "�" in text


@given(st.lists(st.integers(0, 50255), max_size=20))
def test_any_tokens_give_the_text_that_they_are(ids):
    assert "".join(pieces(ids)[0]) == TOKENIZER.decode(ids)


@settings(max_examples=200)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_it_ends_before_the_first_stop_string_however_tokens_lie(text, stop):
    ids = [TOKENIZER.encode(letter)[0] for letter in text]
    found, finish = pieces(ids, stop)
    ends = [text.find(one) for one in stop if one in text]
    # Of stops that end at once the one that began first counts; a longer one may end later.
    first = next(
        (n for n in range(len(text) + 1) if any(text[:n].endswith(one) for one in stop)), None
    )
    assert (finish == "stop") == bool(ends)
    if first is None:
        assert "".join(found) == text
    else:
        assert "".join(found) == text[: min(at for s in stop if (at := text[:first].find(s)) >= 0)]


def test_end_of_text_ends_it():
    found, finish = pieces([*TOKENIZER.encode("so"), TOKENIZER.eot, *TOKENIZER.encode("on")])
    assert ("".join(found), finish) == ("so", "end of text")


def told(command, *arguments):
    done = command("generate", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_continues_a_prompt_the_same_for_a_seed(command, run):
    arguments = (run, "Anne was", "--max-new-tokens", 20)
    first, again = (told(command, *arguments, "--seed", 1) for _ in range(2))
    assert first == again != told(command, *arguments, "--seed", 2)
    assert first.startswith("Anne was")


def test_json_has_every_sample_of_every_prompt(command, run, tmp_path):
    (tmp_path / "prompts.txt").write_text("Emma\n\nMr. Knightley was a sensible man\n")
    options = ("--file", tmp_path / "prompts.txt", "--samples", 2, "--max-new-tokens", 9)
    found = json.loads(told(command, run, "Anne", *options, "--seed", 3, "--json"))
    prompts = ["Anne", "Emma", "Mr. Knightley was a sensible man"]
    assert [one["prompt"] for one in found] == [prompt for prompt in prompts for _ in range(2)]
    assert all(one["tokens"] <= 9 and one["finish"] in ("length", "end of text") for one in found)
    assert found[0]["text"] != found[1]["text"]
    plain = told(command, run, "Anne", *options, "--seed", 3)
    assert plain == "\n---\n".join(one["prompt"] + one["text"] for one in found) + "\n"


def test_greedy_text_is_the_models_own(run):
    trained = load_trained(str(run))
    [one] = generate(trained, ["Anne was"], 12, Sampling(temperature=0))
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode("Anne was")]
    expected = trained.model.generate(torch.tensor([ids], dtype=torch.int64), 12)[0, len(ids) :]
    assert one.text == trained.tokenizer.decode(expected[: one.tokens].tolist())
    both = generate(trained, ["Anne was", "It"], 12, Sampling(temperature=0))
    assert both[0] == one


def test_what_is_told_is_the_text_and_a_stop_ends_it(run):
    trained = load_trained(str(run))
    heard = []
    sampling = Sampling(temperature=0)
    [whole] = generate(trained, ["Anne"], 40, sampling, tell=heard.append)  # past the context
    assert "".join(heard) == whole.text
    assert whole.tokens == 40
    stop = whole.text[5:7]
    [cut] = generate(trained, ["Anne"], 40, sampling, stop=[stop])
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert (cut.finish, cut.tokens < 40) == ("stop", True)


def test_standard_input_is_a_prompt(run):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_gpt", "generate", str(run), "--max-new-tokens", "3"],
        input="Anne was\n", env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Anne was")


def test_a_person_is_asked_for_prompts(run):
    mine, theirs = pty.openpty()
    words = [sys.executable, "-m", "sparse_gpt", "generate", str(run), "--max-new-tokens", "3"]
    with subprocess.Popen(
        words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
        text=True, cwd=ROOT,
    ) as asked:  # fmt: skip
        os.write(mine, b"Anne was\nEmma\n\n")
        out, err = asked.communicate(timeout=120)
    os.close(mine)
    os.close(theirs)
    assert (asked.returncode, err) == (0, "Type the beginning of a text; an empty line ends.\n")
    assert "Anne was" in out
    assert "Emma" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Anne " * 40], "the prompt 'Anne Anne"),
        (["Anne", "--temperature", "-1"], "--temperature is -1.0; it must be 0 or more"),
        (["Anne", "--top-p", "0"], "--top-p is 0.0; it must be above 0"),
        (["--file", "none.txt"], "none.txt: cannot be read as prompts"),
    ],
)
def test_bad_input_is_one_line(command, run, arguments, says):
    done = command("generate", str(run), *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {says}")


def test_a_run_without_its_vocabulary_says_where_to_put_it(command, run):
    (run / "vocab.tiktoken").unlink()
    load_tokenizer.cache_clear()
    done = command("generate", str(run), "Anne")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run}/vocab.tiktoken: cannot read the vocabulary")
