"""A gradient of NaN: ZeRO 1 to 3 skip the step, ZeRO 0 in fp32 writes it into the weights.

DS_ACCELERATOR=cpu python nan_zero0.py
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist

os.environ["LOCAL_RANK"] = "0"
deepspeed.utils.logger.setLevel("ERROR")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

spoilt = False
for stage in range(4):
    model = torch.nn.Linear(4, 4)
    adam = torch.optim.AdamW(model.parameters())
    config = {
        "train_batch_size": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    engine.backward(engine(torch.full((1, 4), float("nan"))).sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        finite = bool(model.weight.isfinite().all())
    print(
        f"ZeRO {stage}: weights {'finite' if finite else 'NaN'}, skipped_steps "
        f"{engine.skipped_steps}, global_steps {engine.global_steps}"
    )
    spoilt |= not finite
sys.exit(spoilt)
