#!/usr/bin/env python3
"""Kills a run again and again, at random moments and in random ways, and looks at what is left.

    python scripts/studies/chaos.py                     50 kills in 300 steps, 1 or 2 ranks
    python scripts/studies/chaos.py --ranks 2           always 2 ranks: must end equal to the bit
    python scripts/studies/chaos.py --kills 4 --steps 40 --json chaos.json

The ways: SIGKILL of a rank, of the launcher, of all processes; SIGTERM; SIGSTOP of a rank, for a
second or for good; a second process on the same run; a clock that jumps back a day (where there is
a C compiler); the run's folder moved away, or read-only (as root); a full disk (where a small one
can be mounted: as root); a bit flipped in the newest checkpoint. Half of the kills wait for a
checkpoint to be in the writing. Each life of the run has a random number of ranks.

Exit status 1: a process was left behind, or listened beyond this machine; a batch was lost or seen
twice; the losses are not those of a run that nobody disturbed (equal to the bit on equal ranks,
else within 1%); or a life ended in another way than it should, or without its one line.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import psutil
import yaml
from rich.console import Console

from sparse_gpt import data
from sparse_gpt.provenance import provenance
from sparse_gpt.train.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
GONE_WITHIN = 90.0  # seconds after a kill in which every process must have ended
SILENT = 20  # seconds after which a rank that says nothing is lost
CONFIG = {
    "model": {
        "preset": "tiny",
        "ffn": {"preset": "default", "feedback": {}},
        "d_model": 32,
        "n_layer": 2,
        "n_head": 2,
        "max_seq_len": 32,
    },
    "batch": {"global_tokens": 512, "micro_batch": 4},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_steps": 20},
    "eval": {"every": 100, "max_tokens": 1024},
    "log": {"batch_hash": True},
    "checkpoint": {"every": 3},
    "fault": {"timeout_seconds": SILENT},
}


class Chaos:
    """The run under attack."""

    def __init__(self, config: Path, run_dir: Path, ranks: list[int], rng: random.Random) -> None:
        self.config, self.run_dir, self.ranks, self.rng = config, run_dir, ranks, rng
        self.log = config.with_suffix(".log")
        self.complaints: list[str] = []
        self.environment = ENVIRONMENT
        # What is done, and the exit code and words with which the run must end for it.
        self.ways: dict[str, Callable[[psutil.Process], tuple[int, str] | None]] = {
            "SIGKILL of a rank": lambda launcher: self._pick_rank(launcher).kill(),
            "SIGKILL of the launcher": lambda launcher: launcher.kill(),
            "SIGKILL of all": self._kill_all,
            "SIGTERM": lambda launcher: launcher.terminate(),
            "SIGSTOP of a rank, then SIGCONT": self._stop_a_while,
            "SIGSTOP of a rank": self._stop,
            "a second process": self._start_another,
            "the folder moved away": self._move_away,
            "a bit flipped": self._flip_a_bit,
        }
        if os.path.ismount(run_dir.parent):
            self.ways["full disk"] = self._fill_the_disk
        if os.geteuid() == 0 and shutil.which("chattr"):
            self.ways["the folder read-only"] = self._make_read_only
        if compiler := shutil.which("cc"):
            clock, self.back = config.with_name("clock.so"), config.with_name("back")
            source = Path(__file__).with_name("clock.c")
            subprocess.run([compiler, "-shared", "-fPIC", source, "-o", clock], check=True)
            preloaded = {"LD_PRELOAD": str(clock), "CLOCK_BACK": str(self.back)}
            self.environment = {**ENVIRONMENT, **preloaded}
            self.ways["the clock jumps back"] = self._turn_back_the_clock
        self._deck: list[str] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sparse_gpt", "train", str(self.config)]
        command += ["--devices", str(self.rng.choice(self.ranks)), f"run_dir={self.run_dir}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=ROOT)

    def step(self) -> int:
        rows = read_metrics(self.run_dir)
        return rows[-1]["step"] if rows else 0

    def strike(self) -> tuple[str, bool, int, int] | None:
        """One life and its end: (way, while writing, step, processes left); None if it finished."""
        process = self.start()
        if not self._deck:  # each way comes once before any comes again
            self._deck = self.rng.sample(list(self.ways), len(self.ways))
        way = self._deck.pop()
        writing = self.rng.random() < 0.5
        record, leftovers = self._inodes("metrics.jsonl"), self._inodes("checkpoints/.tmp-step-*")
        while self._inodes("metrics.jsonl") == record and process.poll() is None:
            time.sleep(0.005)  # until this life has opened the record
        goal = self.step() + self.rng.randint(0, 9)
        while process.poll() is None:
            there = self.step() >= goal
            if there and (not writing or self._inodes("checkpoints/.tmp-step-*") - leftovers):
                break
            time.sleep(0.002)
        else:
            if process.returncode:
                self.fail(process.returncode)
            return None
        step, said = self.step(), self.log.stat().st_size
        self._look_what_listens()
        expected = self.ways[way](psutil.Process(process.pid))
        deadline = time.monotonic() + GONE_WITHIN
        while (left := self._processes()) and time.monotonic() < deadline:
            process.poll()  # a dead child would count until it is waited for
            time.sleep(0.05)
        for orphan in left:
            orphan.kill()
        code = process.wait()
        heard = self.log.read_bytes()[said:].decode()
        if expected and (code != expected[0] or expected[1] not in heard):
            self.complaints.append(f"{way}, step {step}: ended with {code}, not {expected}")
        self._give_back()
        return way, writing, step, len(left)

    def fail(self, code: int) -> NoReturn:
        """End, with the last lines that the run has said."""
        said = "\n".join(self.log.read_text().splitlines()[-20:])
        sys.exit(f"{said}\nthe run ended by itself with exit code {code}")

    def _inodes(self, pattern: str) -> set[int]:
        found = set()
        for path in self.run_dir.glob(pattern):
            with suppress(FileNotFoundError):
                found.add(path.stat().st_ino)
        return found

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if f"run_dir={self.run_dir}" in (process.info["cmdline"] or []):
                found.append(process)
        return found

    def _pick_rank(self, launcher: psutil.Process) -> psutil.Process:
        return self.rng.choice(self._ranks() or [launcher])

    def _ranks(self) -> list[psutil.Process]:
        return [p for p in self._processes() if "--local_rank=" in " ".join(p.info["cmdline"])]

    def _until_step(self, more: int, launcher: psutil.Process) -> None:
        goal = self.step() + more
        while self.step() < goal and launcher.is_running() and launcher.status() != "zombie":
            time.sleep(0.01)

    def _look_what_listens(self) -> None:
        """Ranks do, on this machine alone: rank 0 where they meet, each where gloo's groups do."""
        for process in self._processes():
            with suppress(psutil.Error):
                words, sockets = " ".join(process.cmdline()), process.net_connections()
                heard = [one.laddr for one in sockets if one.status == psutil.CONN_LISTEN]
                may = {"127.0.0.1"} if "--local_rank=" in words else set()
                if {one.ip for one in heard} - may:
                    self.complaints.append(f"{words} listens on {heard}")

    def _stop_a_while(self, launcher: psutil.Process) -> None:
        rank = self._pick_rank(launcher)
        rank.suspend()
        time.sleep(1)
        rank.resume()
        self._until_step(2, launcher)
        self._kill_all(launcher)

    def _stop(self, launcher: psutil.Process) -> tuple[int, str] | None:
        if len(self._ranks()) == 1:  # nobody waits for it
            self._kill_all(launcher)
            return None
        self._pick_rank(launcher).suspend()
        return 1, "another rank is lost or hangs"

    def _start_another(self, launcher: psutil.Process) -> None:
        said = self.log.stat().st_size
        code = self.start().wait()
        if code != 2 or b"another process trains this" not in self.log.read_bytes()[said:]:
            self.complaints.append("a second process was not refused")
        self._kill_all(launcher)

    def _move_away(self, _: psutil.Process) -> tuple[int, str]:
        self.run_dir.rename(self.run_dir.with_name("moved"))
        return 2, "nothing more can be kept there"

    def _make_read_only(self, _: psutil.Process) -> tuple[int, str]:
        folders = [self.run_dir, self.run_dir / "checkpoints"]
        folders[1].mkdir(exist_ok=True)
        subprocess.run(["chattr", "-f", "+i", *folders], check=True)
        return 2, "nothing more can be kept there"

    def _give_back(self) -> None:
        """The folder, where it was taken away."""
        moved = self.run_dir.with_name("moved")
        if moved.exists():
            if self.run_dir.exists():
                self.complaints.append("a folder was made anew where one was moved away")
                shutil.rmtree(self.run_dir)
            moved.rename(self.run_dir)
        if "the folder read-only" in self.ways:
            subprocess.run(["chattr", "-f", "-R", "-i", self.run_dir])

    def _turn_back_the_clock(self, launcher: psutil.Process) -> None:
        with self.back.open("ab") as days:
            days.write(b".")
        self._until_step(4, launcher)  # past a checkpoint
        self._kill_all(launcher)

    def _kill_all(self, _: psutil.Process) -> None:
        for process in self._processes():
            process.kill()

    def _flip_a_bit(self, launcher: psutil.Process) -> None:
        self._kill_all(launcher)
        tags = sorted((self.run_dir / "checkpoints").glob("step-*"))
        if not tags:
            return
        victim = self.rng.choice([path for path in tags[-1].iterdir() if path.stat().st_size])
        with victim.open("r+b") as file:
            file.seek(self.rng.randrange(victim.stat().st_size))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << self.rng.randrange(8)]))

    def _fill_the_disk(self, launcher: psutil.Process) -> None:
        filler = self.run_dir.parent / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
        time.sleep(self.rng.uniform(0, 3))
        self._kill_all(launcher)
        filler.unlink()


def verdict(whole: Path, attacked: Path, exact: bool) -> tuple[dict[str, object], list[str]]:
    """What differs between the record of the run and that of an undisturbed one, and complaints."""
    a, b = read_metrics(whole), read_metrics(attacked)
    complaints = []
    if [row["step"] for row in a] != [row["step"] for row in b]:
        complaints.append("steps are missing or there twice")
    if [row.get("data/batch_hash") for row in a] != [row.get("data/batch_hash") for row in b]:
        complaints.append("batches were lost, seen twice or in another order")
    pairs = [(x["train/loss"], y["train/loss"]) for x, y in zip(a[1:], b[1:], strict=False)]
    largest = max(abs(x - y) / x for x, y in pairs)
    if largest > (0 if exact else 0.01):
        complaints.append("losses are not those of an undisturbed run")
    found = {"final_loss": b[-1]["train/loss"], "undisturbed_loss": a[-1]["train/loss"]}
    return {**found, "largest_relative_difference": largest}, complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="drawn for each life")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write what happened here")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    console = Console(highlight=False)

    with TemporaryDirectory(prefix="chaos-") as folder:
        shards, disk = Path(folder) / "shards", Path(folder) / "disk"
        novels = sorted(map(str, (ROOT / "data/novels").glob("*.txt")))
        data.prepare(novels, shards, separator="\nChapter ", held_out=0.1, progress=False)
        config = Path(folder) / "chaos.yaml"
        settings = {"data": {"path": str(shards)}, "duration": {"steps": options.steps}}
        config.write_text(yaml.safe_dump({**CONFIG, **settings}))
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        if not mounted:
            console.print("no small disk can be mounted here: no disk will be full")
        try:
            exact = len(set(options.ranks)) == 1
            whole = Chaos(config, disk / "whole", [max(options.ranks)], rng)
            if code := whole.start().wait():
                whole.fail(code)
            chaos = Chaos(config, disk / "attacked", options.ranks, rng)
            strikes = []
            while len(strikes) < options.kills and (strike := chaos.strike()):
                strikes.append(strike)
                way, writing, step, left = strike
                when = " while a checkpoint was written" if writing else ""
                console.print(f"{len(strikes):3} step {step:4}: {way}{when}; {left} left behind")
            if code := chaos.start().wait():
                chaos.fail(code)
            found, complaints = verdict(whole.run_dir, chaos.run_dir, exact)
            complaints += chaos.complaints
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)

    orphans = sum(left for *_, left in strikes)
    if orphans:
        complaints.append(f"{orphans} processes were left behind")
    found = {
        "kills": dict(Counter(way for way, *_ in strikes)),
        "while_writing": sum(writing for _, writing, *_ in strikes),
        "ranks": options.ranks,
        "orphans": orphans,
        **found,
        "complaints": complaints,
    }
    console.print_json(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps({**found, "provenance": provenance()}, indent=1) + "\n")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
