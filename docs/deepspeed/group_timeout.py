"""ZeRO's clone of the world group does not take over the timeout that the world group was given.

DS_ACCELERATOR=cpu python group_timeout.py
"""

import os
import sys
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

os.environ["LOCAL_RANK"] = "0"
deepspeed.utils.logger.setLevel("ERROR")
given = timedelta(minutes=2)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=given)

model = torch.nn.Linear(4, 4)
adam = torch.optim.AdamW(model.parameters())
config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)


def timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout


world, zero = timeout(dist.group.WORLD), timeout(engine.optimizer.dp_process_group)
print(f"timeout of the world group {world}, of the group that ZeRO reduces in {zero}")
sys.exit(zero != given)
