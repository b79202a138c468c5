"""Small yes-or-no questions that the ranks settle together, without holding up the step."""

from typing import Any

import torch
import torch.distributed as dist

from sparse_gpt.train.distributed import World


class Votes:
    """Each step every rank casts its flags; the answer to the step before is there at once.

    A flag counts if any rank raised it. The vote goes over gloo while the next step computes, so it
    neither waits for a device nor for a slow rank. All ranks get the same answer at the same step.
    """

    def __init__(self, world: World) -> None:
        # A group of its own: DeepSpeed's collectives go on in the default one meanwhile.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._open: tuple[torch.Tensor, dist.Work | None] | None = None

    def cast(self, *flags: bool) -> list[bool] | None:
        """Cast this step's flags and return what all ranks said at the step before.

        None at the first step, and at the first after `now`.
        """
        settled = self._settle()
        box = torch.tensor(flags, dtype=torch.uint8)
        self._open = box, self._reduce(box, wait=False)
        return settled

    def now(self, *flags: bool) -> list[bool]:
        """Cast flags and wait for the answer; what was open before is dropped."""
        self._settle()
        box = torch.tensor(flags, dtype=torch.uint8)
        self._reduce(box, wait=True)
        return [bool(flag) for flag in box.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, of any kind, in their order. What was open before is dropped."""
        self._settle()
        box = [value]
        if self._group is not None:
            box *= dist.get_world_size(self._group)
            dist.all_gather_object(box, value, self._group)
        return box

    def _settle(self) -> list[bool] | None:
        if self._open is None:
            return None
        box, work = self._open
        self._open = None
        if work is not None:
            work.wait()
        return [bool(flag) for flag in box.tolist()]

    def _reduce(self, box: torch.Tensor, wait: bool) -> dist.Work | None:
        if self._group is None:
            return None
        work: dist.Work | None = dist.all_reduce(
            box, dist.ReduceOp.MAX, self._group, async_op=not wait
        )
        return work
