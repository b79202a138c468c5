"""Properties of a whole FFN, dense or sparse, for every option."""

import copy

import pytest
import torch
from ffn_options import OPTIONS
from functorch.compile import make_boxed_func
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call

from sparse_gpt import DenseFFN, DenseFFNConfig, SparseFFNConfig, UltraEfficientSparseFFN


@pytest.fixture
def ffn(model_config, wake):
    if model_config.ffn.kind == "dense":
        return wake(DenseFFN(32, model_config.ffn))
    return wake(UltraEfficientSparseFFN(32, config=model_config.ffn))


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("training", [True, False])
def test_a_token_does_not_see_another(ffn, training, data):
    seq = data.draw(st.integers(1, 9))
    last = data.draw(st.integers(0, seq - 1))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, other = torch.randn(2, 3, seq, 32)
    scale = data.draw(st.sampled_from([1.0, 100.0]))  # others may well be far larger
    other = scale * other
    other[1, : last + 1] = x[1, : last + 1]

    outputs = []
    for tokens in (x, other):
        torch.manual_seed(1)  # the same dropout
        outputs.append(copy.deepcopy(ffn).train(training)(tokens)[1, : last + 1])
    assert torch.equal(*outputs)


def test_gradients_are_right(ffn):
    ffn.double().eval()
    names, parameters = zip(*ffn.named_parameters(), strict=True)
    x = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: functional_call(ffn, dict(zip(names, values, strict=True)), (x,)),
        (x, *parameters),
        fast_mode=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_runs_in_other_dtypes(ffn, dtype):
    ffn.eval()
    x = torch.randn(40, 32)
    expected = ffn(x)
    other = copy.deepcopy(ffn).to(dtype)
    y = other(x.to(dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert all(p.grad.isfinite().all() for p in other.parameters())
    # Rounding moves a few coefficients and tokens across their thresholds: compare the bulk.
    error = (y.float() - expected).abs().median().item()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_any_leading_shape(ffn):
    ffn.eval()
    x = torch.randn(2, 3, 32)
    flat = ffn(x.view(6, 32))
    torch.testing.assert_close(ffn(x), flat.view(2, 3, 32))
    torch.testing.assert_close(ffn(x[0, 0]), flat[0])


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_forward_pass_leaves_the_weights_alone(ffn, tokens):
    before = copy.deepcopy(ffn.eval().state_dict())
    with torch.no_grad():  # autograd would complain of a write: generation has none
        ffn(torch.randn(1, tokens, 32))
    for name, value in ffn.state_dict().items():
        assert torch.equal(value, before[name]), name


# What a graph may not hold: on a GPU each waits for the device.
WAITS = ("item", "_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_config", "dtype"),
    [
        *((option, torch.float32) for option in ("dense", *OPTIONS)),
        *((option, torch.bfloat16) for option in OPTIONS if option.startswith("dictionary")),
    ],
    indirect=["model_config"],
)
def test_compiles_without_graph_breaks_or_a_wait_for_the_device(ffn, dtype):
    torch._dynamo.reset()
    for module in ffn.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ffn.to(dtype)
    eager, found = copy.deepcopy(ffn), []

    def noted(graph, _):
        found.append({str(node.target).split(".")[-2:][0] for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted)
    compiled = torch.compile(ffn, backend=backend, fullgraph=True)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for _ in range(2):
        x = torch.randn(4, 5, 32, dtype=dtype, requires_grad=True)
        x2 = x.detach().clone().requires_grad_()
        y, y2 = compiled(x), eager(x2)
        torch.testing.assert_close(y, y2, **(loose or {"rtol": 1e-4, "atol": 1e-5}))
        y.square().sum().backward()
        y2.square().sum().backward()
        torch.testing.assert_close(x.grad, x2.grad, **(loose or {"rtol": 1e-3, "atol": 1e-4}))
    for (name, mine), theirs in zip(ffn.named_parameters(), eager.parameters(), strict=True):
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < (2e-2 if loose else 1e-3), name
    for (name, mine), theirs in zip(ffn.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert len(found) == 2
    assert not set.union(*found).intersection(WAITS)


def test_the_norm_sets_the_size_of_the_branch():
    config = SparseFFNConfig(out_gain=0.25)
    ffn = UltraEfficientSparseFFN(128, config=config)
    y = ffn(7 * torch.randn(1000, 128))
    assert y.std().item() == pytest.approx(0.25, rel=0.01)


def test_dropout_acts_on_the_branch():
    ffn = UltraEfficientSparseFFN(128, config=SparseFFNConfig(dropout=0.5))
    x = torch.randn(1000, 128)
    assert (ffn(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (ffn.eval()(x) != 0).all()


def test_dense_equals_gpt2s_definition(wake):
    ffn = wake(DenseFFN(8, DenseFFNConfig()))
    x = torch.randn(5, 8)
    z = x @ ffn.up.weight.T + ffn.up.bias
    gelu = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    torch.testing.assert_close(ffn(x), gelu @ ffn.down.weight.T + ffn.down.bias)


def test_bad_width_and_preset_are_named():
    with pytest.raises(ValueError, match="group_size 16 does not divide d_model 24"):
        UltraEfficientSparseFFN(24, "light")
    with pytest.raises(ValueError, match="top_k 2 does not divide d_model 25"):
        UltraEfficientSparseFFN(25)
    with pytest.raises(ValueError, match="'dense'"):
        UltraEfficientSparseFFN(128, "dense")
    with pytest.raises(ValueError, match=r"'papr'; possible: dense, paper, light, default"):
        UltraEfficientSparseFFN(128, "papr")


def test_autocast_trains_in_its_dtype(model_config):
    if model_config.ffn.kind == "dense":
        pytest.skip("is torch's own")
    ffn = UltraEfficientSparseFFN(32, config=model_config.ffn).eval()
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x)
    y.float().square().sum().backward()
    # The selections of a few tokens may differ after rounding; most channels must not.
    close = torch.isclose(y.float(), ffn(x), atol=0.1)
    assert close.float().mean() > 0.9
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ffn.parameters())
