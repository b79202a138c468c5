"""Four ranks that take a few steps with blocks shared in every way, in one process each.

python exchanging.py RUN_FILE FOLDER     rank 0 prints JSON, see `main`
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sparse_gpt.config.load import load_config
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.train.checkpoint.checkpoints import Checkpoints
from sparse_gpt.train.checkpoint.manifest import TrainState
from sparse_gpt.train.distributed import World, join_world
from sparse_gpt.train.engine import Engine, new_model
from sparse_gpt.train.guard import RunStopped, compare_replicas

BATCH, SEQ = 16, 32


def make(run_file: Path, world: World, zero_stage: int, ranks: int, *overrides: str) -> Engine:
    stage = f"deepspeed={{zero_optimization: {{stage: {zero_stage}}}}}"
    config = load_config(run_file, [stage, f"parallel.blocks={ranks}", *overrides])
    torch.manual_seed(config.seed)
    return Engine(config, new_model(config, world), world, config.total_steps)


def steps(engine: Engine, *numbers: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps on random tokens, each rank its part of them."""
    found, world = [], engine.world
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        windows = torch.randint(1024, (BATCH, SEQ + 1), generator=random)
        own = windows.chunk(world.size)[world.rank]
        loss, _, norm = engine.step(own[:, :-1], own[:, 1:], number)
        found.append((loss.item(), norm.item()))
    return found


def moves(engine: Engine) -> list[list[int]]:
    return [part.moves.tolist() for part in engine.statistics.dictionaries.values()]


def skew(engine: Engine) -> None:
    """Every token to the first two blocks, which are of the first rank."""
    for part in engine.module.modules():
        if isinstance(part, BlockDictionary):
            part.moves[:2] = 10_000


def ways(run_file: Path, world: World) -> dict[str, object]:
    """What steps give, blocks over 1, 2 and 4 ranks, in ZeRO 0 to 2, and with other settings."""
    found: dict[str, object] = {}
    again = ("batch.micro_batch=2", "activation_checkpointing=full")
    plain = [(stage, ranks, ()) for stage in (0, 1, 2) for ranks in (1, 2, 4)]
    for stage, ranks, options in [*plain, (0, 2, again), (1, 4, again), (2, 2, again)]:
        engine = make(run_file, world, stage, ranks, "optimizer.grad_clip=0.3", *options)
        found[f"{stage} {ranks} {len(options)}"] = [*steps(engine, 0, 1, 2), moves(engine)]
    for ranks in (1, 2):
        engine = make(run_file, world, 1, ranks, "precision=bf16", "optimizer.grad_clip=0.3")
        found[f"bf16 {ranks}"] = steps(engine, 0, 1, 2)
    return found


def spoil(engine: Engine) -> int:
    """How many ranks leave out a step in which one rank's blocks get a gradient of Inf."""
    world = engine.world
    blocks = next(iter(engine.statistics.dictionaries.values())).analysis
    if world.rank == 3:
        blocks.register_hook(lambda grad: grad + torch.inf)
    before = blocks.detach().clone()
    steps(engine, 0)
    kept = engine.guard.trouble is not None and torch.equal(blocks, before)
    return int(world.sum(torch.tensor(int(kept))).item())


def main(run_file: Path, folder: Path) -> None:
    world = join_world()
    found: dict[str, object] = {"ways": ways(run_file, world)}

    # Every token to blocks of one rank in each two: the others' rows all travel.
    for ranks in (1, 2):
        engine = make(run_file, world, 1, ranks)
        skew(engine)
        found[f"skewed {ranks}"] = steps(engine, 0, 1)
        found[f"loads {ranks}"] = [
            p.loads.tolist() for p in engine.statistics.dictionaries.values()
        ]
        found[f"exchanged {ranks}"] = engine.exchanged()

    found["left out"] = [spoil(make(run_file, world, stage, 2)) for stage in (0, 1, 2)]
    found["left out"] += [spoil(make(run_file, world, 1, 2, "precision=bf16"))]

    # A bit that differs in one rank's blocks is told of it alone.
    engine = make(run_file, world, 1, 2)
    compare_replicas(engine.module, world, 1)
    if world.rank == 3:
        with torch.no_grad():
            next(iter(engine.statistics.dictionaries.values())).analysis[0, 0, 0] += 1
    try:
        compare_replicas(engine.module, world, 1)
    except RunStopped as error:
        found["differs"] = str(error)

    # Saved over 2 ranks in ZeRO-1, gone on with over 4 in ZeRO-2, then over 1.
    found["undisturbed"] = steps(make(run_file, world, 1, 1), 0, 1, 2, 3)
    gone_on = []
    for number, (stage, ranks) in enumerate([(1, 2), (2, 4), (0, 2), (1, 1)]):
        engine = make(run_file, world, stage, ranks)
        checkpoints = Checkpoints(folder, engine, {})
        state = checkpoints.load_newest()
        assert state.step == number
        gone_on += steps(engine, number)
        checkpoints.save(TrainState(number + 1))
        checkpoints.finish()
    found["gone on"] = gone_on
    if world.rank == 0:
        print(json.dumps(found))
    dist.barrier()


main(*map(Path, sys.argv[1:]))
