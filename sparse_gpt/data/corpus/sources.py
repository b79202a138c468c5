"""Which files the sources are.

A source is a file, a folder (its files with a known suffix, recursively), a glob, or a data set of
the hub (`hf:NAME[:SUBSET][:SPLIT]`). The suffixes .jsonl, .ndjson and .json mean JSON Lines,
.parquet rows of columns, anything else UTF-8 text; .gz and .zst after any of them but .parquet are
undone.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_gpt.data.corpus.hub import HUB
from sparse_gpt.errors import DataError

SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class SourceFile:
    """One input file: where it is, its name without the way to it, and "text", "jsonl", "parquet"
    or "hub"; codec: "gzip" or "zstd" if it is compressed."""

    path: Path
    name: str
    kind: str
    codec: str | None = None


def find_files(sources: Sequence[str | Path], rows: bool = False) -> list[SourceFile]:
    """The files of all sources, each source's in sorted order; raises DataError if there is none,
    a source does not exist, a file comes twice, or has no `rows` to choose from."""
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if str(source).startswith(HUB):
            files.append(SourceFile(path, str(source), "hub"))
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if _is_known(p) and p.is_file())
            if not found:
                raise DataError(
                    f"{path}: the folder holds no {', '.join(SUFFIXES)} file, compressed or not"
                )
            files += [_source_file(p, p.relative_to(path).as_posix()) for p in found]
        elif path.exists():
            files.append(_source_file(path, path.name))
        elif glob.has_magic(str(source)):
            found = sorted(Path(p) for p in glob.glob(str(source), recursive=True))
            found = [p for p in found if p.is_file()]
            if not found:
                raise DataError(f"{source}: the pattern matches no file")
            files += [_source_file(p, p.name) for p in found]
        else:
            raise DataError(f"{source}: no such file or folder")
    if not files:
        raise DataError("no source given: name a file, a folder or a pattern")
    seen: set[Path] = set()
    for file in files:
        if (real := file.path.resolve()) in seen:
            raise DataError(f"{file.path}: given twice among the sources; name it once")
        if rows and file.kind == "text":
            raise DataError(f"{file.path}: where chooses among rows, but this file is plain text")
        seen.add(real)
    return files


def _suffix(path: Path) -> str:
    """The suffix that says the kind: the one before .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in CODECS else path.suffix


def _is_known(path: Path) -> bool:
    return _suffix(path) in SUFFIXES


def _source_file(path: Path, name: str) -> SourceFile:
    codec = CODECS.get(path.suffix)
    kind = SUFFIXES.get(_suffix(path), "text")
    if codec and kind == "parquet":
        raise DataError(f"{path}: parquet has its own compression; undo the {path.suffix}")
    return SourceFile(path, name, kind, codec)
