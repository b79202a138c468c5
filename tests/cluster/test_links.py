"""Ranks that `doctor` lets talk."""

import json

import pytest
import torch

from sparse_gpt.cluster import doctor
from sparse_gpt.cluster.links import LinksBroken, _check, talk
from sparse_gpt.train.distributed import World


def test_doctor_lets_ranks_talk(command):
    found = json.loads(command("doctor", "--devices", "2", "--json").stdout)
    [ranks] = [row for row in found if row["what"] == "ranks"]
    assert ranks["status"] == "ok"
    assert ranks["found"].startswith("2 over gloo, 4 MB: all-reduce ")


def test_ranks_that_cannot_meet_are_a_problem_with_what_one_saw(no_gpu, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none-such")
    with pytest.raises(LinksBroken, match=r"rank [01]: .*none-such"):
        talk(2)


def test_a_problem_has_a_fix(no_gpu, monkeypatch):
    def talk(ranks):
        raise LinksBroken(f"{ranks} ranks did not meet")

    monkeypatch.setattr(doctor, "talk", talk)
    [ranks] = [found for found in doctor.examine(2) if found.what == "ranks"]
    assert (ranks.status, ranks.found) == ("problem", "2 ranks did not meet")
    assert ranks.fix


def test_what_arrives_wrong_is_seen(monkeypatch):
    world = World(1, 1, 2, torch.device("cpu"))
    monkeypatch.setattr("torch.distributed.all_to_all_single", lambda out, own: out.copy_(own))
    with pytest.raises(RuntimeError, match=r"all-to-all brought \[2, 3\]"):
        _check(world)
