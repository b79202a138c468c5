"""Learning-rate transfer: which weights it reaches, and what it makes of a new model."""

import copy

import pytest
import torch

from sparse_gpt import GPT, ModelConfig
from sparse_gpt.model.width import lr_multipliers, transfer_width

DENSE = {"preset": "dense", "fan_in_init": True}


def model(d_model=256, ffn="default", seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "max_seq_len": 16, "n_layer": 1, "n_head": 2, **sizes}
    return GPT(ModelConfig(d_model=d_model, ffn=ffn, **sizes))


def scaled(gpt):
    """The names of what has another learning rate, which must be 128 / d_model times."""
    multipliers = lr_multipliers(gpt)
    assert multipliers.keys() == dict(gpt.named_parameters()).keys()
    assert set(multipliers.values()) == {1.0, 128 / gpt.config.d_model}
    names = (name for name, multiplier in multipliers.items() if multiplier != 1)
    return {name.removeprefix("blocks.0.") for name in names}


ALWAYS = {"attention.qkv.weight", "attention.out.weight", "ln_f.weight", "ln_f.bias"}
FEEDBACK = {"ffn.feedback.a", "ffn.feedback.score"}
DICTIONARY = {f"ffn.spectral.{name}" for name in ("router.weight", "analysis", "synthesis")}


@pytest.mark.parametrize(
    ("ffn", "more"),
    [
        (DENSE, {"ffn.up.weight", "ffn.down.weight"}),
        ("paper", {"ffn.projection.weight"}),
        ("light", {"ffn.projection.weight", *FEEDBACK}),
        ("default", {"ffn.projection.weight", *DICTIONARY}),
        ({"preset": "light", "projection": {"kind": "factored"}}, FEEDBACK),
        ({"preset": "paper", "spectral": {"factors": (8, 32)}}, {"ffn.projection.weight"}),
    ],
)
def test_what_adds_up_more_with_the_width_learns_slower(ffn, more):
    assert scaled(model(ffn=ffn)) == ALWAYS | more


def test_a_width_that_shares_no_parts_with_the_base_will_do():
    parts = {"polynomial": {"group_size": 25}, "feedback": {"groups": 5}}
    assert scaled(model(d_model=50, ffn={"preset": "light", **parts})) > FEEDBACK


def test_every_option_of_the_ffn_has_its_multipliers(model_config):
    assert set(lr_multipliers(GPT(model_config)).values()) == {1.0, 128 / 32}


@pytest.mark.parametrize("ffn", [DENSE, "paper", "light", "default"])
def test_at_the_base_width_nothing_changes(ffn):
    gpt = model(d_model=128, ffn=ffn)
    before = copy.deepcopy(gpt.state_dict())
    transfer_width(gpt)
    assert all(torch.equal(before[name], now) for name, now in gpt.state_dict().items())
    assert set(lr_multipliers(gpt).values()) == {1.0}


@pytest.mark.parametrize("ffn", [DENSE, "light", "default"])
def test_initial_weights_follow_the_width(ffn):
    """Their std is that of the base width, times 1/√d_model where the learning rate is scaled."""
    base, wide = model(d_model=128, ffn=ffn), model(d_model=512, ffn=ffn)
    multipliers = lr_multipliers(wide)
    transfer_width(wide)
    parameters = dict(base.named_parameters())
    for name, p in wide.named_parameters():
        old = parameters[name].std().item()
        if name.startswith("blocks") and old > 1e-6:  # the others start constant
            expected = old * multipliers[name] ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("d_model", [32, 512])
def test_the_last_norm_acts_and_learns_as_a_factor_behind_it(d_model):
    """Against the factor in so many words: the norm's output times 128 / d_model."""
    ratio = 128 / d_model
    factored, ours = model(d_model=d_model), model(d_model=d_model)
    transfer_width(ours)
    factored.load_state_dict({**ours.state_dict(), "ln_f.weight": torch.ones(d_model)})
    factored.ln_f.register_forward_hook(lambda module, args, output: output * ratio)

    losses = []
    for gpt, norms_lr in ((factored, 1e-2), (ours, 1e-2 * ratio)):
        norm = list(gpt.ln_f.parameters())
        others = [p for name, p in gpt.named_parameters() if not name.startswith("ln_f")]
        groups = [{"params": norm, "lr": norms_lr}, {"params": others, "lr": 1e-4}]
        optimizer = torch.optim.Adam(groups, eps=1e-15)
        tokens = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(1))
        for _ in range(10):
            loss = gpt(tokens, tokens.roll(-1, 1))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[10:] == pytest.approx(losses[:10], rel=1e-5)
    assert losses[19] < losses[10] - 0.1


def test_a_dense_ffn_whose_start_ignores_the_width_is_refused():
    with pytest.raises(ValueError, match=r"set model\.ffn\.fan_in_init: true"):
        transfer_width(model(ffn="dense"))
