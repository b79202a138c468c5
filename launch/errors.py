"""The error of this room that is the user's to mend. Here, so that the command line need not import
all that a run needs."""


class ConfigError(ValueError):
    """A run cannot be what its configuration says; the message is one line for its author."""
