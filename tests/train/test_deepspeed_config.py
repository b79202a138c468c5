from sparse_gpt.config.load import load_config
from sparse_gpt.train.deepspeed_config import deepspeed_config


def test_the_batch_is_the_runs_and_native_keys_lie_over_our_defaults(run_file):
    native = (
        "deepspeed={zero_optimization: {stage: 3, overlap_comm: true}, "
        "data_types: {param_dtype: fp32, keep_in_fp32_modules: [beta]}}"
    )
    merged = deepspeed_config(load_config(run_file, [native]), world_size=2)
    assert merged["train_batch_size"] == 16
    assert merged["train_micro_batch_size_per_gpu"] == 4
    assert merged["gradient_accumulation_steps"] == 2
    assert merged["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert merged["data_types"] == {
        "grad_accum_dtype": "fp32",
        "param_dtype": "fp32",
        "keep_in_fp32_modules": ["beta"],
    }
