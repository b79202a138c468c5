import re

import pytest
import torch

from sparse_gpt.train.distributed import World
from sparse_gpt.train.gpus import GPUS


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", None),  # another H100, whose peak is not here
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of one
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_a_device_has_the_peak_of_its_own_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert World(0, 0, 1, torch.device("cuda", 0)).peak_flops == peak


def test_a_cpu_has_no_peak_that_we_know():
    assert World(0, 0, 1, torch.device("cpu")).peak_flops is None


def test_no_name_is_that_of_gpus_of_two_peaks():
    for gpu in GPUS.values():
        alike = {o.peak_flops for o in GPUS.values() if re.fullmatch(o.torch_name, gpu.torch_name)}
        assert alike <= {gpu.peak_flops}
