import os
from unittest.mock import patch

import pytest

from sparse_gpt.train.distributed import _first_host, read_environment


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[3,5-7],login", "gpu3"),
        ("login,gpu[3-5]", "login"),
    ],
)
def test_first_host_of_slurms_list(nodelist, host):
    assert _first_host(nodelist) == host


def test_srun_gets_what_it_does_not_set():
    slurm = {"PROCID": 5, "NTASKS": 8, "LOCALID": 1, "JOB_ID": 123456, "JOB_NODELIST": "n[2-5]"}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    with patch.dict(os.environ, environment, clear=True):
        assert read_environment() == (5, 1, 8)
        assert os.environ["MASTER_ADDR"] == "n2"
        assert 1024 < int(os.environ["MASTER_PORT"]) < 65536
