#!/usr/bin/env python3
"""Kills what makes a file or a folder of its own, at random moments, and runs it again.

    python scripts/studies/chaos_commands.py               10 moments of each command
    python scripts/studies/chaos_commands.py --moments 1

Then four start at once for one place. Exit status 1: what has the name is not whole, the next is
not as if nothing had happened, or something else was left.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from sparse_gpt import data

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
CONFIG = {
    "model": {"preset": "tiny", "d_model": 32, "n_layer": 2, "n_head": 2, "max_seq_len": 32},
    "batch": {"global_tokens": 512, "micro_batch": 4},
    "duration": {"steps": 2},
    "optimizer": {"lr": 1e-3},
}


def commands(folder: Path) -> dict[str, list[str]]:
    """What is killed, to be followed by where to write; and what it reads, made."""
    novels = sorted(map(str, (ROOT / "data/novels").glob("*.txt")))
    shards, tokens, run = folder / "shards", folder / "tokens", folder / "run"
    data.prepare(novels, shards, separator="\nChapter ", held_out=0.1)
    data.export_shards(shards, "nanogpt", tokens)
    config = {**CONFIG, "data": {"path": str(shards)}, "run_dir": str(run)}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    rank = [sys.executable, "-m", "sparse_gpt.train", "--config", str(folder / "run.yaml")]
    subprocess.run(rank, env=ENVIRONMENT, check=True, capture_output=True)
    chapters = ["--separator", "\\nChapter ", "--held-out", "0.1"]
    return {
        "shards export": ["shards", "export", str(shards), "--format", "nanogpt", "--out"],
        "shards import": ["shards", "import", f"{tokens}/train.bin", "--format=nanogpt", "--out"],
        "prepare": ["prepare", *novels, *chapters, "--out"],
        "vocab train": ["vocab", "train", *novels, *chapters, "--size", "2000", "--out"],
        "export": ["export", str(run), "--out"],
    }


def kill(
    name: str, command: list[str], folder: Path, moments: int, rng: random.Random
) -> list[str]:
    """Complaints about one command, killed and raced."""
    whole, complaints = folder / "whole/out", []
    whole.parent.mkdir(parents=True)
    started = time.monotonic()
    subprocess.run([*command, whole], env=ENVIRONMENT, capture_output=True, check=True)
    seconds, expected = time.monotonic() - started, content(whole)
    for moment in range(moments):
        out = folder / str(moment) / "out"
        out.parent.mkdir()
        wait = seconds * rng.uniform(0.4, 1)  # before, it imports what it needs
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, out], env=ENVIRONMENT, capture_output=True, timeout=wait)
        # `prepare` fills its folder in sight, and the manifest, which comes last, makes it shards.
        named = (out / "manifest.json").exists() if name == "prepare" else out.exists()
        if named and content(out) != expected:
            complaints.append(f"{name}: half of it has the name, killed after {wait:.1f} s")
        if not named:
            again = subprocess.run([*command, out], env=ENVIRONMENT, capture_output=True, text=True)
            if again.returncode or content(out) != expected:
                said = again.stderr.strip()[-500:]
                complaints.append(f"{name}: killed after {wait:.1f} s, then not whole: {said}")
        complaints += strangers(name, out)
    return complaints + race(name, command, folder / "race/out", expected)


def race(name: str, command: list[str], out: Path, expected: dict[str, bytes]) -> list[str]:
    """Complaints where four processes make one thing."""
    out.parent.mkdir()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    four = [subprocess.Popen([*command, out], env=ENVIRONMENT, **pipes) for _ in range(4)]
    said = [process.communicate()[1].decode().strip() for process in four]
    ends = [(process.returncode, text) for process, text in zip(four, said, strict=True)]
    complaints = [
        f"{name}: of four at once one ended with {code}: {text[-500:]}"
        for code, text in ends
        if code not in (0, 2) or (code == 2 and len(text.splitlines()) != 1)
    ]
    if not any(code == 0 for code, _ in ends) or content(out) != expected:
        complaints.append(f"{name}: of four at once none made it whole")
    return complaints + strangers(name, out)


def strangers(name: str, out: Path) -> list[str]:
    left = [path.name for path in out.parent.iterdir() if path != out]
    return [f"{name}: left {left}"] if left else []


def content(out: Path) -> dict[str, bytes]:
    """The files of a folder, or a file."""
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    complaints = []
    with TemporaryDirectory(prefix="chaos-") as folder:
        for name, words in commands(Path(folder)).items():
            command = [sys.executable, "-m", "sparse_gpt", *words]
            found = kill(name, command, Path(folder) / "of" / name, options.moments, rng)
            print(f"{name}: {len(found)} complaints", flush=True)
            complaints += found
    print("\n".join(complaints))
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
