"""What data sheets say of GPUs, and what one that is here does."""

import re
import time
from dataclasses import dataclass

import psutil
import torch

PCIE_4 = 32e9
"""Bytes/s a direction of 16 lanes."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says: a pattern of torch's whole name for it, memory, dense half-precision
    peak, and how fast it is linked to the others of its node."""

    torch_name: str
    memory: int  # bytes that a process can have
    peak_flops: float  # FLOP/s of the tensor cores in bf16 and fp16, without sparsity
    link: float  # bytes/s a direction: NVLink, or PCIe where there is none


# Peaks and links from the vendors' data sheets (the RTX 4090's from appendix A of NVIDIA's "Ada GPU
# Architecture", sums in fp32; the B200's from that of the HGX B200; the MI300X's from AMD's, its
# link Infinity Fabric), memory less what the driver keeps. A device that is not here gets no MFU,
# nor one that only shares the beginning of a name, as a MIG slice: a guess would look measured.
_A100 = "NVIDIA A100[- ](SXM4|PCIE|80GB)[- ](40GB|80GB|PCIe)"
GPUS = {
    "A100-40GB": Gpu(_A100, 39 * 2**30, 312e12, 300e9),
    "A100-80GB": Gpu(_A100, 79 * 2**30, 312e12, 300e9),
    "H100-PCIe": Gpu("NVIDIA H100 PCIe", 79 * 2**30, 756e12, 64e9),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 79 * 2**30, 989e12, 450e9),  # SXM
    "H200": Gpu("NVIDIA H200", 139 * 2**30, 989e12, 450e9),
    "B200": Gpu("NVIDIA B200", 178 * 2**30, 2250e12, 900e9),
    "L40S": Gpu("NVIDIA L40S", 44 * 2**30, 362e12, PCIE_4),
    "RTX-4090": Gpu("NVIDIA GeForce RTX 4090", 23 * 2**30, 165.2e12, PCIE_4),
    "MI300X": Gpu("AMD Instinct MI300X( OAM)?", 191 * 2**30, 1307.4e12, 448e9),
}


def known_gpu(torch_name: str) -> Gpu | None:
    """The device that torch calls so, or its like with more memory; None if it is not in the
    table."""
    known = (gpu for gpu in GPUS.values() if re.fullmatch(gpu.torch_name, torch_name))
    return next(known, None)


def measured_gpu() -> Gpu:
    """The first GPU of this machine in bf16, or its CPU in fp32 where there is none: its name, its
    memory, and for a peak what its fastest matrix products reach in a second."""
    if torch.cuda.is_available():
        device, memory = torch.device("cuda"), torch.cuda.get_device_properties(0).total_memory
        peak = _fastest_product(torch.randn(8192, 8192, dtype=torch.bfloat16, device=device))
        return Gpu(torch.cuda.get_device_name(0), memory, peak, PCIE_4)
    memory = psutil.virtual_memory().total
    return Gpu("this CPU", memory, _fastest_product(torch.randn(1024, 1024)), PCIE_4)


def _fastest_product(matrix: torch.Tensor) -> float:
    """FLOP/s of the best of a second's products of a square matrix with itself."""
    flops, fastest, end = 2 * len(matrix) ** 3, 0.0, time.monotonic() + 1
    while time.monotonic() < end:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the GPU
        fastest = max(fastest, flops / (time.perf_counter() - start))
    return fastest
