import math

import pytest
import torch

from sparse_gpt import GPT, ModelConfig
from sparse_gpt.model.flops import count_flops
from sparse_gpt.train.component_profile import ComponentProfile

SIZES = {"vocab_size": 97, "max_seq_len": 16, "d_model": 32, "n_layer": 2, "n_head": 2}
TOKENS = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return GPT(ModelConfig(**SIZES, ffn={"preset": "paper", "feedback": {}}))


@pytest.fixture
def profile(model):
    return ComponentProfile(model, count_flops(model, batch=1, seq=16), torch.device("cpu"))


def test_a_sampled_step_has_the_time_of_every_component_and_what_was_used(model, profile):
    with profile.attached(sampled=True):
        model(TOKENS, TOKENS)
        model(TOKENS, TOKENS)
    found = profile.metrics()
    blocks = count_flops(model, batch=1, seq=16).blocks()
    names = [f"block_{number:02}/{name}" for number, block in enumerate(blocks) for name in block]
    assert {tag for tag in found if tag.startswith("time/")} == {f"time/{name}" for name in names}
    assert all(value > 0 for tag, value in found.items() if tag.startswith("time/"))
    shares = {tag: value for tag, value in found.items() if tag.startswith("sparsity/")}
    assert {tag.split("/")[2] for tag in shares} == {"ffn.spectral", "ffn.feedback"}
    assert all(0 < share <= 1 for share in shares.values())
    assert shares["sparsity/block_00/ffn.spectral"] == pytest.approx(0.5, abs=0.05)


def test_a_dictionarys_share_and_entropy_are_measured():
    model = GPT(ModelConfig(**SIZES, ffn={"preset": "default", "spectral": {"blocks": 8}}))
    profile = ComponentProfile(model, count_flops(model, batch=1, seq=16), torch.device("cpu"))
    with profile.attached(sampled=True):
        model(TOKENS, TOKENS)
    found = profile.metrics()
    for block in ("block_00", "block_01"):
        assert found[f"sparsity/{block}/ffn.spectral"] == 0.25
        assert 0.5 < found[f"routing/{block}/energy_entropy"] < math.log(8)
    assert sum(int(each.spectral.loads.sum()) for each in (b.ffn for b in model.blocks)) == 192


def test_other_steps_measure_nothing_and_run_as_before(model, profile):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with profile.attached(sampled=True):
        model(TOKENS, TOKENS)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with profile.attached(sampled=False):
        model(TOKENS, TOKENS)
    assert profile.metrics() == {}


def test_compiled_blocks_are_set_aside_for_the_step_and_come_back(model, profile):
    ran = []

    def compiled(*arguments):
        ran.append(model.blocks[0])
        return model.blocks[0].forward(*arguments)

    model.blocks[0]._compiled_call_impl = compiled  # where torch keeps it
    with profile.attached(sampled=True):
        model(TOKENS, TOKENS)
    assert not ran
    model(TOKENS, TOKENS)
    assert ran
