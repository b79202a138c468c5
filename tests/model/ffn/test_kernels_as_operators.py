"""The fused path as torch and callers see it: its operators, what they keep, what is refused."""

import copy
import subprocess
import sys

import pytest
import torch
from kernel_cases import DEVICE, OPTIONS, build, gradients, runs
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt import SparseFFNConfig, UltraEfficientSparseFFN, count_flops
from sparse_gpt.model.ffn.kernels import available, fused_ffn, unsupported


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
    from sparse_gpt.model.ffn.kernels import fused

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
    from sparse_gpt.model.ffn.kernels import fused

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
    code = "import sys, sparse_gpt, sparse_gpt.model.ffn.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
