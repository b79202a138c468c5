"""A rank's part of the training state, by parameter name, whatever way ZeRO and blocks over ranks
lay it out.

Every ZeRO stage keeps fp32 master weights and AdamW's moments in flat tensors of its own; a
fragment says which stretch of which parameter lies where in them. Checkpoints hold fragments, so
that a run resumes at any stage and world size: each rank copies what overlaps its own. DeepSpeed's
own checkpoints would override the configuration's hyper-parameters; these hold none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

KINDS = ("master", "exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 4 * len(KINDS)  # of a checkpoint


@dataclass(frozen=True)
class Share:
    """Where a parameter lies of which this rank has a stretch alone: `start` elements into the
    whole one, flattened. Of such stretches there are `replicas`, and this rank's is `replica`."""

    start: int
    replica: int
    replicas: int

    @classmethod
    def of(cls, parameter: torch.Tensor) -> Share | None:
        """None for a parameter that every rank has."""
        share: Share | None = getattr(parameter, "share", None)
        return share


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + numel` of a flattened parameter, held at `offset` of `base`.

    base: the fp32 tensor that the optimizer updates, on this rank.
    share: where the parameter is one of several shares.
    """

    name: str
    start: int
    numel: int
    base: torch.Tensor
    offset: int
    share: Share | None = None

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This fragment, `(numel,)`, of `base` or of a tensor shaped like it."""
        return whole.view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: Any) -> list[Fragment]:
    """What this rank holds, of a DeepSpeedEngine: all of every parameter at ZeRO-0."""
    parameters = engine.module.named_parameters()
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [_of(p, Fragment(name, 0, p.numel(), p, 0)) for name, p in parameters]
    found = []
    if stage == 3:
        for name, p in parameters:
            group, offset, numel = zero.grad_position[zero.get_param_id(p)]
            start = engine.global_rank * numel
            numel = min(numel, p.ds_numel - start)  # the last partition is padded
            if numel > 0:
                base = zero.fp32_partitioned_groups_flat[group]
                found.append(Fragment(name, start, numel, base, offset))
        return found
    bases = [group["params"][0] for group in zero.optimizer.param_groups]
    for name, p in parameters:
        if (at := p._hp_mapping) is not None:
            lp, hp = at.lp_fragment_address, at.hp_fragment_address
            base = bases[at.param_group_index]
            found.append(_of(p, Fragment(name, lp.start, lp.numel, base, hp.start)))
    return found


def _of(parameter: torch.Tensor, f: Fragment) -> Fragment:
    """A fragment of what this rank has of a parameter, as one of the whole."""
    share = Share.of(parameter)
    return replace(f, start=share.start + f.start, share=share) if share else f


def snapshot(engine: Any, rank: int, world_size: int) -> dict[str, Any]:
    """A copy, on the CPU, of what this rank saves; at ZeRO-0 the ranks share the work.

    `{"step": AdamW's count, "fragments": {name: {"start": int, kind: (numel,) float32}}}`
    """
    adam = _adam(engine)
    own = fragments(engine)
    if engine.zero_optimization_stage() == 0:
        own = [share for f in own for share in _share(f, rank, world_size)]
    saved: dict[str, Any] = {}
    for f in own:
        tensors = _tensors(adam, f.base)
        copies = {kind: f.part(tensors[kind]).to("cpu", copy=True) for kind in KINDS}
        saved[f.name] = {"start": f.start, **copies}
    step = float(adam.state[own[0].base]["step"]) if own else 0.0  # all count alike
    return {"step": step, "fragments": saved}


@torch.no_grad()
def restore(engine: Any, files: Sequence[Mapping[str, Any]]) -> None:
    """Fill this rank's fragments from the snapshots of all ranks that saved.

    Collective at ZeRO 1 to 3 (the low-precision weights are gathered). Raises KeyError or
    ValueError where the files do not cover a fragment: they are of another model.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    adam, step = _adam(engine), max(file["step"] for file in files)
    if stage == 3:
        zero.checkpoint_event_prologue()
    for f in fragments(engine):
        into = _tensors(adam, f.base)
        adam.state[f.base]["step"].fill_(step)
        covered = 0
        for file in files:
            saved = file["fragments"].get(f.name)
            if saved is None:
                continue
            low = max(f.start, saved["start"])
            high = min(f.start + f.numel, saved["start"] + len(saved["master"]))
            if low < high:
                covered += high - low
                for kind in KINDS:
                    source = saved[kind][low - saved["start"] : high - saved["start"]]
                    f.part(into[kind])[low - f.start : high - f.start].copy_(source)
        if covered != f.numel:
            raise ValueError(f"{f.name}: {covered} of {f.numel} elements are in the checkpoint")
    if stage == 3:
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
    elif stage:
        zero.update_lp_params()


def _tensors(adam: torch.optim.Optimizer, base: torch.Tensor) -> dict[str, torch.Tensor]:
    """The base and its moments by kind; before AdamW's first step they are made as it would."""
    state = adam.state[base]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=base.device)
        for kind in KINDS[1:]:
            state[kind] = torch.zeros_like(base, memory_format=torch.preserve_format)
    return {"master": base.detach(), **{kind: state[kind] for kind in KINDS[1:]}}


def _share(f: Fragment, rank: int, world_size: int) -> Iterator[Fragment]:
    """The rank's share of a fragment that every rank holds; nothing where it is too small."""
    if f.share:
        rank, world_size = f.share.replica, f.share.replicas
    low, high = (f.numel * r // world_size for r in (rank, rank + 1))
    if low < high:
        yield Fragment(f.name, f.start + low, high - low, f.base, f.offset + low)


def _adam(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was given to DeepSpeed, which wraps it but at ZeRO-0 in fp32."""
    adam: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return adam
