"""The errors that are the user's to mend: one line that names the file, line or key, what is wrong
with it and what to do. The command line prints it without a traceback and exits 2."""

import difflib
from collections.abc import Iterable

_LONGEST = 4000  # characters of a line


class InputError(ValueError):
    """Bad input, of either kind below; one line to be read, whatever the input that it quotes."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-200:]}"


class DataError(InputError):
    """Bad input to the data rooms, or a bad data set."""


class Resumable(DataError):
    """An error of `prepare` after which the finished units are of use: the next run goes on from
    them."""


class ConfigError(InputError):
    """A run cannot be what its configuration says."""


def told(error: BaseException) -> str | None:
    """The one line that says an error which is the user's to mend; None for any other. A file that
    the system refuses is one of them, in whatever command."""
    if isinstance(error, OSError) and error.filename is not None:
        # Of two names the second is the user's: a temporary file was to become it.
        error = InputError(f"{error.filename2 or error.filename}: {error.strerror}")
    return str(error) if isinstance(error, InputError) else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'n_layer'?" for the known name that is nearest; "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else ""
