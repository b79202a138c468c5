"""Every form of input holds the same documents: JSON documents and CSV beside the others."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data import open_shards, prepare
from sparse_gpt.data.corpus.blocks import Reading
from sparse_gpt.data.corpus.documents import Document, read
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import cut
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.errors import DataError

MARK = "<|endoftext|>\n"
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": number, "text": text, "more": [None]} for number, text in enumerate(texts)]


def table(texts: list[str], delimiter: str, end: str) -> str:
    out = io.StringIO()
    quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return out.getvalue()


FORMS: dict[str, Callable[[list[str]], str]] = {
    "a.jsonl": lambda texts: "".join(json.dumps(row) + "\r\n" for row in rows(texts)),
    "a.NDJSON": lambda texts: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows(texts)),
    "lines.json": lambda texts: "\n" + "\n".join(json.dumps(row) for row in rows(texts)),
    "array.json": lambda texts: json.dumps(rows(texts)),
    "pretty.JSON": lambda texts: json.dumps(rows(texts), indent=2, ensure_ascii=False),
    "objects.json": lambda texts: "\r\n".join(json.dumps(row, indent=1) for row in rows(texts)),
    "a.csv": lambda texts: table(texts, ",", "\r\n"),
    "a.TSV": lambda texts: table(texts, "\t", "\n"),
    "a.txt": MARK.join,
    "a.md": lambda texts: MARK.replace("\n", "\r\n").join(texts),
    "a.text": MARK.join,
}
ODD = "ab ,;\"\t\r\n'[]{}\\\u2028\x85\x1cé☃😀"
TEXTS = st.lists(
    st.text(st.sampled_from(ODD) | st.characters(codec="utf-8"), min_size=1)
    .filter(lambda text: not text.isspace() and "\0" not in text and text[0] != "\ufeff"),
    min_size=1,
    max_size=6,
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(texts=TEXTS, suffix=st.sampled_from([*PACK]), mark=st.booleans())
def test_every_form_of_the_same_documents_gives_the_same_ids(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str, mark: bool
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    for name, form in FORMS.items():
        content = "\ufeff" * mark + form(texts)
        (folder / f"{name}{suffix}").write_bytes(PACK[suffix](content.encode()))
    pq.write_table(pa.Table.from_pylist(rows(texts)), folder / "a.parquet", row_group_size=2)
    (folder / "files").mkdir()
    for number, text in enumerate(texts):
        (folder / "files" / f"{number}.Txt").write_bytes(text.encode())
    found = {}
    for source in sorted(folder.iterdir()):
        out = folder.parent / f"{folder.name}-{source.name}"
        prepare([source], out, held_out=0, separator=MARK, keep_separator=False)
        split = open_shards(out).train
        tokens = np.empty((1, split.n_tokens), np.uint16)
        split.read(np.zeros(1, np.int64), tokens)
        found[source.name] = tokens[0].tolist()
    assert len(found) == len(FORMS) + 2
    first = found["a.jsonl" + suffix]
    assert first.count(50256) == len(texts)
    assert {name: ids for name, ids in found.items() if ids != first} == {}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "hub"])
def test_a_dotted_field_reaches_into_objects_and_structs(tmp_path: Path, name: str) -> None:
    made = [
        {"a": {"b": {"c": f"text {n}"}, "lang": "en"}, "a.b": f"own {n}", "n": n} for n in range(30)
    ]
    made[7]["a"]["lang"] = None
    made[8]["a"] = None
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(made), tmp_path / name)
    elif name == "hub":
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(made), tmp_path / name / "train.parquet")
    else:
        text = json.dumps(made) if name == "a.json" else "\n".join(map(json.dumps, made))
        (tmp_path / name).write_text(text)
    source = f"hf:{tmp_path / name}" if name == "hub" else str(tmp_path / name)

    def taken(field: str, **where: str) -> list[str]:
        (file,) = find_files([source])
        reading = Reading(None, field, where=tuple(where.items()))
        return [
            found.text if isinstance(found, Document) else "rejected"
            for found in read(cut(file, None).slices, reading)
        ]

    others = [n for n in range(30) if n not in (7, 8)]
    assert taken("a.b.c", **{"a.lang": "en"}) == [f"text {n}" for n in others]
    assert taken("a.b.c")[7:9] == ["text 7", "rejected"]
    assert taken("a.b") == [f"own {n}" for n in range(30)]
    says = "no key 'a.b.x'; keys there: a, a.b, n|no column 'a.b.x'; 'a' there is struct"
    with pytest.raises(DataError, match=f"{says}|no column 'a.b.x'; columns there"):
        prepare([source], tmp_path / "out", text_field="a.b.x")


def documents(path: Path, content: str | bytes) -> list[Document | Reject]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (file,) = find_files([path])
    return list(read(cut(file, None).slices, Reading(None, "text")))


def test_broken_rows_are_set_aside_with_their_lines(tmp_path: Path) -> None:
    rows = b'id,text\n1,"two\nlines"\n\n2,not, quoted\n3\n4,\xff\n5,fine\n'
    assert documents(tmp_path / "a.csv", rows) == [
        Document("a.csv", 2, "two\nlines"),
        Reject("a.csv", 5, "has 3 fields, the header 2; quote the others"),
        Reject("a.csv", 6, "has 1 fields, the header 2; quote the others"),
        Reject("a.csv", 7, "'text' holds half a surrogate pair, or a byte that is not UTF-8, at "
               "character 0"),
        Document("a.csv", 8, "fine"),
    ]  # fmt: skip
    found = documents(tmp_path / "a.json", '[{"text": "a"},\n"b",\n{"body": 1}, {"text": "c"}]')
    assert found == [
        Document("a.json", 1, "a"),
        Reject("a.json", 2, "not a JSON object; each element must be one"),
        Reject("a.json", 3, "no key 'text'; keys there: body (set the text field)"),
        Document("a.json", 3, "c"),
    ]
    assert documents(tmp_path / "b.json", "[]") == []
    broken = '{"text" "a"}\n{"text": "b"}\n'  # JSON Lines all the same
    assert [type(of_line) for of_line in documents(tmp_path / "c.json", broken)] == [
        Reject,
        Document,
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "id,body\n1,x\n", "no column 'text'; columns there: id, body"),
        ("a.csv", "text,text\n1,x\n", "has 2 columns 'text'; rename one"),
        ("a.csv", 'text\nfine\n"open\n', r"a\.csv:3: not CSV: unexpected end of data; within"),
        ("a.tsv", 'text\n"a"b\n', r"a\.tsv:2: not TSV: ' ' expected after '\"'; within"),
        ("a.json", '[{"text": "a"},\n{"text": ', r"a\.json:2: not JSON: Expecting value; mend"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"a\.json:2: not JSON: Expecting ',' or"),
        ("a.json", "[" * 100_000, r"a\.json:1: not JSON: "),
        ("a.json.bz2", bz2.compress(b"[1]")[:-3], r"a\.json\.bz2: damaged or not bzip2: "),
        ("a.csv.xz", b"no xz", r"a\.csv\.xz: damaged or not xz: "),
    ],
)
def test_files_that_are_not_what_they_are_called(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=says) as error:
        prepare([tmp_path / name], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]
