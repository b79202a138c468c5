#!/usr/bin/env python3
"""The sparse FFN alone against the dense one: time, memory, FLOP/s, distance from the roofline.

    python scripts/bench/ffn.py --d-model 128 768 --tokens 4096
    python scripts/bench/ffn.py --tokens 16384 65536 --dtype bf16 --json bench-ffn.json

Contestants: `dense eager`, `dense compiled` (torch.compile; its matmuls are cuBLAS's or MKL's),
`sparse eager`, `sparse compiled`. Passes: `forward` as in inference (no graph is kept), `backward`
alone, and `both`, what training does.

Every round times every contestant, so that a machine whose speed drifts slows all of them alike;
ratios are taken round by round (dense time over a contestant's: above 1 is faster than dense), the
median is shown with the range. On a GPU a time is CUDA events' around one call after the L2 cache
was overwritten: launches that the device does not wait for cost nothing, as in a training step
that is limited by the device.

FLOP/s are the modules' own count over the time. GB/s are the ideal traffic over the time: x, y, dy
and dx once each for every pass that needs them (forward x, y; backward x, dy, dx), the weights once
a pass and their gradients once; what is moved beyond that makes the number smaller. The roof of a
pass is the larger of matmul FLOPs over the FLOP/s of one large matmul and ideal traffic over the
bytes/s (read plus written) of one large copy, both measured in the same run; `roof` is the share
of that which is reached.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparse_gpt import DenseFFN, UltraEfficientSparseFFN, count_flops
from sparse_gpt.model.config import DenseFFNConfig
from sparse_gpt.provenance import provenance
from sparse_gpt.train.distributed import keep_freed_memory
from sparse_gpt.train.precision import DTYPES

Call = Callable[[], Tensor | None]
PASSES = ("forward", "backward", "both")


class Clock:
    """Seconds of one call on a device, caches cold."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":  # several times any L2
            self.flush = torch.empty(2**28, dtype=torch.uint8, device=device)

    def seconds(self, call: Call, prepare: Callable[[], Any] | None = None) -> float:
        """Time of `call`, without that of `prepare` before it."""
        if prepare:
            prepare()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3

    def median(self, call: Call, prepare: Callable[[], Any] | None, calls: int) -> float:
        return statistics.median(self.seconds(call, prepare) for _ in range(calls))


def ceilings(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of one large matmul and bytes/s of one large copy, the best of ten."""
    cuda = clock.device.type == "cuda"
    n, size = (8192, 2**30) if cuda else (1024, 2**27)
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.randint(256, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    matmul = min(clock.seconds(lambda: a @ b) for _ in range(10))
    copy = min(clock.seconds(lambda: target.copy_(source)) for _ in range(10))
    return {"flops_per_second": 2 * n**3 / matmul, "bytes_per_second": 2 * size / copy}


class Contestant:
    """An FFN on one batch of random tokens: its passes, its costs."""

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.module, self.run, self.x = module, run, x
        self.wanted = [x, *module.parameters()]
        self.dy = torch.randn_like(x)
        self._y: Tensor | None = None

    def passes(self) -> dict[str, tuple[Call, Callable[[], Any] | None]]:
        """Pass -> (what is timed, what comes before it)."""
        return {
            "forward": (self.forward, None),
            "backward": (self.backward, self.keep_graph),
            "both": (self.both, None),
        }

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.run(self.x)

    def keep_graph(self) -> None:
        self._y = self.run(self.x)

    def backward(self) -> None:
        y, self._y = self._y, None
        torch.autograd.grad(y, self.wanted, self.dy, allow_unused=True)

    def both(self) -> None:
        self.keep_graph()
        self.backward()

    def memory(self) -> dict[str, int]:
        """Bytes beyond x, dy and the weights: kept between forward and backward (y included), and
        the most at any time (gradients included). CUDA's allocator counts; elsewhere nothing."""
        if self.x.device.type != "cuda":
            return {}
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.keep_graph()
        kept = torch.cuda.memory_allocated() - before
        self.backward()
        return {"saved_bytes": kept, "peak_bytes": torch.cuda.max_memory_allocated() - before}

    def work(self) -> dict[str, dict[str, int]]:
        """Pass -> FLOPs, those of matmuls, and bytes of the ideal traffic."""
        flops = count_flops(self.module, batch=1, seq=len(self.x)).total
        x = self.x.numel() * self.x.element_size()
        w = sum(p.numel() * p.element_size() for p in self.module.parameters())
        learned = 3 * (flops.matmul - flops.fixed) + 2 * flops.fixed
        work = {
            "forward": {"flops": flops.forward, "matmul": flops.matmul, "bytes": 2 * x + w},
            "both": {"flops": flops.training, "matmul": learned, "bytes": 5 * x + 3 * w},
        }
        work["backward"] = {key: work["both"][key] - n for key, n in work["forward"].items()}
        return work


def contestant(name: str, x: Tensor, preset: str) -> Contestant:
    """The FFN called `name` over tokens x `(tokens, d_model)`, in their dtype."""
    kind, how = name.split()
    module: nn.Module
    if kind == "dense":
        module = DenseFFN(x.shape[1], DenseFFNConfig())
    else:
        module = UltraEfficientSparseFFN(x.shape[1], preset)
    module = module.to(x.device, x.dtype)
    run: Callable[[Tensor], Tensor] = module
    if how == "compiled":
        run = torch.compile(module, dynamic=False)
    return Contestant(module, run, x)


def measure(
    names: Sequence[str], x: Tensor, preset: str, clock: Clock, rounds: int, roofs: dict[str, float]
) -> dict[str, Any]:
    """Every contestant's results by pass; {"error": ...} for one that fails."""
    results: dict[str, Any] = {}
    works, plan = {}, []
    for name in names:
        try:
            entrant = contestant(name, x, preset)
            works[name] = entrant.work()
            start = time.perf_counter()
            for call, prepare in entrant.passes().values():
                clock.seconds(call, prepare)
            warm_up = time.perf_counter() - start  # compilation for the most part
            for what, (call, prepare) in entrant.passes().items():
                once = clock.seconds(call, prepare)
                enough = 0.02 if clock.device.type == "cuda" else 0.1
                plan.append((name, what, call, prepare, max(1, min(20, int(enough / once)))))
            results[name] = {"warm_up_seconds": warm_up, "memory": entrant.memory()}
        except Exception as error:  # out of memory, say
            plan = [entry for entry in plan if entry[0] != name]
            message = (str(error).splitlines() or [""])[0]
            results[name] = {"error": f"{type(error).__name__}: {message}"}

    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, what, call, prepare, calls in plan:
            times.setdefault((name, what), []).append(clock.median(call, prepare, calls))
    for (name, what), seconds in times.items():
        work, median = works[name][what], statistics.median(seconds)
        floor = max(
            work["matmul"] / roofs["flops_per_second"], work["bytes"] / roofs["bytes_per_second"]
        )
        results[name][what] = {
            "ms": median * 1e3,
            "ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
            "tflops": work["flops"] / median / 1e12,
            "gb_per_second": work["bytes"] / median / 1e9,
            "roof_ms": floor * 1e3,
            "roof_share": floor / median,
            **work,
        }
        for rival in ("dense compiled", "dense eager"):
            if (rival, what) in times:
                ratios = [a / b for a, b in zip(times[rival, what], seconds, strict=True)]
                results[name][what][f"speed_over_{rival.replace(' ', '_')}"] = {
                    "median": statistics.median(ratios),
                    "range": [min(ratios), max(ratios)],
                }
    return results


def table(shape: dict[str, Any]) -> Table:
    """One shape's results."""
    title = f"d_model {shape['d_model']}, {shape['tokens']:,} tokens, {shape['dtype']}"
    shown = Table(title=title)
    for column in ("FFN", "pass"):
        shown.add_column(column, no_wrap=True)
    for column in ("ms", "× dense compiled", "× dense eager", "TFLOP/s", "GB/s", "roof"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("saved, peak MiB", justify="right", no_wrap=True)
    for name, result in shape["results"].items():
        if "error" in result:
            shown.add_row(name, result["error"][:60], end_section=True)
            continue
        for what in PASSES:
            row = result[what]
            ratios = [
                f"{r['median']:.2f} ({r['range'][0]:.2f} to {r['range'][1]:.2f})" if r else ""
                for r in (
                    row.get("speed_over_dense_compiled"),
                    row.get("speed_over_dense_eager"),
                )
            ]
            memory = [f"{n / 2**20:,.0f}" for n in result["memory"].values()]
            shown.add_row(
                name if what == "forward" else "",
                what,
                f"{row['ms']:.3f}",
                *ratios,
                f"{row['tflops']:.3g}",
                f"{row['gb_per_second']:.0f}",
                f"{row['roof_share']:.0%}",
                ", ".join(memory) if what == "both" else "",
                end_section=what == "both",
            )
    return shown


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    usual = ["dense eager", "dense compiled", "sparse eager", "sparse compiled"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    widths = [128, 768, 1280, 1600, 2048, 4096]
    parser.add_argument("--d-model", type=int, nargs="+", default=widths)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--preset", default="default", help="of the sparse FFN")
    parser.add_argument("--only", nargs="+", choices=usual, default=usual, metavar="FFN")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="begin no other shape after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args()

    begin = time.monotonic()
    if not cuda:
        keep_freed_memory()  # as training on the CPU does
    clock = Clock(device)
    dtype = DTYPES[args.dtype]
    roofs = ceilings(clock, dtype)
    report: dict[str, Any] = {"command": " ".join(sys.argv), **provenance(device)}
    report |= {"preset": args.preset, "rounds": args.rounds}
    report |= {"ceilings": roofs, "shapes": [], "skipped": []}
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{report['hardware']['device']}: matmul {roofs['flops_per_second'] / 1e12:.4g} TFLOP/s, "
        f"copy {roofs['bytes_per_second'] / 1e9:.4g} GB/s, torch {torch.__version__}",
        highlight=False,
    )
    for tokens in args.tokens:  # all widths first: a run that is cut short has seen each
        for d_model in args.d_model:
            shape: dict[str, Any] = {"d_model": d_model, "tokens": tokens, "dtype": args.dtype}
            if args.seconds and time.monotonic() - begin > args.seconds:
                report["skipped"].append(shape)
                continue
            if any(name.endswith("compiled") for name in args.only):
                torch.compiler.reset()  # one shape's code is of no use to the next
            torch.manual_seed(0)
            x = torch.randn(tokens, d_model, device=device, dtype=dtype, requires_grad=True)
            shape["results"] = measure(args.only, x, args.preset, clock, args.rounds, roofs)
            if cuda:
                torch.cuda.empty_cache()
            report["shapes"].append(shape)
            console.print(table(shape))
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["skipped"]:
        skipped = (f"{s['d_model']}×{s['tokens']}" for s in report["skipped"])
        console.print(f"not measured, for want of time: {', '.join(skipped)}", highlight=False)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
