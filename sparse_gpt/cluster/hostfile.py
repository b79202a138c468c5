"""Ranks on the hosts of a DeepSpeed hostfile."""

from collections.abc import Sequence
from pathlib import Path

from sparse_gpt.cluster.launcher import Launch, deepspeed_command
from sparse_gpt.errors import ConfigError


def on_hosts(hostfile: Path, arguments: Sequence[str]) -> Launch:
    """Every slot of a DeepSpeed hostfile (`name slots=8` a line), reached through pdsh and ssh."""
    slots = _slots(hostfile)
    command = deepspeed_command(["--hostfile", str(hostfile.resolve())], arguments)
    return Launch(sum(slots.values()), command, hosts=tuple(slots))


def _slots(hostfile: Path) -> dict[str, int]:
    try:
        lines = hostfile.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{hostfile}: {error.strerror}; give the path of a hostfile") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, _, count = line.partition(" slots=")
        if not name.strip() or not count.strip().isdigit():
            raise ConfigError(f"{hostfile}:{number}: is not `name slots=N`: {line!r}")
        if name.strip() in slots:
            raise ConfigError(f"{hostfile}:{number}: names {name.strip()} twice; add up its slots")
        slots[name.strip()] = int(count)
    if not slots:
        raise ConfigError(f"{hostfile}: names no host; write `name slots=N`, one a line")
    return slots
