"""ZeRO 0 in bf16 or fp16: `deepspeed.initialize` takes an AdamW step on zero gradients.

DS_ACCELERATOR=cpu python phantom_step.py
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist

os.environ["LOCAL_RANK"] = "0"
deepspeed.utils.logger.setLevel("ERROR")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

model = torch.nn.Linear(4, 4, bias=False)
torch.nn.init.ones_(model.weight)
adam = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
config = {"train_batch_size": 1, "bf16": {"enabled": True}}
engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)

[[master]] = engine.optimizer.fp32_groups
steps = int(adam.state[master]["step"]) if master in adam.state else 0
weight, fp32 = model.weight.max().item(), master.max().item()
print(f"before the first step: AdamW's count {steps}, weight {weight}, its fp32 master {fp32:.2f}")
sys.exit(steps != 0 or fp32 != weight)
