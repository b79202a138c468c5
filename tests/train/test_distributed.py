import os
from unittest.mock import patch

import pytest
from ranks import run_on_ranks

from sparse_gpt.train.distributed import _first_host, lost_peer, read_environment


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


def test_by_hand_this_is_the_only_rank():
    with patch.dict(os.environ, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, clear=True):
        assert read_environment() == (0, 0, 1)
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
        assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_what_a_launcher_sets_is_taken():
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "9"}
    with patch.dict(os.environ, given, clear=True):
        assert read_environment() == (3, 1, 4)


TALKING = """
import os, sys, time, torch
import torch.distributed as dist
from pathlib import Path
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.distributed import join_world, limit_waiting, lost_peer

world, done = join_world(), Path(sys.argv[1])
value = torch.tensor([1.0, 10.0]) * (world.rank + 1)
asked = []
print(world.sum(value).tolist(), world.mean(value).tolist(), value.tolist())
print(world.from_rank_0(lambda: asked.append(world.rank) or {"of": world.rank}), asked, flush=True)
try:
    world.from_rank_0(Path("/no/such/file").read_text)
except ConfigError as error:
    print(error, flush=True)
limit_waiting(0.5)
if world.rank == 0:  # waits for the other in vain, and says so
    try:
        dist.all_reduce(value)
    except Exception as error:
        print(lost_peer(error), flush=True)
    done.touch()
while not done.exists():
    time.sleep(0.01)
os._exit(0)
"""


def test_ranks_talk_and_say_when_one_is_silent(tmp_path):
    first, second = run_on_ranks(TALKING, tmp_path / "done")
    numbers, found, refused, lost = first.splitlines()
    assert numbers == "[3.0, 30.0] [1.5, 15.0] [1.0, 10.0]"
    assert found == "{'of': 0} [0]"
    assert refused == "/no/such/file: No such file or directory"
    assert lost.startswith("rank 0 on ")
    assert "another rank is lost or hangs (" in lost
    assert second.splitlines() == ["[3.0, 30.0] [1.5, 15.0] [2.0, 20.0]", "{'of': 0} []", refused]


def test_other_errors_are_no_lost_peer():
    assert lost_peer(RuntimeError("shapes differ")) is None
    assert lost_peer(OSError("No space left on device")) is None
