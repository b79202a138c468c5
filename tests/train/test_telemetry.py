"""What a run says of itself."""

from pathlib import Path

from ranks import exact, finish, metrics, start_ranks


def test_a_disk_that_stalls_is_waited_for_and_told_of(run_file, tmp_path):
    whole, slow = tmp_path / "whole", tmp_path / "slow"
    finish(start_ranks(run_file, f"run_dir={whole}", world_size=1))
    script = Path(__file__).with_name("slow_disk_train.py")
    finish(start_ranks(run_file, f"run_dir={slow}", world_size=1, script=script))
    assert exact(slow) == exact(whole)
    waits = [row.get("perf/data_wait_ms", 0) for row in metrics(slow)]
    assert waits[10] >= 200
    assert sorted(waits)[len(waits) // 2] < 200
