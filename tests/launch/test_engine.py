import pytest
import yaml

from launch.config import ConfigError, load_config
from launch.engine import deepspeed_config


def native(run_file, keys, *overrides, world_size=2):
    tree = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump({**tree, "deepspeed": keys}))
    return deepspeed_config(load_config(run_file, overrides), world_size)


def test_the_batch_is_the_runs_and_native_keys_lie_over_our_defaults(run_file):
    merged = native(run_file, {"zero_optimization": {"stage": 3, "overlap_comm": True}})
    assert merged["train_batch_size"] == 16
    assert merged["train_micro_batch_size_per_gpu"] == 4
    assert merged["gradient_accumulation_steps"] == 2
    assert merged["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"train_batch_size": 17}, "deepspeed.train_batch_size: 17 contradicts the run, which has"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled: True contradicts the run"),
        ({"gradient_clipping": 5.0}, "contradicts the run, which has 1.0"),
        ({"optimizer": {"type": "Adam"}}, "set `optimizer` of the run instead"),
        ({"scheduler": {"type": "WarmupLR"}}, "set `schedule` of the run instead"),
    ],
)
def test_what_deepspeed_would_ignore_or_override_is_refused(run_file, keys, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        native(run_file, keys)


def test_what_agrees_with_the_run_may_be_repeated(run_file):
    assert native(run_file, {"train_batch_size": 16, "bf16": {"enabled": False}})


def test_the_stage_that_trains_wrongly_in_half_precision_is_refused(run_file):
    stage_0 = {"zero_optimization": {"stage": 0}}
    assert native(run_file, stage_0)
    with pytest.raises(ConfigError, match="0 trains wrongly in bf16; use 1"):
        native(run_file, stage_0, "precision=bf16")
