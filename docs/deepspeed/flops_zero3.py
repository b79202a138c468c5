"""The flops profiler counts every linear layer twice under ZeRO-3.

DS_ACCELERATOR=cpu python flops_zero3.py
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.profiling.flops_profiler import FlopsProfiler

os.environ["LOCAL_RANK"] = "0"
deepspeed.utils.logger.setLevel("ERROR")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

counts = []
for stage in (0, 3):
    model = torch.nn.Linear(64, 32, bias=False)
    adam = torch.optim.AdamW(model.parameters())
    config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    profiler = FlopsProfiler(engine.module)
    profiler.start_profile()
    engine(torch.ones(8, 64))
    counts.append(profiler.get_total_flops())
    profiler.end_profile()
print(f"FLOPs of an (8, 64) x (64, 32) product, {2 * 8 * 64 * 32}: at ZeRO 0 and 3 {counts}")
sys.exit(counts[0] != counts[1])
