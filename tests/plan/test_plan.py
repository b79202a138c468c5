"""`sparse-gpt plan`: memory before a run, and what is said of it."""

import json

import pytest
import torch
from ranks import ROOT
from torch.autograd.graph import saved_tensors_hooks

from sparse_gpt import GPT, ModelConfig
from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.plan.memory import estimate, trace
from sparse_gpt.plan.plan import make_plan
from sparse_gpt.plan.stage import RESERVED, largest_micro_batch
from sparse_gpt.train.gpus import GPUS

CONFIG = ROOT / "configs/124m.yaml"
SIZES = {"vocab_size": 97, "max_seq_len": 16, "d_model": 32, "n_layer": 3, "n_head": 4}


def really_kept(model, batch):
    """Bytes that a real forward leaves, weights left out."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.zeros(batch, SIZES["max_seq_len"], dtype=torch.int64)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(tokens)
    for tensor in (*model.parameters(), *model.buffers(), logits):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("ffn", ["dense", "default", "light", "paper"])
def test_two_short_traces_tell_what_a_real_forward_keeps(ffn, recompute):
    config = ModelConfig.preset("tiny", ffn=ffn, **SIZES)
    traced = trace(config, "fp32", recompute)
    model = GPT(config)
    model.recompute(recompute)
    # What does not grow with the batch, such as the positions, is counted with each sequence.
    real = really_kept(model, batch=2)
    assert 2 * (traced.ends + 3 * traced.block) == pytest.approx(real, rel=0.02)


def test_a_dictionary_is_no_activation():
    """What it keeps does not grow with its blocks, though the backward needs all of them."""
    traces = []
    for blocks in (8, 64):
        ffn = {"preset": "default", "spectral": {"blocks": blocks}}
        config = ModelConfig.preset("tiny", ffn=ffn, **SIZES)
        traces.append(trace(config, "fp32", "none"))
    few, many = traces
    energies = (64 - 8) * SIZES["max_seq_len"] * 4
    assert energies <= many.block - few.block < 2 * energies


def test_what_a_dictionary_does_to_each_stage():
    """Held against real steps in docs/memory.md."""

    def planned(stage, *more):
        options = ["model.ffn=default", "precision=fp32", "batch.micro_batch=16", *more]
        return estimate(load_config(CONFIG, options), 8, stage)

    parameters = 528_459_264
    prefetch = "deepspeed.zero_optimization.stage3_prefetch_bucket_size=0"
    reuse = "deepspeed.zero_optimization.stage3_max_reuse_distance"
    held = {n: planned(3, prefetch, f"{reuse}={n}").parameters for n in (0, 2 * 10**8, 10**9)}
    assert held[10**9] == 4 * (parameters // 8 + 5 * 10**8)
    assert held[2 * 10**8] == 4 * (parameters // 8 + 10**8)
    head, dictionary = 50_304 * 768, 2 * 64 * 384 * 768  # a block's comes whole
    assert held[0] == 4 * (parameters // 8 + head + dictionary)
    # ZeRO-2 holds the sum of the micro-batches before while it reduces the last one's gradients.
    options = ["model={vocab_size: 4096, d_model: 384, n_head: 6}", "batch.micro_batch=4"]
    small = load_config(ROOT / "configs/tiny-sparse.yaml", options)
    parameters = parameter_counts(small.model).total
    assert estimate(small, 1, 2, "cpu").gradients == 2 * 4 * parameters
    # Over several ranks it copies what goes to others.
    one, four = (estimate(small, ranks, 2, "cpu").buffers for ranks in (1, 4))
    assert four - one == 4 * (parameters - -(-parameters // 4))


def test_states_are_shared_out_by_the_stage():
    reuse = "deepspeed.zero_optimization.stage3_max_reuse_distance=0"  # else ZeRO-3 keeps them all
    config = load_config(CONFIG, [reuse])
    by_stage = {stage: estimate(config, 8, stage) for stage in (1, 2, 3)}
    parameters = 124_475_904
    assert by_stage[1].parameters == 2 * parameters
    assert by_stage[1].optimizer == pytest.approx(12 * parameters / 8)
    states = [m.parameters + m.gradients + m.optimizer for m in by_stage.values()]
    assert states == sorted(states, reverse=True)
    alone = estimate(load_config(CONFIG, ["precision=fp32"]), 1, 0)
    assert alone.optimizer == 8 * parameters


def test_checkpointing_and_offload_move_what_they_should():
    config = load_config(CONFIG)
    full = load_config(CONFIG, ["activation_checkpointing=full"])
    assert estimate(full, 1, 1).activations < estimate(config, 1, 1).activations / 3
    zero = "deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"
    offloaded = estimate(load_config(CONFIG, [zero]), 1, 2)
    assert offloaded.optimizer == 0
    assert offloaded.host > estimate(config, 1, 2).optimizer


def test_a_document_mask_is_a_square_in_each_block_but_not_for_flex_attention():
    def added(device, *more):
        options = ["batch.micro_batch=4", "model.n_layer=2", *more]
        plain = load_config(CONFIG, options)
        masked = load_config(CONFIG, [*options, "model.document_mask=true"])
        runs = (estimate(config, 1, 1, device).activations for config in (masked, plain))
        return next(runs) - next(runs)

    squares = pytest.approx(2 * 4 * 1024**2 * 2, rel=0.01)  # torch makes it bfloat16 in each block
    assert added("cpu") == squares
    assert added("cuda") == 0
    assert added("cuda", "model.n_head=96") == squares


def test_the_micro_batch_is_the_largest_that_fits():
    config = load_config(CONFIG)
    memory = 16 * 2**30
    best = largest_micro_batch(config, 8, 1, memory)
    assert (config.global_batch // 8) % best == 0
    for size in (best, 2 * best):
        total = estimate(config, 8, 1, micro_batch=size).total
        assert (total + RESERVED <= memory) == (size == best)
    assert largest_micro_batch(config, 8, 1, 2**30) is None


def test_a_plan_says_what_a_run_costs_and_what_is_wrong():
    config = load_config(CONFIG, ["activation_checkpointing=full"])
    plan = make_plan(config, 8, "H100", mfu=0.5)
    seconds = plan.training_flops / (8 * GPUS["H100"].peak_flops * 0.5)
    assert plan.days == pytest.approx(seconds / 86_400)
    assert 1.2 < plan.hardware_flops_at_most / plan.training_flops < 4 / 3
    small = make_plan(config, 8, "RTX-4090", memory=6 * 2**30).warnings
    assert any("reduce_bucket_size is larger" in warning for warning in small)
    huge = load_config(ROOT / "configs/1558m.yaml", ["batch.micro_batch=64"])
    assert "does not fit: set batch.micro_batch to" in make_plan(huge, 8, "L40S", 0.4).warnings[0]
    with pytest.raises(ConfigError, match="--gpu h100: did you mean 'H100'"):
        make_plan(config, 8, "h100", 0.4)


def test_a_gpu_of_no_table_is_its_peak_and_its_memory(command, refused):
    own = ("--peak-tflops", "71", "--memory-gb", "23")
    done = command("plan", "tiny-dense", "--gpu", "RTX-3090", *own, "--json")
    found = json.loads(done.stdout)
    assert (found["gpu"], found["peak_flops"]) == ("RTX-3090", 71e12)
    assert found["memory_bytes"] == 23 * 2**30
    config = load_config(CONFIG)
    half = make_plan(config, 8, "H100", peak_flops=GPUS["H100"].peak_flops / 2)
    assert half.days == 2 * make_plan(config, 8).days
    assert half.gpu == "H100 (as given)"
    assert "for another give --peak-tflops" in refused("plan", CONFIG, "--gpu", "RTX-3090")
    done = command("plan", "tiny-dense", "--peak-tflops", "measure", "--json")
    measured = json.loads(done.stdout)
    assert measured["gpu"] == "this CPU"
    assert 1e9 < measured["peak_flops"] < 1e14
    assert "give a number above 0" in refused("plan", CONFIG, "--peak-tflops", "fast")
    assert "--gpu is not given" in refused("plan", CONFIG, "--memory-gb", "24")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_run_file_of_ours_triggers_no_warning_of_ours(path):
    gpus = ["H100"] if path.stem in ("774m", "1558m") else ["H100", "L40S"]
    for gpu in gpus:
        assert make_plan(load_config(path), 1, gpu).warnings == []


def test_the_command_prints_a_table_or_json(command):
    shown = command("plan", CONFIG, "--gpus", "8", "--gpu", "H200")
    assert shown.returncode == 0, shown.stderr
    for text in ("ZeRO-1 (this run)", "activations", "largest micro-batch", "minutes at an"):
        assert text in shown.stdout
    found = json.loads(command("plan", CONFIG, "--gpus", "8", "--json").stdout)
    assert set(found["stages"]) == {"1", "2", "3"}
    wrong = command("plan", CONFIG, "--gpus", "7")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: batch.global_tokens")
