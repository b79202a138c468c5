"""launch/kubernetes.yaml: its parts fit together, and its pods' command trains. No cluster here: a
pod is a process, with the environment that the Job would give it."""

import re
import signal
import socket
import subprocess
from typing import Any

import pytest
import yaml
from ranks import ROOT, metrics

from sparse_gpt.train.distributed import PREEMPTED

FILE = ROOT / "launch/kubernetes.yaml"


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """By kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(FILE.read_text())}


@pytest.fixture
def start_pod(objects, shell, tmp_path, shards):
    """Starts a pod whose volume is `tmp_path`: its number, how many there are, ranks in each."""
    (container,) = objects["Job"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/corpus").symlink_to(shards)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(index, nodes, ranks, *overrides):
        env = {one["name"]: one.get("value") for one in container["env"]}
        env |= {"NODES": str(nodes), "GPUS": str(ranks), "JOB_COMPLETION_INDEX": str(index)}
        env |= {"FIRST_POD": f"127.0.0.1:{port}", "POD_IP": "127.0.0.1"}
        words = [*container["command"], *container["args"], *overrides]
        words = [re.sub(r"\$\((\w+)\)", lambda name: env[name[1]], word) for word in words]
        words = [word.replace("/shared/", f"{tmp_path}/") for word in words]
        return subprocess.Popen(
            words, env=shell | env, stdout=subprocess.PIPE, stderr=-2, text=True
        )

    return start


def test_its_parts_fit_together(objects):
    claim, service, job = (objects[k] for k in ("PersistentVolumeClaim", "Service", "Job"))
    template = job["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}

    # As many pods as nodes, and ranks as GPUs.
    nodes = job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert nodes == job["spec"]["parallelism"] == int(env["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["GPUS"])

    # The first pod is where the others look for it.
    labels = template["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["clusterIP"] == "None"
    names = job["metadata"]["name"], service["metadata"]["name"]
    host, port = env["FIRST_POD"].split(":")
    assert host == f"{names[0]}-0.{names[1]}"
    assert pod["subdomain"] == names[1]
    assert int(port) in [one["containerPort"] for one in container["ports"]]
    given = {"JOB_COMPLETION_INDEX", *env}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= given

    # Every mount has a volume, and what outlives the Job can be written from every node.
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claimed = mounts["/shared"]["persistentVolumeClaim"]["claimName"]
    assert claimed == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    paths = [word.rpartition("=")[2] for word in container["args"] if "/" in word]
    assert len(paths) == 3
    assert all(path.startswith("/shared/") for path in paths)

    # A new pod for one that was told to stop, none for bad input.
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert codes == {2: "FailJob", PREEMPTED: "Ignore"}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    assert rules[-1] == {"action": "Ignore", "onPodConditions": disrupted}
    assert pod["restartPolicy"] == "Never"  # else Kubernetes refuses a podFailurePolicy
    patience = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert patience < pod["terminationGracePeriodSeconds"]


def test_a_pod_trains(start_pod, run_file, tmp_path):
    run_file.rename(tmp_path / "124m.yaml")
    pod = start_pod(0, 1, 2)
    output, _ = pod.communicate(timeout=300)
    assert pod.returncode == 0, output
    assert metrics(tmp_path / "runs/124m")[-1]["step"] == 16


@pytest.mark.long
def test_pods_stop_together_and_new_ones_go_on(start_pod, long_run_file, wait_for_steps, tmp_path):
    long_run_file.rename(tmp_path / "124m.yaml")
    run_dir = tmp_path / "runs/124m"
    pods = [start_pod(index, 2, 1, "checkpoint.every=1000") for index in (0, 1)]
    wait_for_steps(pods[0], run_dir)
    pods[1].send_signal(signal.SIGTERM)  # this one alone is told
    outputs = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [PREEMPTED, PREEMPTED], outputs
    pods = [start_pod(index, 2, 1, "checkpoint.every=1000") for index in (1, 0)]
    outputs = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    steps = [row["step"] for row in metrics(run_dir) if "train/loss" in row]
    assert steps == list(range(1, 61))

    refused = start_pod(0, 1, 2, "optimizer.lr=high")
    refused.communicate(timeout=300)
    assert refused.returncode == 2
    waiting = start_pod(0, 2, 1)  # for another pod, which does not come
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(10)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(120) == PREEMPTED
