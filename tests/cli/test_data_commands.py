"""The options of `sparse-gpt prepare` reach the data room."""

import json
import sys

import pytest

from sparse_gpt.cli.main import main
from sparse_gpt.data import prepare as data_prepare
from sparse_gpt.data import train_vocab
from sparse_gpt.data.shards.manifest import read_manifest

ROWS = [{"text": f"document number {n}", "lang": "en" if n % 2 else "de"} for n in range(400)]


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Runs the command on 400 rows, of which one line is broken; the exit code."""
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:100], "{", *lines[100:]]))

    def run(out, *options):
        source = str(tmp_path / "a.jsonl")
        command = ["sparse-gpt", "prepare", source, "--out", str(tmp_path / out), *options]
        monkeypatch.setattr(sys, "argv", [*command, "--held-out", "0.1"])
        try:
            main()
        except SystemExit as stopped:
            return stopped.code or 0
        return 0

    return run


def test_filters_pattern_and_engine(prepare, tmp_path, capsys):
    options = ("--where", "lang=en", "--min-chars", "18", "--dedup", "--pattern", "cl100k")
    assert prepare("out", *options, "--engine", "tiktoken") == 0
    assert "broken documents set aside: 1, named in" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.documents("train") + manifest.documents("held_out") == 195  # 11, 13, … 399
    assert manifest.tokenizer["pattern"] == "cl100k"
    assert manifest.tokenizer["engines"][0].startswith("tiktoken ")
    assert manifest.options["where"] == [["lang", "en"]]
    assert prepare("bad", "--where", "lang") == 2
    assert capsys.readouterr().err == "error: --where lang: must be KEY=VALUE\n"


def test_strict_stops_at_the_first_broken_document(prepare, tmp_path, capsys):
    assert prepare("out", "--strict") == 2
    assert capsys.readouterr().err.startswith("error: a.jsonl:101: not JSON")
    assert prepare("out", "--max-rejected", "0.001") == 2
    assert "1 of 401 documents are as broken, more than 0.10%" in capsys.readouterr().err
    assert prepare("out", "--max-rejected", "0.01") == 0


def test_a_launchers_rank_is_a_part(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert prepare("out") == 0
    assert "part 2/2 is done; the last part to end writes the manifest" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert prepare("out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rejected"] == 1
    assert prepare("other", "--part", "2/2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"part": "2/2", "finished": False}
    assert prepare("other", "--part", "1/2", "--dedup") == 2
    assert "run it as one part" in capsys.readouterr().err


def test_a_separator_that_is_nowhere_is_told(tmp_path, monkeypatch, capsys):
    source = tmp_path / "a.txt"
    source.write_text("".join(f"poem {n}\r\n\r\n" for n in range(200)), newline="")
    command = ["sparse-gpt", "prepare", str(source), "--held-out", "0.1", "--separator"]
    monkeypatch.setattr(sys, "argv", [*command, r"\n\n", "--out", str(tmp_path / "there")])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == ""
    assert read_manifest(tmp_path / "there").documents("train") > 100
    monkeypatch.setattr(sys, "argv", [*command, r"\n---\n", "--out", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert r"separator '\n---\n': is in no text file; each is one document" in told


def test_documents_of_shards_are_shown(tmp_path, monkeypatch, capsys):
    texts = [f"document {n} é\x1b[31m\nits second line, {n * n}" for n in range(30)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    shards = tmp_path / "shards"
    data_prepare([tmp_path / "a.jsonl"], shards, held_out=0.1, shard_tokens=500)

    def shown(*options):
        command = ["sparse-gpt", "shards", "show", str(shards), *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    found = {}
    for split in ("train", "held_out"):
        count = read_manifest(shards).documents(split)
        for number in range(1, count + 1):
            code, out, err = shown("--document", str(number), "--split", split)
            head, _, text = out.partition("\n\n")
            assert (code, err) == (0, "")
            assert head.startswith(f"document {number} of {count} in {split}, ")
            found[split, number] = text.removesuffix("\n")
    assert sorted(found.values()) == sorted(texts)
    assert shown()[1] == shown("--document", "1")[1]
    assert shown("--random")[1].partition("\n\n")[2].removesuffix("\n") in texts
    (split, number), text = next(item for item in found.items() if "169" in item[1])
    said = shown("--grep", r"13 é\x1b[31m\nits".replace(r"\x1b", "\x1b"), "--split", split)[1]
    assert said.startswith(f"document {number}: ")
    assert shown("--grep", "second")[1].splitlines()[-1] == "these are the first 20"
    for options, says in [
        (("--grep", "third"), "'third' is in none of the"),
        (("--document", "0"), "--document 0: train has the documents 1 to "),
        (("--document", "999"), "--document 999: train has the documents 1 to "),
        (("--document", "1", "--random"), "--document, --grep and --random: give one of them"),
    ]:
        code, out, err = shown(*options)
        assert (code, out) == (2, "")
        assert says in err


def test_vocab_train_chooses_documents_as_prepare_does(prepare, tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "v.tiktoken"
    command = ["sparse-gpt", "vocab", "train", str(source), "--out", str(out), "--size", "270"]
    options = ["--where", "lang=en", "--min-chars", "18", "--pattern", "cl100k"]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert f"{out}: 270 ids, sha256" in capsys.readouterr().out
    wanted = {"where": {"lang": "en"}, "min_chars": 18, "pattern": "cl100k"}
    train_vocab([source], tmp_path / "same", size=270, **wanted)
    assert out.read_bytes() == (tmp_path / "same").read_bytes()
    train_vocab([source], tmp_path / "other", size=270)
    assert out.read_bytes() != (tmp_path / "other").read_bytes()
