"""One rank in this process."""

from one_rank import train_here, world  # noqa: F401 - fixtures
