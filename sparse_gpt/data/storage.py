"""Other machines' files, read through fsspec, and the folder of this machine in which copies of
them are kept: $SPARSE_GPT_CACHE, or ~/.cache/sparse-gpt. Remove what is no longer wanted."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_gpt.errors import DataError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # by scheme, what reads it
_CONNECT, _SILENT = 30, 60  # seconds that a web server may take, as a whole it may take any time


def cache(kind: str) -> Path:
    """The folder for copies of a kind, which is there."""
    folder = Path(os.environ.get("SPARSE_GPT_CACHE") or Path.home() / ".cache/sparse-gpt") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_storage(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it; raises what fsspec does."""
    import fsspec

    if url.startswith(("http://", "https://")):
        import aiohttp

        client = {
            "trust_env": True,  # the proxies that the environment names
            "timeout": aiohttp.ClientTimeout(sock_connect=_CONNECT, sock_read=_SILENT),
            # A .gz file is to come as one, also where the server calls it an encoding.
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,
        }
        # What is signed must be asked for as it is written; and "::" is no chain of file systems.
        storage, path = fsspec.filesystem("http", client_kwargs=client, encoded="%" in url), url
    else:
        storage, path = fsspec.core.url_to_fs(url)
    storage.invalidate_cache()  # of listings
    return storage, path


@contextmanager
def interruptible() -> Iterator[None]:
    """An interrupt inside ends what fsspec's thread is at, too: else that goes on, and asyncio
    complains of it when the process ends."""
    try:
        yield
    except KeyboardInterrupt:
        from fsspec.asyn import get_loop

        asyncio.run_coroutine_threadsafe(_cancel_all(), get_loop()).result()
        raise


async def _cancel_all() -> None:
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1)


def cannot_be_read(url: str, error: BaseException) -> DataError:
    """What an error of any kind of storage says of a URL, in one line."""
    if (extra := _EXTRAS.get(url.partition("://")[0])) and isinstance(error, ImportError):
        return DataError(f"{url}: reading it needs: pip install 'sparse-gpt[{extra}]'")
    cause = (not isinstance(error, ImportError) and error.__cause__) or error
    reason = str(cause).partition("\n")[0]
    if reason in ("", url) or getattr(cause, "status", None) == 0:  # which says nothing
        reason = type(cause).__name__
    if (status := status_of(error)) is not None:
        reason = f"the server answers {status} {getattr(cause, 'message', '')}".rstrip()
    elif isinstance(cause, FileNotFoundError):
        reason = "is not there; check the address"
    if status in (401, 403) or isinstance(cause, PermissionError):
        reason += "; check the address, and the credentials if it is private"
    return DataError(f"{url}: cannot be read: {reason}")


def status_of(error: BaseException) -> int | None:
    """What a server has answered instead of a file, if that is what the error is about."""
    cause = error.__cause__ or error
    status = getattr(cause, "status" if hasattr(cause, "status") else "code", None)
    return status if isinstance(status, int) and status else None


def require_room(url: str, n_bytes: int, folder: Path) -> None:
    """Raise DataError unless `folder`, in the cache, has room for so much of the URL."""
    if n_bytes > (free := shutil.disk_usage(folder).free):
        raise DataError(
            f"{url}: takes {n_bytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free; "
            "free some, or set SPARSE_GPT_CACHE to a folder on another disk"
        )
