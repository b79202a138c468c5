"""The command that starts the ranks, by DeepSpeed's launcher."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

RANK = "sparse_gpt.train"  # the module that is a rank


@dataclass(frozen=True)
class Launch:
    """A command that starts the ranks, and what its environment has beyond this one."""

    world_size: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()  # where the ranks run, if not here
    job: str = ""  # by which they are found there

    @property
    def remote(self) -> bool:
        """Whether the ranks run on other hosts."""
        return bool(self.hosts)

    @property
    def arguments(self) -> list[str]:
        """What a rank gets."""
        return self.command[self.command.index(RANK) + 1 :]

    def __str__(self) -> str:
        """A line for a shell: the command after the environment that it needs beyond this one."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def deepspeed_command(options: list[str], arguments: Sequence[str]) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=critical"]
    return [*runner, *options, "--module", RANK, *arguments]
