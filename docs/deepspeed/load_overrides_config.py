"""ZeRO 1 and 2: a load replaces the configuration's gradient clipping by the checkpoint's.

DS_ACCELERATOR=cpu python load_overrides_config.py
"""

import os
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist

os.environ["LOCAL_RANK"] = "0"
deepspeed.utils.logger.setLevel("ERROR")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def build(stage, clip):
    model = torch.nn.Linear(4, 4)
    adam = torch.optim.AdamW(model.parameters())
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": clip,
    }
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


overridden = False
for stage in (1, 2, 3):
    with tempfile.TemporaryDirectory() as folder:
        engine = build(stage, clip=1.0)
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        engine.save_checkpoint(folder)
        engine = build(stage, clip=0.25)
        engine.load_checkpoint(folder)
    used = engine.optimizer.clip_grad
    print(f"ZeRO {stage}: saved with clipping 1.0, configured 0.25; after the load {used}")
    overridden |= used != 0.25
sys.exit(overridden)
