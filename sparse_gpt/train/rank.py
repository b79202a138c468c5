"""One rank of a run, from its arguments to its exit code."""

import os
import sys
import time
import warnings
from pathlib import Path

import torch.distributed as dist

from sparse_gpt.config.load import find_file, load_config
from sparse_gpt.errors import InputError, told
from sparse_gpt.train.arguments import parse
from sparse_gpt.train.checkpoint.checkpoints import CheckpointError
from sparse_gpt.train.distributed import (
    PREEMPTED,
    WITNESS_WAITS,
    end_with_launcher,
    lost_peer,
    read_environment,
)
from sparse_gpt.train.guard import RunStopped
from sparse_gpt.train.loop import train
from sparse_gpt.train.metrics_file import quiet_tensorboard
from sparse_gpt.train.preemption import Preempted, outlast_terminal


def main() -> None:
    args = parse()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about DeepSpeed's calls
    end_with_launcher()
    quiet_tensorboard()
    if os.isatty(1) or os.isatty(2):
        outlast_terminal()
    try:
        train(load_config(find_file(Path(args.config)), args.overrides))
    except InputError as error:
        if read_environment()[1] == 0:  # one a host: what is wrong may be wrong on this one only
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(WITNESS_WAITS)  # torchrun ends all when one ends: the one that speaks first
        os._exit(2)
    except Preempted as preempted:
        dist.barrier()  # a rank that ends alone would have the launcher end the others
        if read_environment()[0] == 0:
            print(preempted, flush=True)
        os._exit(PREEMPTED)
    except (RunStopped, CheckpointError) as error:  # on all ranks
        if read_environment()[0] == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist.barrier()
        os._exit(1)
    except Exception as error:
        cause, seen = told(error), lost_peer(error)
        if cause is None and seen is None:
            raise
        print(f"error: {cause or seen}", file=sys.stderr, flush=True)
        if cause is None:
            time.sleep(WITNESS_WAITS)
        os._exit(1)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads abort about 1 in 200 ordinary exits
