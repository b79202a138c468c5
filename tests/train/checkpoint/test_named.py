"""A checkpoint's name finds it, and the model is the one that was saved."""

import pytest
import torch

from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checkpoint.named import find, load_model


def test_the_newest_whole_one_or_that_of_a_step(train_here, tmp_path):
    train_here("duration.steps=2", "checkpoint.every=1")
    run = tmp_path / "run"
    assert find(str(run)) == (run, 2)
    assert find(f"{run}@1") == (run, 1)
    first, last = load_model(run, 1), load_model(run, 2)
    assert not torch.equal(first.wte.weight, last.wte.weight)
    assert last.blocks[0].ffn.spectral.loads.sum() > 0  # running statistics come too
    (run / "checkpoints/step-00000002/manifest.json").write_text("{")
    assert find(str(run)) == (run, 1)
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 7; there are: 1, 2"):
        find(f"{run}@7")
