"""A universal load leaves persistent buffers as they were, at ZeRO 1, 2 and 3.

DS_ACCELERATOR=cpu python universal_buffers.py
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


def build(stage, **checkpoint):
    model = torch.nn.Linear(4, 4)
    model.register_buffer("average", torch.zeros(()))
    adam = torch.optim.AdamW(model.parameters())
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "checkpoint": checkpoint,
    }
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


lost = False
for stage in (1, 2, 3):
    with tempfile.TemporaryDirectory() as folder:
        engine = build(stage)
        engine.module.average.fill_(7.0)
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
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
        plain, universal = build(stage), build(stage, load_universal=True)
        plain.load_checkpoint(folder, tag="saved")
        universal.load_checkpoint(folder)
    values = [float(e.module.average) for e in (engine, plain, universal)]
    print("ZeRO {}: saved {}, plain load {}, universal load {}".format(stage, *values))
    lost |= values[2] != values[0]
sys.exit(lost)
