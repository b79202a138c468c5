"""The training loop: the file that `deepspeed`, `torchrun` or `srun` runs, one process a rank.

    deepspeed --num_gpus 2 launch/train.py --config configs/tiny-sparse.yaml optimizer.lr=1e-3

Started again on the same run directory it goes on from the newest whole checkpoint.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from data import Batch, Batches, Blend, DataError, Split, evaluation, prefetched
from launch.checkpoint import CheckpointError, Checkpoints, TrainState, rng_state
from launch.config import RunConfig, load_config
from launch.corpus import check_epochs, open_data
from launch.engine import Engine, check_compiler, deepspeed_config
from launch.errors import ConfigError
from launch.guard import RunStopped
from launch.incident import write_incident
from launch.preemption import Preempted, Preemption
from launch.preflight import preflight
from launch.probe import Probe
from launch.run_dir import check_run_dir, hold, open_run_dir, origin
from launch.telemetry import Telemetry
from launch.world import (
    PREEMPTED,
    WITNESS_WAITS,
    World,
    end_with_launcher,
    join_world,
    limit_waiting,
    lost_peer,
    read_environment,
)
from sparse_gpt import GPT, count_flops
from sparse_gpt.ffn.kernels import available


def train(config: RunConfig) -> None:
    """Train as `config` says, from the newest checkpoint of its run directory if there is one.

    Raises ConfigError or DataError, before anything is written, if it cannot be done, and
    RunStopped if the guard finds that the run must not go on.
    """
    blend = check(config, read_environment()[2])
    preemption = Preemption()
    if read_environment()[0] == 0:
        hold(Path(config.run_dir))
    world = join_world(config.fault.timeout_seconds)

    torch.manual_seed(config.seed)
    model = GPT(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    found = preflight(config, world, blend.hash, parameters)
    report = count_flops(model, batch=1, seq=config.model.max_seq_len)
    total_steps = config.total_steps(report.training / report.seq)
    probe = Probe(model, report, world.device)
    engine = Engine(config, model, world, total_steps)
    torch.manual_seed(config.seed * 1_000_003 + world.rank + 1)  # dropout differs between ranks

    checkpoints = Checkpoints(
        Path(config.run_dir) / "checkpoints", engine, origin(config, blend.hash)
    )
    limit_waiting(config.fault.timeout_seconds)  # all groups exist now
    state = checkpoints.load_newest()
    if state.guard:
        engine.guard.load(state.guard)
    run_dir = open_run_dir(config, world, blend, state.step, found)
    batches = read_from(config, blend, world, state.samples)
    with Telemetry(config, run_dir, world, report, total_steps, state.step) as telemetry:
        if state.step == 0:
            with telemetry.untimed():
                telemetry.log(state.step, validate(config, engine, blend))
        while state.step < total_steps:
            with telemetry.data_wait():
                batch = next(batches).to(world.device, non_blocking=True)
            rng = rng_state(world.device)
            sampled = state.step % config.log.profile_every == 0
            with probe.attached(sampled):
                loss, learning_rate, grad_norm = engine.step(
                    batch.tokens, batch.targets, state.step, batch.documents
                )
            state = TrainState(
                state.step + 1, state.samples + config.global_batch, engine.guard.state()
            )
            if engine.guard.trouble and go_back(engine, checkpoints, run_dir, batch, rng, state):
                state = replace(checkpoints.load_newest(), samples=state.samples)
                batches = read_from(config, blend, world, state.samples)
                telemetry.rewind(state.step)
                continue

            last = state.step == total_steps
            metrics = {}
            if last or sampled or state.step % config.log.every == 0:
                metrics["train/loss"] = loss.item()  # waits for the device
                metrics["train/learning_rate"] = learning_rate
                metrics["train/grad_norm"] = grad_norm.item()
                metrics["guard/skipped"] = engine.guard.skipped
                metrics |= telemetry.speed(state.step) | probe.metrics()
                if config.log.batch_hash:
                    metrics["data/batch_hash"] = batch_hash(batch, world)
            with telemetry.untimed():
                if last or state.step % config.eval.every == 0:
                    metrics |= validate(config, engine, blend)
                if metrics:
                    telemetry.log(state.step, metrics)
                if checkpoints.after_step(state, last, preemption.requested):
                    raise Preempted(state.step)


def go_back(
    engine: Engine,
    checkpoints: Checkpoints,
    run_dir: Path,
    batch: Batch,
    rng: dict[str, torch.Tensor],
    state: TrainState,
) -> bool:
    """Say that the step before `state` was skipped; whether to go back to the newest checkpoint.

    Collective. Raises RunStopped, an incident written, if it is time to stop.
    """
    guard, world = engine.guard, engine.world
    first = state.samples - engine.config.global_batch
    line = f"step {state.step}: skipped, {guard.trouble}; samples {first} to {state.samples - 1}"
    stop = guard.in_a_row >= guard.config.stop_after
    back = guard.spiked and guard.config.spike == "rollback"
    if stop or back:
        checkpoints.publish()
    if stop:
        place = write_incident(run_dir, engine, batch, rng, state.step)
        raise RunStopped(
            f"{line}; {guard.in_a_row} bad steps in a row. See sparse-gpt replay {place}"
        )
    back = back and world.from_rank_0((checkpoints.root / "latest").exists)
    if world.rank == 0:
        then = "; going back to the newest checkpoint" if back else ""
        print(f"{line}{then}", flush=True)
    return back


def check(config: RunConfig, world_size: int) -> Blend:
    """Everything that can be known to be wrong before a process group or a folder exists."""
    blend = open_data(config.data)
    if config.model.vocab_size != blend.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is not the {blend.vocab_size} of the "
            f"vocabulary that {blend.sources[0].folder} was made with; set it to that"
        )
    config.grad_accum(world_size)
    deepspeed_config(config, world_size)
    check_compiler(config)
    train_batches(config, blend, world_size)
    check_epochs(config, blend)
    for source in blend.sources:
        if source.dataset.held_out.n_tokens:
            held_out(config, source.dataset.held_out, world_size)
    ffn = config.model.ffn
    if ffn.kind == "sparse" and ffn.backend == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not available(device):
            raise ConfigError(f"model.ffn.backend: triton cannot run on this {device}; use auto")
        if config.precision == "fp16":
            raise ConfigError("model.ffn.backend: triton has no fp16; use auto, or bf16")
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision: fp16 needs a GPU; on the CPU use fp32 or bf16")
    check_run_dir(config, blend)
    return blend


def train_batches(
    config: RunConfig, blend: Blend, world_size: int, rank: int = 0, start: int = 0
) -> Batches:
    """This rank's share of the training data from sample `start` on."""
    return Batches(
        blend,
        seq_len=config.model.max_seq_len,
        global_batch=config.global_batch,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start=start,
        documents=config.model.document_mask,
        pin=torch.cuda.is_available(),
    )


def read_from(config: RunConfig, blend: Blend, world: World, start: int) -> Iterator[Batch]:
    """This rank's batches from sample `start` on, read ahead."""
    return prefetched(iter(train_batches(config, blend, world.size, world.rank, start)))


def batch_hash(batch: Batch, world: World) -> int:
    """A hash of the global batch's token ids, whatever ranks hold them; JSON numbers hold it."""
    rows = batch.windows.cpu().numpy()
    own = sum(xxhash.xxh3_64_intdigest(row.tobytes()) % 2**43 for row in rows)
    return int(world.sum(torch.tensor(own, device=world.device)).item()) % 2**53


def validate(config: RunConfig, engine: Engine, blend: Blend) -> dict[str, float]:
    """`val/loss` over the held-out splits; nothing where the data have none.

    Of several sources each has its own, `val/loss/<name>`, and `val/loss` is their mean with the
    shares that they have in training: the loss of what the run is trained on.
    """
    world, losses, total, shares = engine.world, {}, 0.0, 0
    for source in blend.sources:
        split = source.dataset.held_out
        if split.n_tokens:
            loss = engine.evaluate(held_out(config, split, world.size, world.rank))
            losses[f"val/loss/{source.name}"] = loss
            total, shares = total + loss * source.quota, shares + source.quota
    if not losses:
        return {}
    return {"val/loss": total / shares, **(losses if len(blend.sources) > 1 else {})}


def held_out(config: RunConfig, split: Split, world_size: int, rank: int = 0) -> Iterator[Batch]:
    """This rank's share of one pass over a held-out split: the same windows at any world size."""
    return evaluation(
        split,
        config.model.max_seq_len,
        config.batch.micro_batch * world_size,
        rank,
        world_size,
        max_tokens=config.eval.max_tokens,
        documents=config.model.document_mask,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="a run file, as in configs/")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=1e-3")
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about DeepSpeed's calls
    end_with_launcher()
    try:
        train(load_config(args.config, args.overrides))
    except (ConfigError, DataError) as error:
        if read_environment()[1] == 0:  # one a host: what is wrong may be wrong on this one only
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except Preempted as preempted:
        dist.barrier()  # a rank that ends alone would have the launcher end the others
        if read_environment()[0] == 0:
            print(preempted, flush=True)
        os._exit(PREEMPTED)
    except (RunStopped, CheckpointError) as error:  # on all ranks
        if read_environment()[0] == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist.barrier()
        os._exit(1)
    except Exception as error:
        line = lost_peer(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        time.sleep(WITNESS_WAITS)
        os._exit(1)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads abort about 1 in 200 ordinary exits


if __name__ == "__main__":
    main()
