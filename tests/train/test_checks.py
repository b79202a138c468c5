"""Every refusal is one line, before anything of a run exists."""

import re

import pytest
import yaml
from ranks import finish, start_ranks

from sparse_gpt.config.load import load_config
from sparse_gpt.data import open_blend, open_shards
from sparse_gpt.data.batches.batches import count_windows
from sparse_gpt.data.batches.order import blend_counts
from sparse_gpt.errors import ConfigError
from sparse_gpt.plan.memory import estimate
from sparse_gpt.train.checks import check_compiler, check_epochs, check_settings
from sparse_gpt.train.deepspeed_config import deepspeed_config
from sparse_gpt.train.feed import open_data


def native(run_file, keys, *overrides, world_size=2):
    tree = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump({**tree, "deepspeed": keys}))
    config = load_config(run_file, overrides)
    check_settings(config, world_size)
    return deepspeed_config(config, world_size)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"train_batch_size": 17}, "deepspeed.train_batch_size: 17 contradicts the run, which has"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled: True contradicts the run"),
        ({"gradient_clipping": 5.0}, "contradicts the run, which has 1.0"),
        ({"data_types": {"param_dtype": "bf16"}}, "param_dtype: 'bf16' contradicts the run"),
        ({"data_types": {"keep_in_fp32_modules": "beta"}}, "data_types.keep_in_fp32_modules"),
        ({"zero_optimization": None}, "zero_optimization: input should be a valid dictionary"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param: input should be a valid"),
        ({"zero_optimization": {"stage": 7}}, "stage: input should be 0, 1, 2, 3 or 3, got 7"),
        ({"zero_optimization": {"stagee": 1}}, "stagee: unknown key; did you mean 'stage'"),
        ({"zero_optimization": {"mics_shard_size": 1}}, "mics_shard_size: unknown key"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "reduce_bucket_size: inp"),
        ({"zero_optimization": {"reduce_bucket_size": 10**90}}, "0 elements are allocated, and no"),
        ({"zero_optimization": {"offload_param": {"device": "CPU"}}}, "offload_param.device: inp"),
        (
            {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "deepspeed.zero_optimization: Cannot provide deprecated parameter 'cpu_offload' and",
        ),
        ({"prescale_gradients": "false"}, "prescale_gradients: input should be a valid boolean"),
        ({"steps_per_print": "auto"}, "steps_per_print: input should be a valid integer"),
        ({"flops_profiler": {"enabled": "no"}}, "flops_profiler.enabled: input should be a valid"),
        (
            {"zero_optimization": {"stage": "3"}, "gradient_allreduce_op": "SUM"},
            "deepspeed: DeepSpeed refuses it: gradient_allreduce_op='sum' is not supported with",
        ),
        ({"optimizer": {"type": "Adam"}}, "set `optimizer` of the run instead"),
        ({"scheduler": {"type": "WarmupLR"}}, "set `schedule` of the run instead"),
        ({"activation_checkpointing": {}}, "set `activation_checkpointing` of the run instead"),
        ({"wandb": {"enabled": True}}, "deepspeed.wandb: is not used: set `log.trackers: [wandb]`"),
        ({"csv_monitor": {}}, "deepspeed.csv_monitor: is not used: set `log.trackers: [csv]` of"),
        ({"comet": {}}, "there is no tracker of Comet; `log.trackers` of the run has wandb"),
        ({"tensorboard": {}}, "each run writes it, and `log.trackers` adds wandb, mlflow and csv"),
    ],
)
def test_what_deepspeed_would_ignore_or_override_is_refused(run_file, keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        native(run_file, keys)


def test_a_trace_past_the_end_of_the_run_is_refused(run_file):
    native(run_file, {}, "log.trace={at: 15, steps: 2}")
    with pytest.raises(ConfigError, match=r"log\.trace: step 17 is past the 16 of the run"):
        native(run_file, {}, "log.trace={at: 15, steps: 3}")


def test_what_agrees_with_the_run_may_be_repeated(run_file):
    assert native(run_file, {"train_batch_size": 16, "bf16": {"enabled": False}})


@pytest.mark.parametrize("stage", [0, 0.0, "0", "0.0", "auto", False])
def test_the_stage_that_trains_wrongly_in_half_precision_is_refused(run_file, stage):
    stage_0 = {"zero_optimization": {"stage": stage}}
    assert native(run_file, stage_0)["zero_optimization"]["stage"] == 0
    with pytest.raises(ConfigError, match="0 trains wrongly in bf16; use 1"):
        native(run_file, stage_0, "precision=bf16")


@pytest.mark.parametrize("stage", [3, 3.0, "3", "3.0"])
def test_stage_3_is_refused_where_it_cannot_be_however_it_is_written(run_file, stage):
    stage_3 = {"zero_optimization": {"stage": stage}}
    assert native(run_file, stage_3)["zero_optimization"] == {"stage": 3}
    for override, message in (
        ("compile=true", "compile: ZeRO-3 gathers"),
        ("guard.checksum_every=1", "guard.checksum_every: ZeRO-3 keeps one copy"),
    ):
        with pytest.raises(ConfigError, match=message):
            native(run_file, stage_3, override)


@pytest.mark.parametrize("off", [False, 0, 0.0, "false", "False", "off", "no", "n", "0"])
def test_nan_is_looked_for_whatever_is_written_for_false(run_file, off):
    with pytest.raises(ConfigError, match="compute_grad_norm: false would let NaN"):
        native(run_file, {"zero_optimization": {"compute_grad_norm": off}})
    with pytest.raises(ConfigError, match="check_grad_overflow: false would let NaN"):
        native(run_file, {"bf16": {"check_grad_overflow": off}})
    with pytest.raises(ConfigError, match=r"bf16\.enabled: False contradicts the run"):
        native(run_file, {"bf16": {"enabled": off}}, "precision=bf16")


def test_what_is_offloaded_by_an_old_name_is_planned_as_offloaded(run_file):
    native(run_file, {"zero_optimization": {"stage": "2", "cpu_offload": "yes"}})
    old = estimate(load_config(run_file), world_size=2, stage=2)
    native(run_file, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert old == estimate(load_config(run_file), world_size=2, stage=2)
    assert old.host > 0


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ("{stage: 3, offload_param: {device: nvme}}", "offload_param.device: nvme has not been"),
        ("{stage: 2, offload_optimizer: {device: nvme}}", "offload_optimizer.device: nvme"),
    ],
)
def test_offload_to_disk_is_refused(run_file, zero, message):
    config = load_config(run_file, [f"deepspeed={{zero_optimization: {zero}}}"])
    with pytest.raises(ConfigError, match=message):
        check_settings(config, world_size=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compile=maybe"], "compile: input should be a valid boolean, got 'maybe'"),
        (["compile=true", "deepspeed={zero_optimization: {stage: 3}}"], "compile: ZeRO-3 gathers"),
        (["compile=true", "activation_checkpointing=selective"], "selective recomputes inside"),
        (["deepspeed={compile: {deepcompile: true}}"], "set `compile` of the run instead"),
    ],
)
def test_what_cannot_be_compiled_is_refused(run_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(run_file, overrides), world_size=1)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TORCHDYNAMO_DISABLE", "1", "compile: the environment has TORCHDYNAMO_DISABLE=1"),
        ("CXX", "no-such-compiler", "compile: there is no compiler no-such-compiler; install it"),
    ],
)
def test_where_nothing_can_be_compiled_a_run_is_refused(
    run_file, monkeypatch, variable, value, message
):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_compiler(load_config(run_file, ["compile=true"]))
    monkeypatch.setenv(variable, value)
    check_compiler(load_config(run_file))
    with pytest.raises(ConfigError, match=message):
        check_compiler(load_config(run_file, ["compile=true"]))


def test_flex_attention_needs_the_compiler_too(run_file, monkeypatch):
    options = ["model.document_mask=true", "model.d_model=64", "model.n_head=4"]
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    check_compiler(load_config(run_file, options))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_compiler(load_config(run_file, [*options, "model.n_head=8"]))  # too narrow for it
    with pytest.raises(ConfigError, match="document_mask: the environment has TORCHDYNAMO_DIS"):
        check_compiler(load_config(run_file, options))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match="document_mask: there is no compiler no-such-compiler"):
        check_compiler(load_config(run_file, options))


def test_caps_on_epochs_say_what_would_fit(blend_file, pair):
    def check(steps, *overrides):
        config = load_config(blend_file, [f"duration.steps={steps}", *overrides])
        check_epochs(config, open_data(config.data))

    windows = count_windows(open_shards(pair[0]).train, 32)
    quotas = open_blend({pair[0]: 0.75, pair[1]: 0.25})
    place = [source.folder for source in quotas.sources].index(pair[0])
    fits = max(
        steps
        for steps in range(1, windows)
        if blend_counts(steps * 16, quotas.quotas, 0)[place] <= 1.5 * windows
    )
    capped = f"data.blend={{{pair[0]}: {{weight: 3, max_epochs: 1.5}}, {pair[1]}/: 1}}"
    check(10 * fits)
    check(fits, capped)
    with pytest.raises(ConfigError, match=rf"{pair[0]} would be read .* {fits:,} steps") as error:
        check(fits + 1, capped)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"1\.5. times"):
        check(fits + 1, capped, "data.max_epochs=100")  # its own counts
    with pytest.raises(ConfigError, match="with a weight under") as error:
        check(2 * fits, capped)
    under = float(re.search(r"under ([\d.]+)", str(error.value))[1])
    check(2 * fits, capped.replace("weight: 3", f"weight: {under * 0.99}"))
    with pytest.raises(ConfigError, match="would be read"):
        check(2 * fits, capped.replace("weight: 3", f"weight: {under * 1.02}"))


def test_a_cap_is_for_one_data_set_too(refused, run_file, shards):
    epoch = count_windows(open_shards(shards).train, 32)
    fits = epoch // 16
    config = load_config(run_file, [f"duration.steps={fits}", "data.max_epochs=1"])
    check_epochs(config, open_data(config.data))
    error = refused("train", run_file, f"duration.steps={fits + 1}", "data.max_epochs=1")
    assert f"{fits:,} steps ({fits * 512:,} tokens) are possible" in error
    assert "weight" not in error


@pytest.mark.parametrize("epochs", [0.5, 1, 2.25])
def test_epochs_are_whole_steps_that_read_all_of_the_data_so_often(run_file, shards, epochs):
    windows = count_windows(open_shards(shards).train, 32)
    config = load_config(run_file, [f"duration={{epochs: {epochs}}}", f"data.max_epochs={epochs}"])
    steps = config.total_steps
    assert steps * 16 <= epochs * windows < (steps + 1) * 16
    check_epochs(config, open_data(config.data))


def test_epochs_of_a_blend_or_of_no_data_are_refused_in_one_line(refused, run_file, pair, tmp_path):
    blend = f"data={{path: null, blend: {{{pair[0]}: 1, {pair[1]}: 1}}}}"
    error = refused("train", run_file, blend, "duration={epochs: 1}")
    assert "duration.epochs: of which source of data.blend?" in error
    error = refused("plan", run_file, f"data.path={tmp_path}", "duration={epochs: 1}")
    assert str(tmp_path) in error


def test_another_config_is_refused_in_one_line(run_file, tmp_path):
    finish(start_ranks(run_file, "duration.steps=4"))
    for overrides, message in (
        (["optimizer.lr=1e-4"], "holds another run: optimizer.lr was 0.003 and is 0.0001"),
        (
            ["batch.global_tokens=1024"],
            "batch.global_tokens was 512 and is 1024",
        ),
        (
            ["seed=1", "model.n_layer=1"],
            "model.n_layer was 2 and is 1, seed was 0 and is 1",
        ),
    ):
        ranks = start_ranks(run_file, *overrides)
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert {rank.returncode for rank in ranks} == {2}, outputs
        errors = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
