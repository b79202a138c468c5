"""A generator in a process of its own: native code that is given damaged bytes may end its process,
and that is then an error of one file."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from sparse_gpt.errors import DataError, Resumable

Fact = TypeVar("Fact")
# By `python -c`, not `multiprocessing`: workers may not have processes of their own by that, nor
# scripts without `if __name__ == "__main__":`.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from {} import _serve; _serve(int(sys.argv[1]))"


class _Reader:
    """The process. It ends when this end of the connection is closed, as by our own end."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-c", _PROGRAM.format(__name__), str(theirs.fileno()), *sys.path]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[theirs.fileno()]
        )
        theirs.close()


_idle: list[_Reader] = []  # a process takes a second to start


def isolated(
    what: str, function: Callable[..., Iterator[tuple[Fact, bytes]]], *arguments: Any
) -> Iterator[tuple[Fact, bytes]]:
    """What `function(*arguments)` yields in another process: pairs of anything and of what may be
    large. Raises what it raises, of DataError and OSError; DataError that names `what` if the
    process dies of it; and Resumable if it was killed."""
    try:
        reader = _idle.pop()
    except IndexError:
        reader = _Reader()
    whole = False
    try:
        reader.connection.send((os.getcwd(), function, arguments))
        while (message := reader.connection.recv())[0]:
            yield message[1], reader.connection.recv_bytes()
        whole = True
    except (EOFError, OSError):
        code = reader.process.wait()
        if code == -signal.SIGKILL:
            raise Resumable(
                f"{what}: its reader was killed, as the system does when memory runs out; run "
                "again with fewer workers"
            ) from None
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise DataError(
            f"{what}: damaged so that reading it ended in {how}; fetch the file again, or leave "
            "it out"
        ) from None
    finally:
        if whole:
            _idle.append(reader)
        else:
            reader.process.kill()
            reader.process.wait()
            reader.connection.close()
    if message[1] is not None:
        raise message[1]


def _serve(handle: int) -> None:
    """Be the process: (True, fact) and content for each pair, then (False, what was raised)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupts are the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(handle)
    try:
        while True:
            folder, function, arguments = connection.recv()
            os.chdir(folder)
            error = None
            try:
                for fact, content in function(*arguments):
                    connection.send((True, fact))
                    connection.send_bytes(content)  # without the copies that a pickle makes
            except (DataError, OSError) as raised:
                error = raised
            connection.send((False, error))
    except (EOFError, OSError):
        os._exit(0)
