import re
import shutil
from pathlib import Path

import pytest
import torch
from ranks import finish, metrics, stage, start_ranks

from sparse_gpt import GPT
from sparse_gpt.config.load import load_config
from sparse_gpt.data import Batch
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.train.engine import parameter_groups

COUNTING = Path(__file__).with_name("counting_train.py")


@pytest.mark.long
def test_what_memory_is_saved_changes_no_loss(run_file, tmp_path):
    """Offload and recomputation, with dropout, at two ranks in ZeRO-3: the run without them."""
    dropout = ("model.dropout=0.1", "model.ffn.dropout=0.1", "duration.steps=3")
    savings = {
        "plain": ("deepspeed={zero_optimization: {stage: 3}}",),
        "saved": (
            "deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: cpu}}}",
            "activation_checkpointing=full",
        ),
    }
    runs = []
    for name, own in savings.items():
        finish(start_ranks(run_file, *dropout, *own, f"run_dir={tmp_path / name}"))
        runs.append(rows(tmp_path / name))
    for plain, saved in zip(*runs, strict=True):
        assert plain[::2] + plain[3:] == saved[::2] + saved[3:]
        # An offloaded optimizer adds the norm up in another order; at these norms nothing is cut.
        assert plain[1] == saved[1] or plain[1] == pytest.approx(saved[1], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_accumulated_gradients_are_reduced_once_a_step(run_file, tmp_path, zero_stage):
    counts = []
    for micro_batch in (2, 8):  # 4 micro-batches a step, 1
        run_dir = tmp_path / str(micro_batch)
        own = [f"batch.micro_batch={micro_batch}", f"run_dir={run_dir}", "duration.steps=2"]
        outputs = finish(start_ranks(run_file, *own, stage(zero_stage), script=COUNTING))
        counts += [int(line.split()[1]) for line in re.findall("reduced .* elements", outputs[0])]
    parameters = parameter_counts(load_config(run_file).model).total
    assert parameters <= counts[-1] < 1.1 * parameters
    assert len(set(counts)) == 1


@pytest.mark.long
def test_losses_of_every_zero_stage_agree_over_50_steps(run_file, tmp_path):
    losses = []
    for zero_stage in range(4):
        run_dir = tmp_path / str(zero_stage)
        finish(start_ranks(run_file, stage(zero_stage), "duration.steps=50", f"run_dir={run_dir}"))
        losses.append([row["train/loss"] for row in metrics(run_dir)[1:]])
        assert len(losses[-1]) == 50
        assert losses[-1] == pytest.approx(losses[0], rel=1e-5)


def test_groups_decay_matrices_alone_and_alike_at_every_width(run_file):
    config = load_config(run_file, ["optimizer.width_transfer=true", "model.vocab_size=100"])
    model = GPT(config.model)
    groups = parameter_groups(model, config.optimizer)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    kinds = [(group["lr_multiplier"], group["weight_decay"]) for group in groups]
    assert kinds == [(4.0, 0.1 / 4), (1.0, 0.1), (4.0, 0.0), (1.0, 0.0)]
    for group in groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}

    plain = parameter_groups(model, config.optimizer.model_copy(update={"width_transfer": False}))
    kinds = [(group["lr_multiplier"], group["weight_decay"]) for group in plain]
    assert kinds == [(1.0, 0.1), (1.0, 0.0)]


def rows(run_dir):
    tags = ("train/loss", "train/grad_norm", "train/learning_rate", "val/loss")
    return [[row.get(tag) for tag in tags] for row in metrics(run_dir)]


@pytest.mark.parametrize("stages", [(0, 3), pytest.param((0, 1, 2), marks=pytest.mark.long)])
def test_width_transfer_trains_and_resumes_alike_in_every_zero_stage(run_file, tmp_path, stages):
    options = ["duration.steps=6", "checkpoint.every=3", "model.ffn.feedback={}"]
    finish(start_ranks(run_file, *options, f"run_dir={tmp_path / 'plain'}"))
    options.append("optimizer.width_transfer=true")
    losses = {}
    for zero_stage in stages:
        run_dir = tmp_path / str(zero_stage)
        own = [f"run_dir={run_dir}", stage(zero_stage)]
        finish(start_ranks(run_file, *options, *own), timeout=300)
        whole = rows(run_dir)
        shutil.rmtree(run_dir / "checkpoints/step-00000006")
        output = finish(start_ranks(run_file, *options, *own), timeout=300)[0]
        assert "step 4/6" in output
        assert "step 3/6" not in output
        assert rows(run_dir) == whole
        losses[zero_stage] = [row["train/loss"] for row in metrics(run_dir)[1:]]
        assert losses[zero_stage] == pytest.approx(losses[0], rel=1e-5)
    plain = rows(tmp_path / "plain")
    assert [row[2] for row in whole] == [row[2] for row in plain]  # what is said is the schedule
    assert losses[0][-1] != pytest.approx(plain[-1][0], rel=1e-3)


def test_width_transfer_changes_nothing_at_the_base_width(run_file, tmp_path):
    options = ["duration.steps=3", "model={d_model: 128, n_head: 4, n_layer: 1}"]
    options.append("eval.max_tokens=64")
    runs = []
    for transfer in ("false", "true"):
        own = [f"run_dir={tmp_path / transfer}", f"optimizer.width_transfer={transfer}"]
        finish(start_ranks(run_file, *options, *own))
        runs.append(rows(tmp_path / transfer))
    assert runs[0] == runs[1]


def test_width_transfer_wants_weights_that_start_by_their_width(run_file):
    dense = ["optimizer.width_transfer=true", "model.ffn={preset: dense}"]
    with pytest.raises(ConfigError, match=r"^\S+: optimizer.width_transfer: .*fan_in_init: true"):
        load_config(run_file, dense)
    assert load_config(run_file, [*dense, "model.ffn.fan_in_init=true"])


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [4, 16])
def test_a_step_is_the_same_in_every_stage_and_division(engine, batch, zero_stage, micro_batch):
    def losses(*overrides):
        made = engine(*overrides)
        steps = [made.step(batch(n).tokens, batch(n).targets, n) for n in range(3)]
        return [[float(value) for value in step] for step in steps]

    found = losses(stage(zero_stage), f"batch.micro_batch={micro_batch}")
    for one, other in zip(found, losses(stage(0), "batch.micro_batch=8"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_validation_is_the_mean_over_real_targets(engine, batch):
    made = engine()
    whole = batch(0)
    tokens, targets = whole.tokens, whole.targets.clone()
    targets[3:] = -100
    with torch.no_grad():
        expected = made.module.eval()(tokens[:3], targets[:3]).item()
    made.module.train()
    padded = Batch(whole.windows, whole.samples, padding=13)
    empty = Batch(whole.windows, whole.samples, padding=16)
    assert torch.equal(padded.targets, targets)
    assert made.evaluate([padded, empty]) == pytest.approx(expected)
    assert made.module.training


def test_running_statistics_go_into_a_checkpoint_and_come_back(engine, batch):
    made, other = engine("model.ffn.feedback={}"), engine("model.ffn.feedback={}")
    made.step(batch(0).tokens, batch(0).targets, 0)
    saved = made.statistics_and_scale()
    kinds = {name.split(".")[-1] for name in saved["statistics"]}
    assert kinds == {"threshold", "scale", "loads", "moves"}
    assert not same(other.statistics_and_scale(), saved)
    other.set_statistics_and_scale(saved)
    assert same(other.statistics_and_scale(), saved)
    made.step(batch(1).tokens, batch(1).targets, 1)
    assert not same(made.statistics_and_scale(), saved)  # which was a copy


def same(one, other):
    """Whether two `statistics_and_scale` are equal to the bit."""
    a, b = one["statistics"], other["statistics"]
    return one["loss_scale"] == other["loss_scale"] and all(
        map(torch.equal, a.values(), b.values())
    )


def test_what_deepspeed_refuses_is_one_line(engine):
    with pytest.raises(
        ConfigError, match=r"deepspeed.zero_optimization.stage: input should be"
    ) as refused:
        engine("deepspeed={zero_optimization: {stage: 7}}")
    assert "\n" not in str(refused.value)
