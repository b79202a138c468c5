"""launch/train.py on a machine of which rank 1 errs.

    faulty_train.py --fault KIND STEP [--fault KIND STEP ...] ARGUMENTS OF train.py

Each fault happens once, in the step that follows STEP completed ones; given twice, it happens again
when the step is. KIND is one of
    loss   what the first block puts out is NaN          flip   a bit of a weight turns over
    grad   its gradient is Inf                           spike  its gradient is 10,000 times itself
"""

import sys
from typing import Any

import torch

from sparse_gpt.train import loop, rank
from sparse_gpt.train.engine import Engine

faults: list[tuple[str, int]] = []
while "--fault" in sys.argv:
    at = sys.argv.index("--fault")
    faults.append((sys.argv[at + 1], int(sys.argv[at + 2])))
    del sys.argv[at : at + 3]


class FaultyEngine(Engine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kinds: list[str] = []
        if self.world.rank == 1:
            self.module.blocks[0].register_forward_hook(self.err)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor, step: int, *rest: Any) -> Any:
        self.kinds = list(dict.fromkeys(kind for kind, when in faults if when == step))
        for kind in self.kinds:
            faults.remove((kind, step))
        if self.world.rank == 1 and "flip" in self.kinds:
            weight = self.module.blocks[1].attention.qkv.weight
            bits = weight.data.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
            bits[3, 5] ^= 1
        result = super().step(tokens, targets, step, *rest)
        self.kinds = []
        return result

    def err(self, block: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if "loss" in self.kinds:
            return output * float("nan")
        if "grad" in self.kinds:
            output.register_hook(lambda grad: grad * float("inf"))
        if "spike" in self.kinds:
            output.register_hook(lambda grad: grad * 1e4)
        return output


loop.Engine = FaultyEngine
rank.main()
