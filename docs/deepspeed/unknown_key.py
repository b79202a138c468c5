"""An unknown key at the top level of the configuration is ignored without a word.

DS_ACCELERATOR=cpu python unknown_key.py
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist

os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

model = torch.nn.Linear(4, 4)
adam = torch.optim.AdamW(model.parameters())
config = {"train_batch_size": 1, "zero_optimisation": {"stage": 2}}
try:
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
except Exception as error:
    print("refused:", error)
    sys.exit(0)
print(f"asked for `zero_optimisation: stage 2`, got stage {int(engine.zero_optimization_stage())}")
sys.exit(1)
