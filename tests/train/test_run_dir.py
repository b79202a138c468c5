import errno
import fcntl
import subprocess
import sys

import pytest
import torch
from other_file_systems import where_refused
from ranks import ROOT, exact

from sparse_gpt.config.load import load_config
from sparse_gpt.data import open_blend
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checkpoint.manifest import file_hash, tag_of, write_manifest
from sparse_gpt.train.distributed import World
from sparse_gpt.train.feed import open_data
from sparse_gpt.train.run_dir import (
    config_hash,
    finished,
    fork,
    held,
    hold,
    open_run_dir,
    read_provenance,
)


def test_a_held_run_is_refused_until_its_process_ends(tmp_path):
    run_dir = tmp_path / "run"
    assert not held(run_dir)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from sparse_gpt.train.run_dir import hold; "
            "hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            str(run_dir),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    assert held(run_dir)
    with pytest.raises(ConfigError, match="another process trains this run"):
        hold(run_dir)
    holder.kill()
    holder.wait()
    assert not held(run_dir)


def test_a_start_is_added_to_those_before(world, run_file, pair):
    config = load_config(run_file)
    blend, other = open_data(config.data), open_blend({pair[0]: 1})
    folder = open_run_dir(config, world, blend, 0, {"hosts": ["a"]})
    assert folder == run_file.parent / "run"
    assert load_config(folder / "config.yaml") == config
    record = read_provenance(folder)
    assert (record["data_manifest_hash"], record["vocab_hash"]) == (blend.hash, blend.vocab_hash)
    [start] = record["starts"]
    assert (start["step"], start["preflight"]) == (0, {"hosts": ["a"]})
    assert start["hardware"]["world_size"] == 1
    assert start["versions"]["torch"] == torch.__version__

    checkpoint = folder / "checkpoints" / tag_of(8)
    checkpoint.mkdir(parents=True)
    came_from = {"step": 8, "samples": 128, "data_manifest_hash": blend.hash, "files": {}}
    write_manifest(checkpoint, came_from)
    open_run_dir(config, world, other, 8, {})
    record = read_provenance(folder)
    assert [start["step"] for start in record["starts"]] == [0, 8]
    change = {"sample": 128, "from": blend.hash, "to": other.hash}
    assert record["starts"][1]["data_change"] == change
    assert record["data_manifest_hash"] == other.hash


def test_a_longer_run_says_where_the_learning_rate_jumps(world, run_file, capsys):
    blend = open_data(load_config(run_file).data)

    def said(step, *overrides):
        open_run_dir(load_config(run_file, overrides), world, blend, step, {})
        return capsys.readouterr().err

    falls = "schedule={kind: cosine, warmup_steps: 2, final_lr_ratio: 0.1}"
    steady = "schedule={kind: wsd, warmup_steps: 2, decay_fraction: 0.2}"
    assert said(0, falls, "duration.steps=16") == ""
    assert said(16, falls, "duration.steps=16") == ""
    line = said(16, falls, "duration.steps=32")
    assert "the schedule is of 32 steps now, it was of 16: from step 16 on the learning" in line
    assert line.count("\n") == 1
    assert said(0, steady, "duration.steps=16") == ""
    assert said(8, steady, "duration.steps=32") == ""  # as before the fall
    assert "from step 30 on" in said(30, steady, "duration.steps=64")


def test_other_ranks_write_nothing(run_file):
    config = load_config(run_file)
    world = World(1, 1, 2, torch.device("cpu"))
    folder = open_run_dir(config, world, open_data(config.data), 0, {})
    assert not folder.exists()


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["duration.steps=99", "log.every=2", "eval.every=3", "checkpoint.every=7"], True),
        (["run_dir=elsewhere", "fault.timeout_seconds=5", "guard.spike=skip"], True),
        (["batch.micro_batch=8", "deepspeed={zero_optimization: {stage: 3}}"], True),
        (["data.path=moved"], True),  # its hash counts
        (["compile=true"], True),
        (["seed=1"], False),
        (["optimizer.lr=1e-4"], False),
        (["batch.global_tokens=1024"], False),
        (["precision=bf16"], False),
        (["deepspeed={prescale_gradients: true}"], False),
    ],
)
def test_what_computes_another_run_has_another_hash(run_file, overrides, same):
    own, other = load_config(run_file), load_config(run_file, overrides)
    assert (config_hash(own) == config_hash(other)) == same


def test_a_run_is_finished_at_the_last_step_of_this_configuration(run_file):
    config = load_config(run_file)
    assert not finished(config)
    folder = run_file.parent / "run/checkpoints"
    for step in (8, 16):
        (folder / tag_of(step)).mkdir(parents=True)
        (folder / tag_of(step) / "rank-0.pt").touch()
        files = {"rank-0.pt": file_hash(folder / tag_of(step) / "rank-0.pt")}
        write_manifest(folder / tag_of(step), {"step": step, "files": files})
        assert finished(config) == (step == 16)
    assert not finished(load_config(run_file, ["duration.steps=17"]))
    (folder / tag_of(16) / "rank-0.pt").write_bytes(b"other")
    assert not finished(config)
    (folder / tag_of(16) / "rank-0.pt").write_bytes(b"")
    assert finished(config)
    (folder / tag_of(16) / "manifest.json").write_text("{}")
    assert not finished(config)


def test_a_fork_is_the_trunk_as_it_was(train_here, run_file, tmp_path):
    train_here("duration.steps=8")
    trunk, folder = tmp_path / "run", tmp_path / "fork"
    fork(trunk, 4, folder)
    [checkpoint] = (folder / "checkpoints").glob("step-*")
    assert checkpoint.name == tag_of(4)
    for path in checkpoint.iterdir():
        assert path.samefile(trunk / "checkpoints" / tag_of(4) / path.name)  # it takes no room
    assert (folder / "checkpoints/latest").read_text() == tag_of(4)
    assert (folder / "vocab.tiktoken").read_bytes() == (trunk / "vocab.tiktoken").read_bytes()
    assert read_provenance(folder)["forked_from"] == {"run": str(trunk), "step": 4}
    train_here("duration.steps=8", f"run_dir={folder}")
    assert exact(folder) == exact(trunk)
    with pytest.raises(ConfigError, match=r"step-00000005: is not there; the run that forks"):
        fork(trunk, 5, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [None, "", "[1", "nothing"])
def test_a_damaged_provenance_is_refused_in_one_line(train_here, run_file, tmp_path, content):
    train_here("duration.steps=1", f"run_dir={tmp_path / 'run'}")
    path = tmp_path / "run/provenance.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=r"provenance\.json: is missing or damaged"):
        train_here("duration.steps=2", f"run_dir={tmp_path / 'run'}")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: .*file/run cannot be made"):
        hold(tmp_path / "file/run")


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_a_run_that_cannot_be_written_is_not_begun(tmp_path, small_disk, place):
    """Not at its first checkpoint, hours later."""
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(small_disk.folder)
    subprocess.run(["mount", "-o", "remount,ro", small_disk.folder], check=True)
    with pytest.raises(ConfigError, match=f"{place} cannot be made or written: Read-only file"):
        hold(tmp_path / "run")
    path.unlink()
    path.write_text("a file")
    with pytest.raises(ConfigError, match=f"{place} cannot be made or written"):
        hold(tmp_path / "run")
    assert not list(tmp_path.rglob(".lock"))


def test_whether_a_run_is_held_is_known_where_it_cannot_be_written(tmp_path, small_disk):
    (small_disk.folder / ".lock").touch()
    writer = (small_disk.folder / ".lock").open()
    subprocess.run(["mount", "-o", "remount,ro", small_disk.folder], check=True)
    assert not held(small_disk.folder)
    fcntl.flock(writer, fcntl.LOCK_EX)
    assert held(small_disk.folder)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_a_fork_copies_what_cannot_be_linked(tmp_path, error):
    trunk = tmp_path / "trunk"
    (trunk / "checkpoints" / tag_of(8)).mkdir(parents=True)
    (trunk / "checkpoints" / tag_of(8) / "rank-0.pt").write_bytes(b"weights")
    for name in ("config.yaml", "metrics.jsonl"):
        (trunk / name).write_text("")
    (trunk / "provenance.json").write_text('{"data_manifest_hash": "", "starts": [{}]}')
    calls = {"link": error, "linkat": error}
    where_refused(calls, lambda: fork(trunk, 8, tmp_path / "fork"))
    copy = tmp_path / "fork/checkpoints" / tag_of(8) / "rank-0.pt"
    assert (copy.read_bytes(), copy.stat().st_nlink) == (b"weights", 1)
