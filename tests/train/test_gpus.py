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
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert World(0, 0, 1, torch.device("cuda", 0)).peak_flops == peak


def test_a_cpu_has_no_peak_that_we_know():
    assert World(0, 0, 1, torch.device("cpu")).peak_flops is None


def test_no_name_begins_as_that_of_a_gpu_of_another_peak():
    for gpu in GPUS.values():
        alike = {other.peak_flops for other in GPUS.values() if gpu.torch_name in other.torch_name}
        assert alike == {gpu.peak_flops}
