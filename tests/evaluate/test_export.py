"""Exported folders: what transformers loads, here and where our code is not."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import train_here, world  # noqa: F401 - fixtures
from ranks import ROOT

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_gpt.data import load_tokenizer
from sparse_gpt.evaluate.checkpoint import load_trained
from sparse_gpt.huggingface.convert import from_transformers
from sparse_gpt.huggingface.tokenizer import fast_tokenizer

FFNS = ["dense", "default", "light", pytest.param("paper", marks=pytest.mark.long)]


@pytest.fixture
def exported(train_here, command, tmp_path):  # noqa: F811
    """Trains two steps with an FFN and exports it."""

    def make(ffn, *options):
        train_here("duration.steps=2", f"model.ffn={ffn}")
        done = command("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *options)
        assert done.returncode == 0, done.stderr
        return load_trained(str(tmp_path / "run"), torch.float32), tmp_path / "out"

    return make


def prompt(trained):
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode("Anne was a woman of").tolist()]
    return torch.tensor([ids])


@pytest.mark.parametrize("ffn", FFNS)
def test_logits_are_ours_and_a_round_trip_is_bit_equal(exported, ffn):
    trained, folder = exported(ffn)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = prompt(trained)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, trained.model(tokens), rtol=0, atol=1e-5)
    back = from_transformers(theirs)
    assert back.config.model_dump(exclude={"dropout"}) == trained.config.model.model_dump(
        exclude={"dropout"}
    )
    vocab = trained.config.model.vocab_size
    for name, value in trained.model.state_dict().items():
        found = back.state_dict()[name]
        if name in ("wte.weight", "lm_head.weight"):  # what pads it is no part of the model
            found, value = found[:vocab], value[:vocab]
        assert torch.equal(found, value), name


@pytest.mark.parametrize("ffn", ["dense", "default"])
def test_an_exported_folder_is_a_checkpoint(exported, command, ffn):
    trained, folder = exported(ffn)
    again = load_trained(str(folder), torch.float32)
    assert (again.step, again.config) == (2, trained.config)
    assert again.tokenizer.vocab_hash == trained.tokenizer.vocab_hash
    with torch.no_grad():
        logits = [one.model(prompt(trained)) for one in (trained, again)]
    assert torch.equal(*logits)
    found = [command("evaluate", str(name), "--json") for name in (folder, trained.run)]
    assert [done.returncode for done in found] == [0, 0], found[0].stderr
    of_folder, of_run = (json.loads(done.stdout)["held_out"][0] for done in found)
    assert of_folder == {**of_run, "checkpoint": f"{folder}@2"}
    assert (folder / "evaluations" / "step-00000002.json").exists()


ALONE = """
import importlib.abc, json, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "sparse_gpt":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
remote = {"trust_remote_code": True} if sys.argv[2] == "sparse" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **remote).eval()
ids = AutoTokenizer.from_pretrained(sys.argv[1], **remote)("Anne was a woman of").input_ids
tokens = torch.tensor([[model.config.bos_token_id, *ids]])
found = model.generate(tokens, do_sample=False, max_new_tokens=12, min_new_tokens=12)
print(json.dumps({"ids": found[0].tolist(), "type": type(model).__name__}))
"""


@pytest.mark.parametrize("ffn", ["dense", "default", pytest.param("paper", marks=pytest.mark.long)])
def test_it_loads_where_our_code_is_not_and_writes_the_same(exported, ffn, tmp_path):
    trained, folder = exported(ffn)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), "dense" if ffn == "dense" else "sparse"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == trained.model.generate(prompt(trained), 12)[0].tolist()
    assert found["type"] == ("GPT2LMHeadModel" if ffn == "dense" else "SparseGPT2LMHeadModel")


def test_half_precision_and_several_files(exported):
    trained, folder = exported("dense", "--dtype", "bf16", "--shard-size", "40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.wpe.weight, trained.model.wpe.weight.bfloat16())


def test_the_card_says_what_it_is(exported):
    trained, folder = exported("default")
    card = (folder / "README.md").read_text()
    counts = f"{sum(p.numel() for p in trained.model.parameters()):,}"
    for fact in (
        "step 2, 1,024 tokens",
        counts,
        trained.provenance["data_manifest_hash"],
        "commit",
    ):
        assert fact in card
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["bos_token_id"] == generation["eos_token_id"] == 1023


def test_bad_input_is_one_line_and_writes_nothing(command, run, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    for options, says in (
        (["--out", full], f"{full}: is there already; choose another folder"),
        (["--out", tmp_path / "x", "--shard-size", "big"], "--shard-size is 'big'"),
    ):
        done = command("export", str(run), *map(str, options))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert says in done.stderr
    assert [path.name for path in full.iterdir()] == ["note"]
    assert not (tmp_path / "x").exists()


def test_what_was_exported_elsewhere_is_refused_in_one_line(exported, command, tmp_path):
    _, folder = exported("dense")
    (folder / "model.safetensors").write_bytes(b"no weights")
    done = command("generate", str(folder), "Anne")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{folder}: is damaged" in done.stderr
    (folder / "config.yaml").unlink()
    done = command("generate", str(folder), "Anne")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{folder}: was not exported by sparse-gpt" in done.stderr


@pytest.fixture(scope="module")
def fast():
    """Our tokenizer and theirs for each pattern, in GPT-2's vocabulary."""
    found = {}
    for pattern in ("r50k", "cl100k", "o200k"):
        ours = load_tokenizer(None, pattern)
        found[pattern] = ours, fast_tokenizer(ours.ranks, pattern, 128)
    return found


TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab 'sST\n\r\t\xa012")))


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
@settings(max_examples=300)
@given(text=TEXTS)
def test_ids_are_ours_for_any_text(fast, pattern, text):
    ours, theirs = fast[pattern]
    assert theirs(text).input_ids == ours.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text


def test_ids_of_a_learned_vocabulary_are_ours(exported):
    trained, folder = exported("dense")
    theirs = AutoTokenizer.from_pretrained(folder)
    text = (ROOT / "data/novels/persuasion.txt").read_text()[:200_000]
    assert theirs(text).input_ids == trained.tokenizer.encode(text).tolist()
    assert theirs("<|endoftext|>").input_ids == [1023]
    assert len(theirs) == 1024
