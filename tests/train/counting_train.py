"""launch/train.py that says how many elements its ranks reduced in its last optimizer step.

counting_train.py ARGUMENTS OF train.py
"""

from typing import Any

import torch.distributed as dist

from sparse_gpt.train import loop, rank
from sparse_gpt.train.engine import Engine

reduced = 0


def counting(name: str) -> None:
    call, input_at = getattr(dist, name), 1 if "scatter" in name else 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        global reduced
        tensor = arguments[input_at] if len(arguments) > input_at else keywords["tensor"]
        reduced += tensor.numel()
        return call(*arguments, **keywords)

    setattr(dist, name, counted)


for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
    counting(name)


class CountingEngine(Engine):
    def step(self, *arguments: Any) -> Any:
        global reduced
        reduced = 0
        result = super().step(*arguments)
        print(f"reduced {reduced} elements", flush=True)
        return result


loop.Engine = CountingEngine
rank.main()
