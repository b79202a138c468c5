"""The training loop, as each rank runs it.

Started again on the same run directory it goes on from the newest whole checkpoint.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import xxhash

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.data import Batch, Blend
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.model.flops import count_flops
from sparse_gpt.train.announce import beginning, ending
from sparse_gpt.train.checkpoint.checkpoints import Checkpoints
from sparse_gpt.train.checkpoint.manifest import TrainState
from sparse_gpt.train.checkpoint.random_state import rng_state
from sparse_gpt.train.checks import check
from sparse_gpt.train.component_profile import ComponentProfile
from sparse_gpt.train.distributed import World, join_world, limit_waiting, read_environment
from sparse_gpt.train.engine import Engine, new_model
from sparse_gpt.train.feed import held_out, read_from
from sparse_gpt.train.guard import RunStopped
from sparse_gpt.train.incident import write_incident
from sparse_gpt.train.preemption import Preempted, Preemption
from sparse_gpt.train.preflight import preflight
from sparse_gpt.train.run_dir import hold, open_run_dir, origin
from sparse_gpt.train.start_from import begins_anew, origin_of, starting_model
from sparse_gpt.train.telemetry import Telemetry
from sparse_gpt.train.trace import Trace


def train(config: RunConfig) -> None:
    """Train as `config` says, from the newest checkpoint of its run directory if there is one.

    Raises ConfigError or DataError, before anything is written, if it cannot be done; ConfigError
    once nothing can be kept in its folder any more; and RunStopped if the guard finds that the run
    must not go on, or if it has ended in NaN.
    """
    blend = check(config, read_environment()[2])
    preemption = Preemption()
    world = join_world(config.fault.timeout_seconds)
    world.from_rank_0(partial(hold, Path(config.run_dir)))

    torch.manual_seed(config.seed)
    new = not begins_anew(config)
    model = new_model(config, world) if new else starting_model(config, blend, world)
    found = preflight(config, world, blend.hash, parameter_counts(config.model).total)
    report = count_flops(model, batch=1, seq=config.model.max_seq_len)
    total_steps = config.total_steps
    profile = ComponentProfile(model, report, world.device)
    engine = Engine(config, model, world, total_steps, new)
    torch.manual_seed(config.seed * 1_000_003 + world.rank + 1)  # dropout differs between ranks

    checkpoints = Checkpoints(
        Path(config.run_dir) / "checkpoints", engine, origin(config, blend.hash)
    )
    limit_waiting(config.fault.timeout_seconds)  # all groups exist now
    state = checkpoints.load_newest()
    if state.guard:
        engine.guard.load(state.guard)
    source = None if new or world.rank else origin_of(config)
    run_dir = world.from_rank_0(
        partial(open_run_dir, config, world, blend, state.step, found, source)
    )
    batches = read_from(config, blend, world, state.samples)
    trace = Trace(engine, profile.components, run_dir)
    with Telemetry(config, run_dir, world, report, total_steps, state.step) as telemetry:
        world.from_rank_0(partial(beginning, config, world, report, state.step))
        if state.step == 0:
            with telemetry.untimed():
                telemetry.log(state.step, validate(config, engine, blend))
        while state.step < total_steps:
            with telemetry.data_wait():
                batch = next(batches).to(world.device, non_blocking=True)
            rng = rng_state(world.device)
            sampled = state.step % config.log.profile_every == 0
            with profile.attached(sampled), trace.around(state.step):
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
                metrics |= telemetry.speed(state.step) | profile.metrics()
                metrics |= engine.statistics.routing() | engine.exchanged()
                if config.log.batch_hash:
                    metrics["data/batch_hash"] = batch_hash(batch, world)
            with telemetry.untimed():
                trace.after_step()
                if last or state.step % config.eval.every == 0:
                    metrics |= validate(config, engine, blend)
                if metrics:
                    telemetry.log(state.step, metrics)
                if checkpoints.after_step(state, last, preemption.requested, telemetry.lost):
                    raise Preempted(state.step)
    loss = world.from_rank_0(partial(ending, config, run_dir))
    if loss is not None and not math.isfinite(loss):
        raise RunStopped(f"{run_dir}: ended with a loss of {loss}: is the learning rate too high?")


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
