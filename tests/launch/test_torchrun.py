"""launch/torchrun.sh trains on one machine, and as its last lines say on several."""

import signal
import socket
import subprocess

from ranks import ROOT, metrics

FILE = ROOT / "launch/torchrun.sh"


def test_one_machine_trains_until_it_is_told_to_stop(
    shell, long_run_file, wait_for_steps, tmp_path
):
    command = [FILE, long_run_file, "checkpoint.every=1000"]
    env = shell | {"RANKS": "2"}
    torchrun = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=-3, text=True)
    wait_for_steps(torchrun, tmp_path / "run")
    torchrun.send_signal(signal.SIGTERM)
    output, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 1  # as the file says
    assert "\nstopped on a signal after step " in output
    assert list((tmp_path / "run/checkpoints").iterdir())


def test_two_machines_meet(shell, run_file, tmp_path):
    """Both of them here: the line that is commented out takes the other's place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, _, several = FILE.read_text().partition('--config "$@"\n')
    script = tmp_path / "torchrun.sh"
    head, _, _ = one.rpartition("\nexec torchrun")
    lines = several[several.index("# exec torchrun") :].replace("# ", "")
    assert "node1:29400" in lines
    script.write_text(f"{head}\n{lines.replace('node1:29400', f'127.0.0.1:{port}')}")
    command, env = ["bash", script, run_file], shell | {"RANKS": "1"}
    machines = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [machine.wait(300) for machine in machines] == [0, 0]
    assert metrics(tmp_path / "run")[-1]["step"] == 16
