#!/usr/bin/env python3
"""What `fit_to_dense` is worth: a GPT-2 trained here, its FFNs replaced, fitted and tuned.

    python scripts/bench/drop_in.py shards/novels
    python scripts/bench/drop_in.py shards/corpora-bpe4096 --steps 400 --json drop-in.json

Trains a small dense GPT-2, puts sparse FFNs of each preset into all layers of a copy, and prints
the held-out loss and the layers' mean error of each copy when it starts from noise, after the
closed form, after the short distillation, and the loss of the first and the last after `--tune`
more steps of ordinary training. `--dense` keeps the dense model for another time.
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
from sparse_gpt.huggingface.fit import balance
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
        balance(model)


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
    parser.add_argument("--dense", type=Path, metavar="DIR", help="read, or written where missing")
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
    if args.dense and args.dense.exists():
        dense = GPT2LMHeadModel.from_pretrained(args.dense)
    else:
        train(dense, dataset, 0, args.steps, args.lr)
        if args.dense:
            dense.save_pretrained(args.dense)
    rows: list[dict[str, Any]] = []

    def measure(
        ffn: str, state: str, model: PreTrainedModel, errors: list[float] | None = None
    ) -> None:
        loss = held_out_loss(model, dataset, 65536)
        rows.append({"ffn": ffn, "state": state, "loss": loss, "errors": errors})

    def tuned(model: PreTrainedModel) -> PreTrainedModel:
        model = copy.deepcopy(model)
        train(model, dataset, args.steps, args.tune, args.lr / 2)
        return model

    measure("dense", "as it was", dense)
    measure("dense", f"{args.tune} more steps", tuned(dense))
    for ffn in ("default", "light"):
        noise = replace_ffn(copy.deepcopy(dense), ffn)
        for steps in (0, args.fit):
            fitted = copy.deepcopy(noise)
            tokens = (batch.tokens for batch in batches(dataset))
            errors = list(fit_to_dense(fitted, dense, tokens, steps=steps).values())
            if not steps:
                measure(ffn, "from noise", noise, [error.before for error in errors])
            after = [error.after for error in errors]
            measure(ffn, f"fitted, {steps} steps after least squares", fitted, after)
        measure(ffn, f"from noise, {args.tune} more steps", tuned(noise))
        measure(ffn, f"fitted, {args.tune} more steps", tuned(fitted))

    if args.json:
        report = {"command": " ".join(sys.argv), **provenance(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title=f"GPT-2, d_model {args.d_model}, {args.n_layer} layers, {args.shards}")
    for column in ("FFN", "state", "held-out loss", "mean error of a layer"):
        table.add_column(column)
    for row in rows:
        error = f"{sum(row['errors']) / args.n_layer:.4f}" if row["errors"] else ""
        table.add_row(row["ffn"], row["state"], f"{row['loss']:.3f}", error)
    Console().print(table)


if __name__ == "__main__":
    main()
