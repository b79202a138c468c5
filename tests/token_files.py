"""Other tools' token files for tests, and what is in shards made of them."""

import base64
import itertools
import struct
from pathlib import Path

import numpy as np

from sparse_gpt.data import import_shards
from sparse_gpt.data.shards.format import INDEX
from sparse_gpt.data.shards.manifest import SPLITS, read_manifest

FORMATS = ("megatron", "llmc", "nanogpt")
E = 50256  # GPT-2's end of text
THREE = [np.array([E, 1, 2]), np.array([E]), np.array([E, 3, 4, 5])]
STREAM = [1, 2, E, E, 3, 4, 5, E]  # the same with end of text after each


def documents(folder: Path) -> dict[str, list[list[int]]]:
    """Every document's ids by split, as the index has them."""
    manifest = read_manifest(folder)
    found: dict[str, list[list[int]]] = {}
    for split in SPLITS:
        found[split] = []
        for shard in manifest.splits[split]:
            tokens = np.fromfile(folder / f"{shard.name}.bin", manifest.dtype, offset=1024)
            starts = np.fromfile(folder / f"{shard.name}.idx", INDEX)["start"]
            found[split] += [part.tolist() for part in np.split(tokens, starts[1:])]
    return found


def hashes(folder: Path) -> list[int]:
    shards = read_manifest(folder).splits.values()
    indexes = [np.fromfile(folder / f"{s.name}.idx", INDEX) for split in shards for s in split]
    return [h for index in indexes for h in index["hash"].tolist()]


def back(exported: Path, format: str, out: Path, **options: object) -> None:
    """Import what `export_shards` wrote."""
    names = sorted(path for path in exported.iterdir() if path.suffix == ".bin")
    sources = [path for path in names if "train" in path.name]
    held_out = [path for path in names if "val" in path.name]
    import_shards(sources, format, out, held_out=held_out, **options)


def write_vocabulary(path: Path, size: int) -> Path:
    """A rank file of `size` ids, end of text (the last) included."""
    tokens = itertools.chain(
        (bytes([i]) for i in range(256)), (struct.pack(">H", i) for i in range(2**16))
    )
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n"
        for rank, token in enumerate(itertools.islice(tokens, size - 1))
    )
    path.write_text("".join(lines))
    return path


def write_megatron(
    prefix: Path, tokens: np.ndarray, lengths: list[int], bounds: list[int], code: int
) -> None:
    tokens.tofile(f"{prefix}.bin")
    pointers = [0, *itertools.accumulate(n * tokens.itemsize for n in lengths)][:-1]
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(bounds))
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(bounds, "<i8"))
    Path(f"{prefix}.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


def write_llmc(path: Path, tokens: list[int], dtype: str = "u2") -> Path:
    known = {"u2": (20240520, 1), "u4": (20240801, 7)}[dtype]
    head = np.array([*known, len(tokens), *[0] * 253], np.int32)
    path.write_bytes(head.tobytes() + np.array(tokens, dtype).tobytes())
    return path
