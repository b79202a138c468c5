"""ZeRO 1 and 2: `latest` names a tag whose shards are not all there, if a rank dies in a save.

DS_ACCELERATOR=cpu python torn_latest.py
"""

import os
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch


def rank(number, folder):
    os.environ["LOCAL_RANK"] = str(number)
    deepspeed.utils.logger.setLevel("ERROR")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=number, world_size=2)
    model = torch.nn.Linear(4, 4)
    adam = torch.optim.AdamW(model.parameters())
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 2}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    engine.save_checkpoint(folder, tag="first")
    if number == 1:
        engine.checkpoint_engine.save = lambda *_: os._exit(9)  # as if killed while it writes
    engine.save_checkpoint(folder, tag="second")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(rank, (folder,), 2, join=False, start_method="fork")
        for process in torch.multiprocessing.active_children():
            process.join()
        latest = Path(folder, "latest").read_text()
        shards = sorted(path.name for path in Path(folder, latest).glob("*optim_states.pt"))
    print(f"latest names {latest!r}, whose optimizer shards are {shards}, of 2")
    sys.exit(len(shards) != 2)
