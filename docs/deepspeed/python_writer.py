"""`checkpoint.writer: {type: python}` writes checkpoints that it cannot load.

DS_ACCELERATOR=cpu python python_writer.py
"""

import os
import pickle
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist

os.environ.update(LOCAL_RANK="0", CROSS_RANK="0", CROSS_SIZE="1")
deepspeed.utils.logger.setLevel("ERROR")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

model = torch.nn.Linear(4, 4)
adam = torch.optim.AdamW(model.parameters())
config = {
    "train_batch_size": 1,
    "zero_optimization": {"stage": 3},
    "checkpoint": {"writer": {"type": "python"}},
}
engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
engine.backward(engine(torch.ones(1, 4)).sum())
engine.step()
with tempfile.TemporaryDirectory() as folder:
    engine.save_checkpoint(folder)
    try:
        engine.load_checkpoint(folder)
    except pickle.UnpicklingError as error:
        print("saved, but not loaded:", str(error).split("error: ")[-1].split(". ")[0])
        sys.exit(1)
print("saved and loaded")
