#!/usr/bin/env python3
"""What `fit_to_dense` is worth: a GPT-2 trained here, its FFNs replaced, fitted and tuned.

    python scripts/bench/drop_in.py shards/novels
    python scripts/bench/drop_in.py shards/corpora-bpe4096 --steps 400 --json drop-in.json

Trains a small dense GPT-2, puts sparse FFNs into copies of it (all layers, and the last half), and
prints the held-out loss of each copy when it starts from noise, after the closed form, after the
short distillation, and of the first and the last after `--tune` more steps of ordinary training.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparse_gpt import fit_to_dense, replace_ffn
from sparse_gpt.data import Batch, Batches, Dataset, evaluation, open_shards
from sparse_gpt.provenance import provenance
from sparse_gpt.train.distributed import keep_freed_memory

SEQ, BATCH = 128, 16


def batches(dataset: Dataset, start: int = 0) -> Iterator[Batch]:
    """Training batches from global sample `start` on."""
    return iter(Batches(dataset.train, SEQ, BATCH, seed=0, rank=0, world_size=1, start=start))


def train(model: PreTrainedModel, dataset: Dataset, first: int, steps: int, lr: float) -> None:
    """AdamW over `steps` batches from the first-th on; warm-up over a fifth, linear decay to 0."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    stream = batches(dataset, first * BATCH)
    for step in track(range(steps), f"{steps} steps", transient=True):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / steps * 5, 1 - step / steps)
        batch = next(stream)
        logits = model(batch.tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, dataset: Dataset, tokens: int) -> float:
    """Mean cross-entropy in nats over about so many held-out tokens."""
    model.eval()
    total = count = 0.0
    for batch in evaluation(dataset.held_out, SEQ, BATCH, 0, 1, max_tokens=tokens):
        logits = model(batch.tokens).logits.flatten(0, 1)
        targets = batch.targets.flatten()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of the dense model's training")
    parser.add_argument("--fit", type=int, default=200, help="steps of the distillation")
    parser.add_argument("--tune", type=int, default=100, help="steps of training afterwards")
    parser.add_argument("--lr", type=float, default=2e-3, help="of training; tuned at half of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    dataset = open_shards(args.shards)
    dense = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=dataset.manifest.tokenizer["vocab_size"],
            n_positions=SEQ,
            n_embd=args.d_model,
            n_layer=args.n_layer,
            n_head=max(1, args.d_model // 32),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    train(dense, dataset, 0, args.steps, args.lr)
    rows: list[dict[str, Any]] = []

    def measure(layers: str, state: str, model: PreTrainedModel) -> None:
        rows.append(
            {"layers": layers, "state": state, "loss": held_out_loss(model, dataset, 65536)}
        )

    def tuned(model: PreTrainedModel) -> PreTrainedModel:
        model = copy.deepcopy(model)
        train(model, dataset, args.steps, args.tune, args.lr / 2)
        return model

    measure("", "dense", dense)
    measure("", f"dense, {args.tune} more steps", tuned(dense))
    for name, layers in (("all", None), ("last half", range(args.n_layer // 2, args.n_layer))):
        noise = replace_ffn(copy.deepcopy(dense), layers=layers)
        measure(name, "from noise", noise)
        measure(name, f"from noise, {args.tune} more steps", tuned(noise))
        for steps in (0, args.fit):
            fitted = copy.deepcopy(noise)
            tokens = (batch.tokens for batch in batches(dataset))
            fit_to_dense(fitted, dense, tokens, steps=steps)
            measure(name, f"fitted, {steps} steps after least squares", fitted)
        measure(name, f"fitted, {args.tune} more steps", tuned(fitted))

    if args.json:
        report = {"command": " ".join(sys.argv), **provenance(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title=f"GPT-2, d_model {args.d_model}, {args.n_layer} layers, {args.shards}")
    for column in ("layers replaced", "state", "held-out loss"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["layers"], row["state"], f"{row['loss']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
