"""`deepspeed` exits 0, as if all were well, when a signal ends the launcher below it.

DS_ACCELERATOR=cpu python runner_exit_code.py
"""

import contextlib
import os
import signal
import subprocess
import sys

RANK = "import os, time; print('rank', os.getpid(), os.getppid(), flush=True); time.sleep(60)"
command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=1", "--no_local_rank"]
command += ["--no_python", sys.executable, "-c", RANK]

with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
    words = next(line.split() for line in runner.stdout if line.startswith("rank "))
    rank, launcher = map(int, words[1:])
    os.kill(launcher, signal.SIGKILL)
    code = runner.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, signal.SIGTERM)  # nobody else does
print(f"the launcher was killed by signal 9; the runner's exit code is {code}")
sys.exit(code == 0)
