"""Inductor's kernels for a block are made, down to machine code, for GPUs that are not here.

A block is traced on the CPU; its graphs are then said to be of a GPU and handed to Inductor, which
is told of the GPU's properties and is kept from loading what Triton and ptxas made. That they are
right only a GPU can say.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses import FakeTensorMode
from torch.utils import _triton
from torch.utils._pytree import tree_map

from sparse_gpt import DenseBlock, ModelConfig, SparseBlock

GPU = torch.device("cuda", 0)
# Its pass asks what comes of a copy, which without a GPU cannot even be asked: a tensor like `out`.
REINPLACE = "torch._inductor.fx_passes.reinplace"


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled_for(request: pytest.FixtureRequest) -> Iterator[tuple[int, list[Any]]]:
    """Inductor takes this machine for one with such a GPU; the architecture, and the kernels made
    so far."""
    driver = pytest.importorskip("triton.runtime").driver
    compiler = pytest.importorskip("triton.backends.compiler")
    from torch._inductor import config
    from torch._inductor.runtime.hints import DeviceProperties

    def always(value: Any) -> Any:
        return lambda *_, **__: value

    def clear() -> None:
        for cached in (
            DeviceProperties.create,
            _triton.triton_backend,
            _triton.triton_hash_with_backend,
        ):
            cached.cache_clear()

    architecture, kernels = request.param, []
    properties = SimpleNamespace(
        name="a GPU",
        major=architecture // 10,
        minor=architecture % 10,
        total_memory=80 << 30,
        multi_processor_count=108,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block_optin=166_912,
        gcnArchName="",
    )
    about = {
        "get_device_properties": always(properties),
        "current_device": always(0),
        "get_compute_capability": always(architecture),
        "is_available": always(True),
        "is_bf16_supported": always(True),
    }
    capability = always((properties.major, properties.minor))
    target = compiler.GPUTarget("cuda", architecture, 32)
    of_triton = {"get_current_target": always(target), "get_current_device": always(0)}
    heuristics = "torch._inductor.runtime.triton_heuristics.CachingAutotuner"
    with ExitStack() as stack:
        for patch in (
            *(mock.patch.object(CudaInterface, *pair) for pair in about.items()),
            *(mock.patch.object(CudaInterface.Worker, *pair) for pair in list(about.items())[:2]),
            mock.patch("torch.cuda.get_device_properties", always(properties)),
            mock.patch("torch.cuda.get_device_capability", capability),
            mock.patch("torch.cuda.current_device", always(0)),
            mock.patch("torch.cuda.device_count", always(1)),
            mock.patch("torch.cuda._lazy_init", always(None)),
            mock.patch("torch.version.cuda", "12.8"),
            mock.patch("torch._C._cuda_getCurrentRawStream", always(0), create=True),
            mock.patch("torch._inductor.scheduler.has_triton", always(True)),
            mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", always(None)),
            mock.patch(f"{REINPLACE}._inplace_generalized_scatter", lambda out, *_: out),
            mock.patch(f"{heuristics}._make_launchers", lambda kernel: kernels.append(kernel)),
            mock.patch.object(driver, "_active", SimpleNamespace(**of_triton)),
            config.patch(
                compile_threads=1, force_disable_caches=True, use_static_cuda_launcher=False
            ),
        ):
            stack.enter_context(patch)
        clear()
        yield architecture, kernels
    clear()


def graphs_of(block: torch.nn.Module, x: torch.Tensor) -> list[tuple[Any, list[Any]]]:
    """Forward and backward, with examples of their inputs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    found = []

    def noted(graph: Any, inputs: list[Any]) -> Any:
        found.append((copy.deepcopy(graph), inputs))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=noted, bw_compiler=noted, decompositions=select_decomp_table()
    )
    run = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
    run(x).sum().backward()
    return found


def on_gpu(value: Any) -> Any:
    """A tensor as one of a GPU, without values."""
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = ([int(n) for n in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(shape, stride, dtype=value.dtype, device=GPU)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ffn", ["dense", "light", "default"])
def test_a_blocks_kernels_are_made_for_gpus(compiled_for, ffn, dtype):
    from torch._inductor.compile_fx import compile_fx_inner

    architecture, kernels = compiled_for
    config = ModelConfig.preset("tiny", ffn=ffn)
    block = (DenseBlock if ffn == "dense" else SparseBlock)(config).to(dtype)
    graphs = graphs_of(block, torch.randn(4, 128, 128, dtype=dtype, requires_grad=True))
    assert len(graphs) == 2
    gpu = FakeTensorMode()
    for backward, (graph, inputs) in enumerate(graphs):
        before = len(kernels)
        with gpu:
            for node in graph.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = tree_map(on_gpu, node.meta["val"])
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": GPU}
            examples = [on_gpu(value) for value in inputs]
        graph.recompile()
        compile_fx_inner(graph, examples, is_backward=bool(backward))
        assert len(kernels) > before
    for kernel in kernels:
        for result in kernel.compile_results:
            assert f".target sm_{architecture}" in result.kernel.asm["ptx"]
            assert result.kernel.asm["cubin"][:4] == b"\x7fELF"
