"""ZeRO-3's universal load: group 0's hyper-parameters for all groups, one `step` for all tensors.

DS_ACCELERATOR=cpu python universal_zero3.py
"""

import argparse
import contextlib
import os
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as to_universal

os.environ["LOCAL_RANK"] = "0"
deepspeed.utils.logger.setLevel("ERROR")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def build(**checkpoint):
    model = torch.nn.Linear(4, 4)
    groups = [
        {"params": [model.weight], "weight_decay": 0.1},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-3)
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}, "checkpoint": checkpoint}
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0], adam


def step(engine):
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()


with tempfile.TemporaryDirectory() as folder:
    engine, adam = build()
    step(engine)
    engine.save_checkpoint(folder, tag="saved")
    with contextlib.redirect_stdout(sys.stderr):
        to_universal(
            argparse.Namespace(
                input_folder=f"{folder}/saved",
                output_folder=f"{folder}/universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    other, loaded = build(load_universal=True)
    other.load_checkpoint(folder)

saved_decay = [group["weight_decay"] for group in adam.param_groups]
loaded_decay = [group["weight_decay"] for group in loaded.param_groups]
step(engine)
step(other)
saved_steps = [int(state["step"]) for state in adam.state.values()]
loaded_steps = [int(state["step"]) for state in loaded.state.values()]
print(f"weight decay of the two groups: saved {saved_decay}, loaded {loaded_decay}")
print(f"AdamW's counts one step later: saved {saved_steps}, loaded {loaded_steps}")
sys.exit(saved_decay != loaded_decay or saved_steps != loaded_steps)
