"""SIGTERM to `deepspeed` ends the runner alone: the ranks hear nothing and go on, orphaned.

DS_ACCELERATOR=cpu python runner_signal.py
"""

import os
import signal
import subprocess
import sys
import time

RANK = "import os, time; print('rank', os.getpid(), flush=True); time.sleep(60)"
command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=1", "--no_local_rank"]
command += ["--no_python", sys.executable, "-c", RANK]

with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
    words = next(line.split() for line in runner.stdout if line.startswith("rank "))
    rank = int(words[1])
    runner.terminate()
    code = runner.wait()
    time.sleep(10)
    try:
        os.kill(rank, signal.SIGTERM)  # also ends it
        alive = True
    except ProcessLookupError:
        alive = False
print(f"the runner ended with {code}; 10 seconds later the rank is {'alive' if alive else 'gone'}")
sys.exit(alive)
