"""The fused path against the eager module in float64.

Errors are norm-wise, ‖fused − reference‖ / ‖reference‖, of the output and of every gradient.
Selections jump: `calm` draws tokens whose every decision (a coefficient kept, a token selected)
is clearer than rounding, so that the comparison is about arithmetic.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before anything imports
triton: then one test here runs the others in a process of its own.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt import SparseFFNConfig, UltraEfficientSparseFFN, count_flops
from sparse_gpt.ffn.kernels import available, fused_ffn, unsupported

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="see test_in_triton's_interpreter")

FEEDBACK = {"rank": 2, "groups": 4, "share": 0.4, "iterations": 2}
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking is slow in the interpreter
OPTIONS = {
    "paper": {},
    "default": {
        "spectral": {"path": "parallel", "selection": "soft", "threshold": "constant"},
        "polynomial": {"degrees": (1, 2)},
        "feedback": {"rank": 4, "groups": 8, "share": 0.25},
        "norm_out": "before",
    },
    "constant": {"spectral": {"threshold": "constant", "keep": 0.3}},
    "soft": {"spectral": {"selection": "soft"}, "refine": {"stages": 1}},
    "soft-constant": {"spectral": {"selection": "soft", "threshold": "constant"}},
    "parallel": {"spectral": {"path": "parallel"}},
    "soft-parallel": {"spectral": {"path": "parallel", "selection": "soft"}},
    "no-spectral": {"spectral": None},
    "no-refine": {"spectral": None, "refine": None},
    "feedback": {"spectral": {"path": "parallel"}, "feedback": FEEDBACK},
    "feedback-only": {"spectral": None, "feedback": FEEDBACK | {"iterations": 1}, "refine": None},
    "factored": {"spectral": None, "projection": {"kind": "factored", "block": 8}},
    "degrees": {"spectral": None, "polynomial": {"degrees": (2, 5)}},
    "norm-before": {"spectral": None, "norm_out": "before"},
    "first-degree": {"spectral": None, "polynomial": {"degrees": (1,)}},
}


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run here")
def test_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build(options, d, dtype=torch.float32):
    """An FFN with no parameter at its initial value, in eval mode."""
    options = {"polynomial": {"degrees": (1, 2, 3, 4)}, "refine": {"stages": 2}, **options}
    ffn = UltraEfficientSparseFFN(d, config=SparseFFNConfig(**options)).eval()
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ffn.to(DEVICE, dtype)


def calm(ffn, tokens, dtype):
    """Tokens `(tokens, d)` whose decisions are clear of rounding, as far as they can be found."""
    exact = copy.deepcopy(ffn).double()
    margin = 1e-4 if dtype == torch.float32 else 0.015
    d = ffn.norm_in.normalized_shape[0]
    drawn = tokens * (200 if dtype == torch.bfloat16 else 20)
    x = torch.randn(max(drawn, 200), d, dtype=torch.float64, device=DEVICE).to(dtype).double()
    clear = torch.full((len(x),), torch.inf, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        if ffn.spectral is not None:
            c = exact.spectral.transform(exact.norm_in(x)).abs()
            if ffn.config.spectral.threshold == "exact":  # far from its neighbours by size
                c = c.sort(1, descending=True).values
                gaps = c[:, :-1] - c[:, 1:]
                k = ffn.spectral.k
                edges = gaps[:, max(0, k - 2) : k]
                clear = (edges if ffn.config.spectral.selection == "soft" else edges[:, -1:]).amin(
                    1
                )
            else:
                clear = (c - ffn.spectral.quantile).abs().amin(1)
        if ffn.feedback is not None:
            seen = []
            handle = exact.feedback.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            exact(x)
            handle.remove()
            m = exact.feedback._scores(seen[0]).squeeze(1)
            clear = torch.minimum(clear, (m - exact.feedback.threshold).abs())
    best = clear.argsort(descending=True)[:tokens]
    assert clear[best].min() > margin
    return x[best].to(dtype)


def gradients(ffn, function, x, dy):
    """Output and gradients by name."""
    x = x.detach().clone().requires_grad_()
    for parameter in ffn.parameters():
        parameter.grad = None
    y = function(x)
    y.backward(dy.to(y.dtype).view_as(y))
    return {"output": y.detach(), "x": x.grad} | {
        name: parameter.grad for name, parameter in ffn.named_parameters()
    }


def errors(found, expected):
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in expected.items()
    }


def compare(options, d, tokens, dtype, seed=0, rounding=2e-2):
    torch.manual_seed(seed)
    ffn = build(options, d, dtype)
    x = calm(ffn, tokens, dtype)
    dy = torch.randn_like(x)
    exact = copy.deepcopy(ffn).double()
    expected = gradients(exact, exact, x.double(), dy.double())
    fused = errors(gradients(ffn, lambda x: fused_ffn(ffn, x), x, dy), expected)
    # One rounding in bfloat16 is 4e-3 at most; where the eager chain's add up to more than the
    # limit, ours may too, but to no more than its.
    limit = dict.fromkeys(fused, 1e-5)
    if dtype == torch.bfloat16:
        eager = errors(gradients(ffn, ffn, x, dy), expected)
        limit = {name: max(rounding, eager[name]) for name in fused}
    assert {n: e for n, e in fused.items() if not e <= limit[n]} == {}
    return fused


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_the_eager_chain(options, dtype):
    compare(options, 48, 45, dtype)


@runs
@settings(max_examples=20, deadline=None, phases=PHASES)
@given(
    d=st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128, 160]),
    tokens=st.integers(1, 70),
    options=st.sampled_from(["paper", "default", "soft", "no-spectral", "feedback"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_equals_the_eager_chain(d, tokens, options, dtype, seed):
    # A norm over one or two selected tokens is one sample: its bfloat16 error varies.
    compare(OPTIONS[options], d, tokens, dtype, seed, rounding=4e-2)


@runs
@pytest.mark.parametrize(
    ("d", "options"),
    [
        (128, {"polynomial": {"group_size": 32, "degrees": (1, 2, 3, 4, 5, 6)}}),
        (128, {"polynomial": {"group_size": 64, "degrees": (1, 3)}, "spectral": None}),
        (48, {"spectral": {"factors": (24, 2), "keep": 1.0, "threshold": "constant"}}),
        (48, {"feedback": {"groups": 1, "rank": 20}, "spectral": None}),
        (768, {}),
    ],
    ids=str,
)
def test_other_shapes_equal_the_eager_chain(d, options):
    compare(options, d, 5, torch.float32)


@runs
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tokens=st.integers(1, 70), d=st.sampled_from([48, 64, 112]))
@pytest.mark.parametrize("options", ["default", "paper", "no-spectral", "feedback"])
def test_every_output_is_written(options, tokens, d, monkeypatch):
    """Memory that nobody wrote would show as NaN: what a kernel leaves out, and masked columns."""
    empty, like = torch.empty, torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
        patch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(torch.nan))
        ffn = build(OPTIONS[options], d)
        x = torch.randn(tokens, d, device=DEVICE)
        found = gradients(ffn, lambda x: fused_ffn(ffn, x), x, torch.randn_like(x))
    assert [name for name, value in found.items() if not value.isfinite().all()] == []


@runs
@pytest.mark.parametrize("options", ["paper", "default", "no-spectral"])
@pytest.mark.parametrize("training", [True, False])
def test_a_token_does_not_see_another(options, training):
    ffn = build(OPTIONS[options], 48).train(training)
    x, other = torch.randn(2, 2, 35, 48, device=DEVICE)
    other = 100 * other
    other[1, :20] = x[1, :20]
    y, y2 = (fused_ffn(copy.deepcopy(ffn), tokens)[1, :20] for tokens in (x, other))
    assert torch.equal(y, y2)


@runs
def test_results_repeat_to_the_bit():
    ffn = build(OPTIONS["feedback"], 64)
    x = torch.randn(60, 64, device=DEVICE)
    first, second = (gradients(ffn, lambda x: fused_ffn(ffn, x), x, x) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@runs
def test_any_leading_shape_and_layout():
    ffn = build(OPTIONS["paper"], 48)
    x = torch.randn(2, 3, 48, device=DEVICE)
    y = fused_ffn(ffn, x)
    assert y.shape == x.shape
    assert torch.equal(fused_ffn(ffn, x.view(6, 48)), y.view(6, 48))
    torch.testing.assert_close(fused_ffn(ffn, x[0, 0]), y[0, 0])
    strided = x.transpose(0, 1).requires_grad_()
    z = fused_ffn(ffn, strided)
    assert torch.equal(z.transpose(0, 1), y)
    z.sum().backward()
    assert strided.grad.shape == strided.shape
    assert fused_ffn(ffn, x[:0]).shape == (0, 3, 48)


@runs
def test_feedback_steps_its_threshold_in_training():
    ffn = build(OPTIONS["feedback"], 48).train()
    eager = copy.deepcopy(ffn)
    for _ in range(3):
        x = torch.randn(40, 48, device=DEVICE)
        fused_ffn(ffn, x).sum().backward()
        eager(x)
    torch.testing.assert_close(ffn.feedback.threshold, eager.feedback.threshold)
    torch.testing.assert_close(ffn.feedback.scale, eager.feedback.scale)


@runs
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_linear_does(x_dtype):
    ffn = build(OPTIONS["default"], 48)
    x = calm(ffn, 45, torch.bfloat16).to(x_dtype)
    dy = torch.randn_like(x)
    exact = copy.deepcopy(ffn).double()
    expected = gradients(exact, exact, x.double(), dy.double())

    def autocast(function):
        def run(x):
            with torch.autocast(DEVICE, torch.bfloat16):
                return function(x)

        return run

    found = gradients(ffn, autocast(lambda x: fused_ffn(ffn, x)), x, dy)
    eager = errors(gradients(ffn, autocast(ffn), x, dy), expected)
    assert found["output"].dtype == torch.bfloat16
    assert found["x"].dtype == x_dtype
    assert all(p.grad.dtype == torch.float32 for p in ffn.parameters())
    fused = errors(found, expected)
    limit = {name: max(2e-2, eager[name]) for name in fused}
    limit["feedback.score"] = 4e-2  # of a dozen selected tokens, as above
    assert {name: e for name, e in fused.items() if e > limit[name]} == {}


@runs
@pytest.mark.parametrize("options", ["paper", "default", "factored"])
def test_compiles_and_checkpoints_without_a_difference(options):
    torch._dynamo.reset()
    ffn = build(OPTIONS[options], 48)
    x = torch.randn(3, 7, 48, device=DEVICE)
    compiled = torch.compile(
        lambda x: fused_ffn(ffn, x).square(), backend="aot_eager", fullgraph=True
    )

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(
            lambda x: fused_ffn(ffn, x).square(), x, use_reentrant=False
        )

    plain = gradients(ffn, lambda x: fused_ffn(ffn, x).square(), x, x)
    for other in (compiled, checkpointed):
        found = gradients(ffn, other, x, x)
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, msg=name)


@runs
def test_training_compiles_with_feedback():
    torch._dynamo.reset()
    ffn = build(OPTIONS["feedback"], 48).train()
    plain = copy.deepcopy(ffn)
    compiled = torch.compile(lambda x: fused_ffn(ffn, x), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(21, 48, device=DEVICE)
        torch.testing.assert_close(compiled(x), fused_ffn(plain, x))
    torch.testing.assert_close(ffn.feedback.threshold, plain.feedback.threshold)


@runs
@pytest.mark.parametrize("options", ["paper", "default"])
def test_the_operators_keep_torchs_rules(options):
    from sparse_gpt.ffn.kernels import fused

    ffn = build(OPTIONS[options], 48)
    x = torch.randn(5, 48, device=DEVICE, requires_grad=True)
    arguments = fused.arguments(ffn, x)
    torch.library.opcheck(torch.ops.sparse_gpt.ffn_forward, arguments)
    with torch.no_grad():
        y, stats = torch.ops.sparse_gpt.ffn_forward(*arguments)
    _, parameters, constants, spec = arguments
    parameters = [p.detach() for p in parameters]
    torch.library.opcheck(
        torch.ops.sparse_gpt.ffn_backward,
        (y, x.detach(), stats, parameters, constants, spec),
        test_utils=("test_schema", "test_faketensor"),
    )


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["paper", "default", "factored"])
def test_backward_keeps_x_and_a_few_floats_a_token(options, dtype):
    ffn = build(OPTIONS[options], 64, dtype).train()
    own = {t.data_ptr() for t in [*ffn.parameters(), *ffn.buffers()]}
    x = torch.randn(50, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_ffn(ffn, x)
    assert sum(kept.values()) == x.nbytes + 50 * 28


@runs
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flops_equal_the_formulas(options):
    ffn = build(options, 48)
    x = torch.randn(2, 5, 48, device=DEVICE, requires_grad=True)
    total = count_flops(ffn, batch=2, seq=5).total
    with FlopCounterMode(display=False) as counter:
        y = fused_ffn(ffn, x)
    assert counter.get_total_flops() == total.matmul
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (total.matmul - total.fixed) + total.fixed


@runs
def test_parameters_are_those_of_the_module():
    from sparse_gpt.ffn.kernels import fused

    for options in OPTIONS.values():
        ffn = build(options, 48)
        assert sorted(fused._spec(ffn).names) == sorted(dict(ffn.named_parameters()))
        assert fused._parse(fused._spec(ffn).text()) == fused._spec(ffn)


@pytest.mark.parametrize(
    ("options", "d", "line"),
    [
        ({}, 4112, "d_model 4112: kernels need a multiple of 16 up to 4096"),
        ({"polynomial": {"group_size": 8}}, 24, "d_model 24: kernels need a multiple of 16"),
        ({"polynomial": {"group_size": 8}}, 64, "polynomial.group_size 8: kernels need 16, 32"),
        ({"spectral": {"factors": (2, 512)}}, 1024, "spectral.factors (2, 512): kernels need"),
        ({"feedback": {"groups": 1}}, 1024, "feedback.groups 1: 1024 channels a group, not 512"),
        ({"feedback": {"rank": 65}}, 128, "feedback.rank 65: kernels need at most 64"),
    ],
    ids=str,
)
def test_unsupported_names_the_value(options, d, line):
    config = SparseFFNConfig(**options)
    assert unsupported(config, d).startswith(line)
    ffn = UltraEfficientSparseFFN(d, config=config)
    with pytest.raises(ValueError, match=r"^fused_ffn: ") as error:
        fused_ffn(ffn, torch.randn(1, d))
    assert line in str(error.value)


def test_supported_presets_and_devices(monkeypatch):
    for d in (16, 128, 768, 1024, 1280, 1600, 4096):
        assert unsupported(SparseFFNConfig(), d) is None
    assert available("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available("cpu")
    with pytest.raises(ValueError, match="fused_ffn: no kernels for device cpu"):
        fused_ffn(UltraEfficientSparseFFN(64), torch.randn(1, 64))


@runs
def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"dtype torch.float64 has no kernels"):
        fused_ffn(UltraEfficientSparseFFN(64).double(), torch.randn(1, 64).double())


def test_importing_the_package_leaves_triton_alone():
    code = "import sys, sparse_gpt, sparse_gpt.ffn.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
