"""Ranks that are not of one mind do not start."""

from dataclasses import replace

from ranks import start_ranks

from sparse_gpt.config.load import load_config
from sparse_gpt.train.preflight import facts_here, full_disk, odd_one_out


def test_the_odd_host_out_is_named(run_file):
    config = load_config(run_file)
    usual = replace(facts_here(config, "d1"), host="a")
    odd = replace(usual, host="b", alike={**usual.alike, "torch": "1.0"})
    assert odd_one_out([usual, usual, usual]) is None
    for facts, rank in (([usual, usual, odd], 2), ([odd, usual, usual], 0), ([usual, odd], 1)):
        line = odd_one_out(facts)
        assert line.startswith(f"b: rank {rank} has another torch: 1.0, where ")
    other_data = replace(usual, alike=facts_here(config, "d2").alike)
    assert "rank 1 has another data: d2" in odd_one_out([usual, other_data, usual])


def test_a_disk_that_takes_no_checkpoint_is_named(run_file):
    usual = facts_here(load_config(run_file), "d1")
    full = replace(usual, host="b", disk_free=1_100_000_000)
    assert full_disk([usual, full], "runs/r", parameters=90_000_000) is None
    assert full_disk([usual, full], "runs/r", parameters=100_000_000) == (
        "run_dir: runs/r has 1.10 GB free on b (rank 1), one checkpoint takes 1.20 GB; "
        "free some, or move it"
    )


def test_ranks_of_two_configurations_do_not_start(run_file):
    """And nothing of a run is written."""
    ranks = start_ranks(run_file, odd=["seed=1"])
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "rank 1 has another configuration" in outputs[0]
    assert not (run_file.parent / "run/config.yaml").exists()
