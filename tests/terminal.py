"""Commands in a fork of this process, on a terminal or into a pipe: torch is imported once."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import traceback
from collections.abc import Sequence

from sparse_gpt.cli.main import main


def told(
    words: Sequence[str], columns: int = 120, encoding: str = "utf-8", terminal: bool = False
) -> tuple[str, int]:
    """What a command prints, as who reads it gets it, and its exit code."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = os.fork()
    if not child:
        code = 70
        try:
            os.close(reader)
            for stream in (1, 2):
                os.dup2(writer, stream)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(os.fdopen(stream, "wb"), encoding=encoding, write_through=True)
                for stream in (1, 2)
            )
            os.environ.pop("COLUMNS", None)
            os.environ |= {"TERM": "xterm"} if terminal else {"COLUMNS": str(columns)}
            sys.argv = ["sparse-gpt", *words]
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writer)
    said = b""
    try:
        while part := os.read(reader, 65536):
            said += part
    except OSError:  # a terminal that nobody writes to any more
        pass
    os.close(reader)
    return said.decode(encoding), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
