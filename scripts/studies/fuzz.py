#!/usr/bin/env python3
"""Gives every reader inputs that are damaged in random ways, and counts what becomes of them.

    python scripts/studies/fuzz.py                      600 inputs, some minutes
    python scripts/studies/fuzz.py --inputs 5000 --seed 3 --json fuzz.json
    python scripts/studies/fuzz.py --kinds overrides checkpoints

An input is used (`fine`) or refused in one line (`refused`). Exit status 1, and the inputs listed,
if there was anything else: a traceback, more than 10 seconds, more than 2 GB of memory in use
beside what was there, or something half-made left behind.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparse_gpt import data
from sparse_gpt.cluster.hostfile import on_hosts
from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import InputError
from sparse_gpt.evaluate.checkpoint import load_trained
from sparse_gpt.files import write_sealed
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.train.checkpoint.manifest import read_manifest
from sparse_gpt.train.checks import check_settings
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.run_dir import finished, read_provenance

ROOT = Path(__file__).parents[2]
SECONDS, GIGABYTES = 10, 2.0
CONFIG: dict[str, Any] = {
    "model": {
        "preset": "tiny",
        "ffn": "default",
        "d_model": 16,
        "n_layer": 1,
        "n_head": 2,
        "max_seq_len": 16,
    },
    "batch": {"global_tokens": 64, "micro_batch": 2},
    "duration": {"steps": 2},
    "optimizer": {"lr": 1e-3},
}
ODD: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**70, -(2**70), 1e308, 1e-320, 0.5, float("nan"),
    float("inf"), "", " ", "\n", "../..", "/dev/zero", "ü" * 300, "\ud800", "a\0b", "-1", "1e400",
    [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [0] * 1000,
]  # fmt: skip


class Fuzz:
    """Makes damaged inputs in a folder of its own, from whole ones that are made once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.novel = (ROOT / "data/novels/persuasion.txt").read_bytes()[:30_000]
        text = self.folder / "whole.txt"
        text.write_bytes(self.novel)
        self.shards = self.folder / "shards"
        data.prepare([text], self.shards, held_out=0.2, separator="\n\n")
        self.run_file = {
            **CONFIG,
            "data": {"path": str(self.shards)},
            "run_dir": str(self.folder / "run"),
        }
        self._train()

    def _train(self) -> None:
        """Two steps, here: what is read of a run must be one's own."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.run_file))
        command = [sys.executable, "-m", "sparse_gpt.train", "--config", str(path)]
        pid = os.posix_spawn(sys.executable, command, {**os.environ, "DS_ACCELERATOR": "cpu"})
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit("the run to be damaged could not be trained")

    # What is damaged

    def tree(self, value: Any) -> Any:
        """A tree of JSON with one place of it another."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.8:
            key = rng.choice(list(value))
            way = rng.random()
            if way < 0.15:
                return {k: v for k, v in value.items() if k != key}
            if way < 0.25:
                return {**value, rng.choice(["", "extra", "a.b", "Ü", "__class__"]): 1}
            return {**value, key: self.tree(value[key])}
        if isinstance(value, list) and value and rng.random() < 0.7:
            place = rng.randrange(len(value))
            return [*value[:place], self.tree(value[place]), *value[place + 1 :]]
        return rng.choice(ODD)

    def bytes(self, content: bytes) -> bytes:
        """Content with something flipped, cut, put in or said twice."""
        rng, at = self.rng, self.rng.randrange(len(content) + 1)
        way = rng.randrange(6)
        if way == 0:
            return content[:at]
        if way == 1:
            return content[:at] + rng.randbytes(rng.randrange(1, 50)) + content[at:]
        if way == 2:
            return content[at:] + content[:at]
        if way == 3:
            return content[:at] + rng.choice([b"[", b"{", b'"', b"\0", b"\xff", b"\n"]) * 5000
        if way == 4:
            return content[:at] + content[min(len(content), at + rng.randrange(100)) :]
        changed = bytearray(content or b"x")
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    def copy(self, folder: Path) -> Path:
        """A copy to damage."""
        made = self.folder / "damaged"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(folder, made, symlinks=True)
        return made

    # One damaged input of a kind, as what is to be tried with it

    def run_files(self) -> Callable[[], object]:
        """YAML, its keys and values, and what is no YAML."""
        path = self.folder / "damaged.yaml"
        whole = yaml.safe_dump(self.run_file).encode()
        changed = self.tree(self.run_file)
        try:
            text = yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")
        except ValueError:
            text = whole
        path.write_bytes(text if self.rng.random() < 0.6 else self.bytes(whole))
        return lambda: judge(load_config(path))

    def overrides(self) -> Callable[[], object]:
        """`key=value`."""
        path = self.folder / "run.yaml"
        keys = ["model", "model.ffn", "model.d_model", "optimizer.lr", "batch", "data", "schedule",
                "deepspeed", "deepspeed.zero_optimization", "deepspeed.bf16", "duration", "x",
                "deepspeed.zero_optimization.stage", "deepspeed.timers"]  # fmt: skip
        value = self.rng.choice(ODD)
        text = f"{self.rng.choice(keys)}={value if isinstance(value, str) else json.dumps(value)}"
        if self.rng.random() < 0.3:
            text = self.bytes(text.encode("utf-8", "surrogatepass")).decode("latin-1")
        return lambda: judge(load_config(path, [text]))

    def manifests(self) -> Callable[[], object]:
        """Of shards, sealed again, so that the damage is not found by its hash."""
        folder = self.copy(self.shards)
        self._reseal(folder / "manifest.json")

        def use() -> None:
            dataset = data.open_shards(folder)
            data.verify(folder)
            sum(dataset.manifest.documents(split) for split in ("train", "held_out"))

        return use

    def shard_files(self) -> Callable[[], object]:
        """Any file of a folder of shards."""
        folder = self.copy(self.shards)
        path = self.rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        path.write_bytes(self.bytes(path.read_bytes()))
        return lambda: (data.verify(folder), data.open_shards(folder))

    def corpora(self) -> Callable[[], object]:
        """Text, lines, parquet; packed, too."""
        import gzip

        import pyarrow as pa
        import pyarrow.parquet as pq
        import zstandard

        rng = self.rng
        texts = self.novel.decode().split("\n\n")[:50]
        lines = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts))
        suffix = rng.choice([".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
        content = {".txt": self.novel, ".jsonl": lines.encode()}.get(suffix, lines.encode())
        if suffix == ".parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), sink)
            content = self.bytes(sink.getvalue().to_pybytes())
        elif suffix.endswith(".gz"):
            content = self.bytes(gzip.compress(content))
        elif suffix.endswith(".zst"):
            content = self.bytes(zstandard.ZstdCompressor().compress(content))
        else:
            content = self.bytes(content)
        path, out = self.folder / f"damaged{suffix}", self.folder / "made"
        path.write_bytes(content)
        where = {"n": "3"} if rng.random() < 0.2 and suffix != ".txt" else None
        separator = rng.choice([None, "\n\n", "x"])
        return lambda: data.prepare(
            [path], out, held_out=0.1, separator=separator, where=where, max_rejected=1.0
        )

    def rank_files(self) -> Callable[[], object]:
        """Vocabularies."""
        whole = (ROOT / "sparse_gpt/data/vocab/gpt2.tiktoken").read_bytes()
        lines = whole.split(b"\n")[:400]
        path = self.folder / "damaged.tiktoken"
        path.write_bytes(self.bytes(b"\n".join(lines)))
        return lambda: data.load_tokenizer(path).encode("some text, and more")

    def hostfiles(self) -> Callable[[], object]:
        """Hosts and their slots."""
        path = self.folder / "hosts"
        path.write_bytes(self.bytes(b"node1 slots=8\nnode2 slots=8 max_slots=8\n# more\n"))
        return lambda: on_hosts(path, ["--config", "run.yaml"])

    def checkpoints(self) -> Callable[[], object]:
        """Any file of a run, sealed again where it is sealed."""
        folder = self.copy(self.folder / "run")
        [step] = (folder / "checkpoints").glob("step-*")
        way = self.rng.randrange(5)
        if way == 0:
            self._reseal(step / "manifest.json")
        elif way == 1:
            path = folder / "provenance.json"
            path.write_text(json.dumps(self.tree(json.loads(path.read_text()))))
        else:
            every = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
            path = self.rng.choice([p for p in every if "tensorboard" not in p.parts])
            path.write_bytes(self.bytes(path.read_bytes()))
        config = load_config(self.folder / "run.yaml", [f"run_dir={folder}"])

        def use() -> None:
            read_manifest(step)
            finished(config)
            read_metrics(folder)
            read_provenance(folder)
            with torch.no_grad():
                load_trained(str(folder)).model(torch.zeros(1, 4, dtype=torch.int64))

        return use

    def _reseal(self, path: Path) -> None:
        fields = json.loads(path.read_text())
        del fields["hash"]
        changed = self.tree(fields)
        write_sealed(path, changed if isinstance(changed, dict) else {"fields": changed})


KINDS = [
    "run_files", "overrides", "manifests", "shard_files", "corpora", "rank_files", "hostfiles",
    "checkpoints",
]  # fmt: skip


def judge(config: RunConfig) -> None:
    """What is asked of a run before anything of it exists."""
    parameter_counts(config.model)
    check_settings(config, world_size=1)


def outcome(use: Callable[[], object]) -> tuple[str, str]:
    """What becomes of an input, and what is said."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with redirect_stderr(StringIO()):
            use()
        found, said = "fine", ""
    except InputError as error:
        found, said = "refused", str(error)
        if len(said.splitlines()) != 1:
            found = "not one line"
    except Exception:
        found, said = "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return ("memory", f"{grown:.1f} GB") if grown > GIGABYTES else (found, said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--json", type=Path, help="counts and failures go there")
    options = parser.parse_args()
    console = Console(stderr=True)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    failures: list[dict[str, str]] = []
    with TemporaryDirectory() as temporary:
        fuzz = Fuzz(Path(temporary), options.seed)
        for number in track(range(options.inputs), "inputs", console=console, transient=True):
            kind = options.kinds[number % len(options.kinds)]
            found, said = outcome(getattr(fuzz, kind)())
            made = fuzz.folder / "made"
            if found == "refused" and made.exists() and any(made.glob("manifest.json")):
                found, said = "half-made", f"{made} after: {said}"
            shutil.rmtree(made, ignore_errors=True)
            counts[kind][found] += 1
            if found not in ("fine", "refused"):
                failures.append({"input": str(number), "kind": kind, "what": found, "said": said})
    table = Table("kind", "fine", "refused", "else", box=None)
    for kind, of_kind in counts.items():
        good = of_kind["fine"], of_kind["refused"]
        table.add_row(kind, *map(str, good), str(of_kind.total() - sum(good)))
    Console().print(table)
    for failure in failures:
        said = failure["said"].strip().splitlines()
        print(f"{failure['kind']} {failure['input']}: {failure['what']}: {said[-1]}")
    if options.json:
        report = {"seed": options.seed, "counts": counts, "failures": failures}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
