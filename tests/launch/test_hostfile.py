"""launch/hostfile, as `sparse-gpt train --hostfile` and DeepSpeed read it."""

from deepspeed.launcher.runner import fetch_hostfile
from ranks import ROOT

from sparse_gpt.cluster.hostfile import on_hosts

FILE = ROOT / "launch/hostfile"


def test_both_read_the_same_hosts():
    launch = on_hosts(FILE, ["--config", "run.yaml"])
    assert launch.hosts == ("node1", "node2")
    assert launch.world_size == 16
    assert fetch_hostfile(str(FILE)) == {"node1": 8, "node2": 8}
