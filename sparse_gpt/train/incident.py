"""The step that stopped a run, kept whole so that it can be run again on one process.

    incidents/step-00000012/
      incident.json    why, the loss and gradient norm, and how many ranks there were
      config.yaml      the run's
      weights.pt       of the module before the step, in the run's precision
      rank-N.pt        tokens, targets, documents (if masked), samples (global numbers) and random
                       state before the step

The folder appears whole or not at all.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from sparse_gpt.config.load import to_yaml
from sparse_gpt.data import Batch
from sparse_gpt.files import publish, temporary, to_json
from sparse_gpt.train.checkpoint.manifest import tag_of
from sparse_gpt.train.checkpoint.zero_state import Share
from sparse_gpt.train.engine import Engine


def write_incident(
    run_dir: Path, engine: Engine, batch: Batch, rng: dict[str, torch.Tensor], step: int
) -> str:
    """Keep the skipped step `step`, which left the weights as they were. Collective.

    rng: of before the step. Returns where it is and how large, in words; a disk that is full or
    broken is said there too, for the run stops anyway.
    """
    world, guard = engine.world, engine.guard
    folder = run_dir / "incidents" / tag_of(step)
    aside = temporary(folder)
    weights = _whole_weights(engine)
    error: OSError | RuntimeError | None = None
    try:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    except OSError as failure:
        error = failure
    dist.barrier()
    try:
        rank = {
            "tokens": batch.tokens.cpu(),
            "targets": batch.targets.cpu(),
            "documents": None if batch.documents is None else batch.documents.cpu(),
            "samples": batch.samples,
            "rng": rng,
        }
        torch.save(rank, aside / f"rank-{world.rank}.pt")
        if world.rank == 0:
            record = {
                "step": step,
                "trouble": guard.trouble,
                "loss": float(guard.loss),
                "grad_norm": float(guard.norm),
                "world_size": world.size,
            }
            torch.save(weights, aside / "weights.pt")
            (aside / "config.yaml").write_text(to_yaml(engine.config))
            (aside / "incident.json").write_text(to_json(record) + "\n")
    except (OSError, RuntimeError) as failure:  # torch.save says a full disk in a RuntimeError
        error = failure
    failed = world.sum(torch.tensor(int(error is not None), device=world.device))
    if failed:
        return f"{folder} could not be written ({error or 'on another rank'})"
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of the same step in an earlier start
        publish(folder)
    dist.barrier()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder} ({size / 1e6:.1f} MB)"


def _whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The module's saved state on the CPU of rank 0, nothing on the others."""
    from deepspeed.runtime.zero import GatheredParameters

    from sparse_gpt.train.exchange import whole

    kept = {}
    for name in engine.module.state_dict():
        tensor = engine.statistics.buffers.get(name)
        if tensor is None:
            tensor = engine.module.get_parameter(name)
        if Share.of(tensor):
            tensor = whole(tensor)
        with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if engine.world.rank == 0:
                kept[name] = tensor.detach().cpu().clone()
    return kept
