"""What other file systems refuse, refused here by the kernel."""

import ctypes
import platform
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

T = TypeVar("T")

_NUMBERS = {
    "x86_64": {"access": 21, "flock": 73, "fsync": 74, "link": 86, "linkat": 265}
    | {"faccessat": 269, "faccessat2": 439},
    "aarch64": {"flock": 32, "fsync": 82, "linkat": 37, "faccessat": 48, "faccessat2": 439},
}
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2  # prctl.h
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # of BPF
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # seccomp.h


def where_refused(calls: dict[str, int], work: Callable[[], T]) -> T:
    """What `work` returns or raises in a thread, and threads of it, in which these system calls
    end with these errors."""
    known = _NUMBERS.get(platform.machine())
    if platform.system() != "Linux" or known is None:
        pytest.skip("system calls can be refused on Linux alone, x86_64 or aarch64")
    program = [(_LOAD, 0, 0, 0)]
    for name, error in calls.items():
        if name in known:
            program += [(_EQUAL, 0, 1, known[name]), (_RETURN, 0, 0, _ERRNO | error)]
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *one) for one in program)

    def run() -> T:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        buffer = ctypes.create_string_buffer(code, len(code))
        filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
        unused = ctypes.c_ulong(0)
        if prctl(_SET_NO_NEW_PRIVS, 1, unused, unused, unused) or prctl(
            _SET_SECCOMP, _FILTER, filters
        ):
            pytest.skip("the kernel takes no filter of system calls here")
        return work()

    with ThreadPoolExecutor(1) as thread:  # the filter ends with it
        return thread.submit(run).result()
