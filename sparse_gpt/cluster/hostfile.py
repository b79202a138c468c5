"""Ranks on the hosts of a DeepSpeed hostfile.

DeepSpeed's runner reaches them through pdsh and ssh, and what it sends passes through a shell there
that it quotes hardly: nothing that such a shell would read otherwise is given to it.
"""

import os
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from sparse_gpt.cluster.launcher import Launch, deepspeed_command
from sparse_gpt.errors import ConfigError
from sparse_gpt.files import real
from sparse_gpt.train.arguments import PLAIN, encoded

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+max_slots=\d+)?\s*")
_PORTS = range(20_000, 30_000)  # which Linux gives to nobody by itself


def on_hosts(hostfile: Path, arguments: Sequence[str], master_port: int | None = None) -> Launch:
    """Every slot of a DeepSpeed hostfile (`name slots=8` a line), reached through pdsh and ssh; the
    ranks of a single host here are started here.

    Raises ConfigError for a hostfile that is none, and for a folder that cannot be named to the
    hosts.
    """
    slots = _slots(hostfile)
    port = master_port or secrets.choice(_PORTS)  # another for each job on the hosts
    options = ["--hostfile", str(real(hostfile)), "--master_port", str(port)]
    if len(slots) == 1 and _is_here(*slots):
        return Launch(sum(slots.values()), deepspeed_command(options, arguments))
    for what, path in (("the current folder", os.getcwd()), ("Python", sys.executable)):
        if not PLAIN.fullmatch(path):
            raise ConfigError(
                f"{path}: {what} has a name that a shell on the hosts would read otherwise; use "
                "letters, digits and ._-/"
            )
    if len(slots) == 1:
        options.append("--force_multi")  # else DeepSpeed would start its ranks here
    job = secrets.token_hex(8)
    words = ["--job", job, *encoded(arguments)]
    command = deepspeed_command(options, words)
    return Launch(sum(slots.values()), command, hosts=tuple(slots), job=job)


def environment_files() -> list[Path]:
    """The files whose lines NAME=VALUE DeepSpeed gives to the ranks of all hosts, if there are any.

    Raises ConfigError for a line that is none.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    found = [path for path in (Path.home() / name, Path(name)) if path.is_file()]
    for path in found:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if not re.match(r"\s*[A-Za-z_]\w*\s*=", line):
                raise ConfigError(f"{path}:{number}: is not NAME=VALUE: {line!r}")
    return found


def _slots(hostfile: Path) -> dict[str, int]:
    try:
        text = hostfile.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{hostfile}: {error.strerror}; give the path of a hostfile") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{hostfile}: is not UTF-8 text; give the path of a hostfile") from None
    if text.startswith("\ufeff"):
        raise ConfigError(f"{hostfile}: begins with a byte-order mark; save it without")
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or not PLAIN.fullmatch(match[1]):
            raise ConfigError(f"{hostfile}:{number}: is not `name slots=N`: {line!r}")
        name, count = match[1], int(match[2])
        if count == 0:
            raise ConfigError(f"{hostfile}:{number}: {name} has no slots; leave the line out")
        if name in slots:
            raise ConfigError(f"{hostfile}:{number}: names {name} twice; add up its slots")
        slots[name] = count
    if not slots:
        raise ConfigError(f"{hostfile}: names no host; write `name slots=N`, one a line")
    return slots


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    own = {one.address for each in psutil.net_if_addrs().values() for one in each}
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return host == socket.gethostname()
    return bool(found & own) or host == socket.gethostname()
