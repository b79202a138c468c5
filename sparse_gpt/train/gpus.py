"""What data sheets say of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says: how torch's name for it begins, memory, dense half-precision peak,
    and how fast it is linked to the others of its node."""

    torch_name: str
    memory: int  # bytes that a process can have
    peak_flops: float  # FLOP/s of the tensor cores in bf16 and fp16
    link: float  # bytes/s a direction: NVLink, or PCIe where there is none


# From NVIDIA's data sheets, memory less what the driver keeps. A device that is not here gets no
# MFU: a guess would look like a measurement.
GPUS = {
    "A100-40GB": Gpu("NVIDIA A100", 39 * 2**30, 312e12, 300e9),
    "A100-80GB": Gpu("NVIDIA A100", 79 * 2**30, 312e12, 300e9),
    "H100-PCIe": Gpu("NVIDIA H100 PCIe", 79 * 2**30, 756e12, 64e9),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 79 * 2**30, 989e12, 450e9),
    "H200": Gpu("NVIDIA H200", 139 * 2**30, 989e12, 450e9),
    "B200": Gpu("NVIDIA B200", 178 * 2**30, 2250e12, 900e9),
    "L40S": Gpu("NVIDIA L40S", 44 * 2**30, 362e12, 32e9),
}
