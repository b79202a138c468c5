"""Shards in object storage: copied whole to a local cache, once a machine, before they are opened.

    s3://BUCKET/FOLDER   gs://BUCKET/FOLDER   whatever else fsspec reads

Training reads windows in random order, so its first steps touch every shard: there is nothing to
gain by copying late. Copies are kept in the cache (storage.py), in a folder a data set. Processes
that want one at the same time take turns, so one of them copies.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparse_gpt.data.shards.format import FileEntry, file_entry
from sparse_gpt.data.shards.manifest import MANIFEST, SPLITS, Manifest, read_manifest
from sparse_gpt.data.storage import cache, cannot_be_read, interruptible, open_storage, require_room
from sparse_gpt.data.vocabulary import VOCAB_FILE
from sparse_gpt.errors import DataError
from sparse_gpt.files import locked, publish, publish_bytes, temporary
from sparse_gpt.progress import Progress


def local_folder(folder: str | Path) -> Path:
    """`folder` itself, or of a URL its local copy.

    Raises DataError for a URL that cannot be read or holds no shards, for s3:// and gs:// without
    their extra, a disk without room for the shards, and a file that is not what the manifest says.
    """
    url = str(folder).rstrip("/")
    if "://" not in url:
        return Path(folder)
    copies = cache("shards")
    try:
        with interruptible():
            storage, root = open_storage(url)
            with TemporaryDirectory(prefix=".manifest-", dir=copies) as incoming:
                try:
                    content = storage.cat_file(f"{root}/{MANIFEST}")
                except FileNotFoundError:
                    raise DataError(f"{url}: not a folder of shards (no {MANIFEST})") from None
                Path(incoming, MANIFEST).write_bytes(content)
                manifest = read_manifest(incoming)
            copy = copies / f"{url.rpartition('/')[2]}-{manifest.hash[:16]}"
            copy.mkdir(exist_ok=True)
            with locked(copy / ".lock", wait=True):
                if not (copy / MANIFEST).exists():
                    _copy_all(url, storage, root, manifest, copy)
                    publish_bytes(copy / MANIFEST, content)
    except DataError:
        raise
    except Exception as error:  # each kind of storage has its own
        raise cannot_be_read(url, error) from None
    return copy


def _copy_all(url: str, storage: Any, root: str, manifest: Manifest, copy: Path) -> None:
    wanted: dict[str, FileEntry] = {}
    for shard in (shard for split in SPLITS for shard in manifest.splits[split]):
        wanted |= {f"{shard.name}.bin": shard.bin, f"{shard.name}.idx": shard.idx}
    missing = {name: entry for name, entry in wanted.items() if not (copy / name).exists()}
    total = sum(entry.bytes for entry in missing.values())
    require_room(url, total, copy)
    with Progress("copying", total, True) as bar:
        for name, entry in missing.items():
            path = copy / name
            storage.get_file(f"{root}/{name}", str(temporary(path)))
            if file_entry(temporary(path)) != entry:
                raise DataError(f"{url}/{name}: is not what its manifest says; upload it again")
            publish(path)
            bar.advance(entry.bytes)
    if storage.exists(f"{root}/{VOCAB_FILE}"):  # whoever needs it checks it
        publish_bytes(copy / VOCAB_FILE, storage.cat_file(f"{root}/{VOCAB_FILE}"))
