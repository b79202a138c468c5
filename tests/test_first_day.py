"""A new user's first day, with the wheel in a folder of their own: what each step must say.

150 s of CPU time, on 2 idle cores some 2 minutes.
"""

import bz2
import csv
import gzip
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ranks import ROOT
from wheel import install

NOVELS = ROOT / "data/novels"
RUN = {
    "run_dir": "runs/first",
    "model": {
        "preset": "tiny",
        "ffn": "default",
        "d_model": 32,
        "n_layer": 2,
        "n_head": 2,
        "max_seq_len": 64,
        "vocab_size": 512,
    },
    "data": {"path": "shards/mine"},
    "batch": {"global_tokens": 512, "micro_batch": 8},
    "duration": {"steps": 100},
    "optimizer": {"lr": 4e-3},
    "schedule": {"kind": "wsd", "warmup_steps": 10, "decay_fraction": 0.2},
    "eval": {"every": 50, "max_tokens": 2048},
}


class Terminal:
    """A command on a terminal of its own, of which Ctrl-C is a key."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execvpe(words[0], words, environment)
        self._said = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._fd, 65536):
                self._said += part
        except OSError:  # nobody writes any more
            pass

    @property
    def said(self) -> str:
        """What stands there, without colours and the moves of bars."""
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self._said.decode(errors="replace"))

    def press_ctrl_c(self, when: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not when():
            assert time.monotonic() < deadline, self.said
            assert self._reader.is_alive(), self.said
            time.sleep(0.01)
        os.write(self._fd, b"\x03")

    def end(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._reader.join()
        os.close(self._fd)
        return code


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install(tmp_path_factory)


@pytest.fixture
def home(site, tmp_path):
    """An empty folder with what somebody has collected."""
    home = tmp_path / "home"
    texts = home / "texts/more"
    texts.mkdir(parents=True)
    chapters = (NOVELS / "persuasion.txt").read_text().split("\nChapter ")[1:]
    (home / "texts/Windows.TXT").write_bytes(
        ("\ufeff" + "\nChapter ".join(chapters[:6])).replace("\n", "\r\n").encode()
    )
    lines = [json.dumps({"text": text, "id": place}) for place, text in enumerate(chapters[6:12])]
    (texts / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    array = [{"text": text} for text in chapters[12:16]]
    (texts / "array.json").write_text(json.dumps(array, indent=2))
    with (texts / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["title", "text"])
        writer.writeheader()
        writer.writerows({"title": "", "text": text} for text in chapters[16:20])
    (texts / "note.md.bz2").write_bytes(bz2.compress(chapters[20].encode()))
    (texts / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (home / "texts/.DS_Store").write_bytes(b"\0")
    (texts / "again").symlink_to(home / "texts")
    return home


@pytest.fixture
def typed(site, home):
    """Types a command; returns what it printed. Nothing of this checkout is on its way."""
    environment = {
        "PATH": f"{site / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(site),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "LANG": "C.UTF-8",
    }

    def on_terminal(*words):
        return Terminal(["sparse-gpt", *words], home, environment)

    def typed(*words, code=0):
        done = subprocess.run(
            ["sparse-gpt", *words], cwd=home, env=environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said

    typed.on_terminal = on_terminal
    return typed


def rows(run):
    """Of a record; none where there is none yet."""
    record = run / "metrics.jsonl"
    return record.read_text().count("\n") if record.exists() else 0


@pytest.mark.long
def test_the_first_day(typed, home, site):
    assert str(site) in typed("config", "show", "tiny-sparse")
    said = typed("init", "begun.yaml", "--data", "texts", "--size", "d32")
    assert "steps. Next:" in said
    assert "sparse-gpt prepare texts" in said
    assert "sparse-gpt train begun.yaml" in said
    assert "lr:" in typed("config", "show", "begun.yaml")
    assert "is there already" in typed("init", "begun.yaml", "--data", "texts", code=2)
    split = ("--separator", r"\nChapter ")
    said = typed("vocab", "train", "texts", *split, "--size", "512", "--out", "bpe.tiktoken")
    assert "bpe.tiktoken: 512 ids" in said
    said = typed("prepare", "texts", *split, "--vocab", "bpe.tiktoken", "--out", "shards/mine")
    assert "picture.png" in said
    assert "1 hidden" in said
    shown = json.loads(typed("shards", "info", "shards/mine", "--json"))
    assert shown["train"]["documents"] + shown["held_out"]["documents"] == 21
    assert "Anne" in typed("shards", "show", "shards/mine")
    assert "\r" not in typed("shards", "show", "shards/mine", "--document", "2")

    (home / "first.yaml").write_text(yaml.safe_dump(RUN))
    assert "ZeRO-2" in typed("plan", "first.yaml", "--peak-tflops", "measure")
    run = home / "runs/first"
    terminal = typed.on_terminal("train", "first.yaml")
    terminal.press_ctrl_c(lambda: rows(run) > 8)
    assert terminal.end() == 75, terminal.said
    saved = rows(run)
    assert "Ctrl-C again ends at once" in terminal.said
    assert "stopped by SIGINT after a checkpoint" in terminal.said
    assert "Traceback" not in terminal.said
    typed("train", "first.yaml")
    assert rows(run) > saved
    assert rows(run) >= 100
    assert "finished" in typed("train", "first.yaml")

    sweep = {
        "run": {key: RUN[key] for key in RUN.keys() - {"run_dir", "duration", "optimizer"}},
        "families": {"dense": {"model.ffn": "dense"}, "sparse": {"model.ffn": "default"}},
        "baseline": "dense",
        "sizes": {"d32": {"model.d_model": 32}},
        "budgets": [6e9, 1.2e10],
        "lr": [4e-3],
        "limits": {"tokens_per_parameter": [0, 1e9], "epochs": 1e6},
    }
    (home / "small.yaml").write_text(yaml.safe_dump(sweep))
    assert "4 runs in 2 chains" in typed("sweep", "plan", "small.yaml")
    terminal = typed.on_terminal("sweep", "run", "small.yaml")
    runs = home / "runs/small/runs"
    terminal.press_ctrl_c(lambda: any(rows(run) > 8 for run in runs.glob("*")))
    assert terminal.end() != 0
    assert "to go on: sparse-gpt sweep run small.yaml" in terminal.said
    assert "diverged" not in terminal.said
    assert "Traceback" not in terminal.said
    states = json.loads(typed("sweep", "status", "small.yaml", "--json"))
    assert "stopped" in {state["state"] for state in states}
    assert "every run is done" in typed("sweep", "run", "small.yaml")
    assert "4 done" in typed("sweep", "status", "small.yaml")
    listed = typed("compare", "runs/first", "runs/small", "--sort", "loss")
    for name in ("first", *(state["name"] for state in states)):
        assert name in listed
    assert "needs" in typed("sweep", "fit", "small.yaml", code=2)
