"""Chat turns of every form of input are rendered to the same text; bad ones are set aside."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data import open_shards, prepare, train_vocab
from sparse_gpt.data.corpus.blocks import Reading
from sparse_gpt.data.corpus.documents import Document, read
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import cut
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.errors import DataError

Turn = tuple[str, str]
TURN = st.tuples(
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.text(st.sampled_from("a\r\n :é😀") | st.characters(codec="utf-8", exclude_characters="\0")),
)
CHATS = st.lists(st.lists(TURN, min_size=1, max_size=4), min_size=1, max_size=4)
SHAREGPT = {"user": "human", "assistant": "gpt"}


def plain(chat: list[Turn]) -> str:
    return "\n\n".join(f"{role}: {content}" for role, content in chat)


def turns(chat: list[Turn]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, "name": None} for role, content in chat]


def parts(chat: list[Turn]) -> list[dict[str, Any]]:
    return [
        {
            "content": [{"type": "text", "text": half} for half in (text[:2], text[2:])],
            "role": role,
        }
        for role, text in chat
    ]


def sharegpt(chat: list[Turn]) -> list[dict[str, Any]]:
    return [{"from": SHAREGPT.get(role, role), "value": content} for role, content in chat]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "pretty.json": lambda rows: json.dumps(rows, indent=1).encode(),
}


def taken(source: str | Path, field: str = "chat") -> list[Document | Reject]:
    (file,) = find_files([source])
    return list(read(cut(file, None).slices, Reading(None, field, messages=True)))


@settings(max_examples=10, deadline=None)
@given(chats=CHATS, shape=st.sampled_from([turns, parts, sharegpt]))
def test_every_form_and_shape_gives_the_same_text(
    tmp_path_factory: pytest.TempPathFactory,
    chats: list[list[Turn]],
    shape: Callable[[list[Turn]], list[dict[str, Any]]],
) -> None:
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"id": number, "in": {"chat": shape(chat)}} for number, chat in enumerate(chats)]
    for name, form in FORMS.items():
        (folder / name).write_bytes(form(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    expected = [plain(chat) for chat in chats]
    for source in sorted(folder.iterdir()):
        found = taken(source, "in.chat")
        assert [getattr(one, "text", one) for one in found] == expected, source


def test_so_do_data_sets_of_the_hub(tmp_path: Path) -> None:
    chats = [[("user", f"{n} é"), ("assistant", "\n")] for n in range(3)]
    (tmp_path / "hub").mkdir()
    rows = pa.Table.from_pylist([{"chat": sharegpt(chat)} for chat in chats])
    pq.write_table(rows, tmp_path / "hub" / "train.parquet")
    found = taken(f"hf:{tmp_path / 'hub'}")
    assert [getattr(one, "text", one) for one in found] == [plain(chat) for chat in chats]


GOOD = {"role": "user", "content": "fine"}
BROKEN: list[tuple[Any, str]] = [
    ("text", "'chat' is str, must be a list of turns, each {role, content}"),
    (["text"], "'chat': turn 1 is str, must be {role, content}"),
    ([GOOD, {"role": "user"}], "'chat': turn 2 has no 'content'; keys there: role"),
    ([{"from": "gpt"}], "'chat': turn 1 has no 'value'; keys there: from"),
    ([{"content": "x"}], "'chat': turn 1 has no 'role'; keys there: content"),
    ([{"role": "a: b", "content": ""}], "'chat': turn 1: its role is 'a: b', must be one word"),
    ([{"role": 7, "content": ""}], "'chat': turn 1: its role is 7, must be one word"),
    ([GOOD, {"role": "u", "content": 7}], "'chat': turn 2: its content is int, must be a string"),
    (
        [{"role": "u", "content": [{"type": "image_url", "image_url": "x"}]}],
        "'chat': turn 1 has a part of type 'image_url'; only text is rendered",
    ),
    (
        [{"role": "u", "content": [["a"]]}],
        "'chat': turn 1 has a part of type 'list'; only text is rendered",
    ),
]


def test_bad_turns_are_set_aside_one_by_one(tmp_path: Path) -> None:
    rows = [{"chat": chat} for chat, _ in BROKEN] + [{"other": 1}, {"chat": []}, {"chat": [GOOD]}]
    rows.append({"chat": [{"role": "user", "content": "\ud800"}]})
    for name in ("a.jsonl", "a.jsonl.gz", "pretty.json"):
        (tmp_path / name).write_bytes(FORMS[name](rows))
        found = taken(tmp_path / name)
        assert [one.text for one in found if isinstance(one, Document)] == ["user: fine"]
        *of_turns, no_key, half = (one.reason for one in found if isinstance(one, Reject))
        assert of_turns == [reason for _, reason in BROKEN]
        assert no_key == "no key 'chat'; keys there: other (set messages)"
        assert half.startswith("'chat' holds half a surrogate pair")


def test_broken_bytes_in_a_list_of_structs_cost_one_row(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())]))
    chats = [[{"role": b"user", "content": text}] for text in (b"a", b"\xff", None, b"b")]
    column = pa.array(chats, kind).cast(
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), safe=False
    )
    pq.write_table(pa.table({"chat": column, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert taken(tmp_path / "a.parquet") == [
        Document("a.parquet", 1, "user: a"),
        Reject("a.parquet", 2, "not UTF-8 text (byte 0 of the document is 0xff)"),
        Reject("a.parquet", 3, "'chat': turn 1 has no 'content'; keys there: role"),
        Document("a.parquet", 4, "user: b"),
    ]


def test_they_are_another_corpus_than_text_and_exclude_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        lines([{"chat": turns([("user", f"to {n}")]), "text": f"user: to {n}"} for n in range(40)])
    )
    chat = prepare([tmp_path / "a.jsonl"], tmp_path / "chat", messages="chat")
    text = prepare([tmp_path / "a.jsonl"], tmp_path / "text")
    assert chat is not None
    assert text is not None
    assert (chat.options["text_field"], chat.options["messages"]) == ("chat", True)
    assert "messages" not in text.options
    assert chat.hash != text.hash
    assert open_shards(tmp_path / "chat").train.hash == open_shards(tmp_path / "text").train.hash
    train_vocab([tmp_path / "a.jsonl"], tmp_path / "v1", size=262, messages="chat")
    train_vocab([tmp_path / "a.jsonl"], tmp_path / "v2", size=262)
    assert (tmp_path / "v1").read_bytes() == (tmp_path / "v2").read_bytes()
    with pytest.raises(DataError, match="was made with messages True, not False; append with"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "chat", text_field="chat", append=True)
    with pytest.raises(DataError, match="text_field 'chat' and messages 'chat': give one of them"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "no", messages="chat", text_field="chat")
    (tmp_path / "b.txt").write_text("user: to be read as text")
    for make in (prepare, train_vocab):
        with pytest.raises(DataError, match=r"b\.txt: chat turns are in rows, but this file is"):
            make([tmp_path / "b.txt"], tmp_path / "no", messages="chat")
    with pytest.raises(DataError, match="'chat' is list, must be a string; of chat turns give"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "no", text_field="chat")
    (tmp_path / "c.jsonl").write_text('{"chat": "told"}')
    with pytest.raises(DataError, match=r"c\.jsonl:1: 'chat' is str, must be .*; nor is there"):
        prepare([tmp_path / "c.jsonl"], tmp_path / "no", messages="chat", max_rejected=1)
    assert not (tmp_path / "no").exists()
