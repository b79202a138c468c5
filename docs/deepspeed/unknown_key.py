"""An unknown key at the top level of the configuration is ignored without a word.

DS_ACCELERATOR=cpu python unknown_key.py
"""

import sys

import deepspeed
import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(4, 4)
adam = torch.optim.AdamW(model.parameters())
config = {"train_batch_size": 1, "zero_optimisation": {"stage": 2}, "gradient_cliping": 1.0}
engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
stage, clip = engine.zero_optimization_stage(), engine.gradient_clipping()
print(f"asked, misspelt, for stage 2 and clipping at 1.0: got stage {int(stage)}, clipping {clip}")
sys.exit(1)
