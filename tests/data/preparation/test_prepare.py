import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_gpt.cli.shards_commands import info
from sparse_gpt.data import (
    load_tokenizer,
    open_shards,
    part_of_environment,
    prepare,
    train_vocab,
    verify,
)
from sparse_gpt.data.content_hash import content_hash
from sparse_gpt.data.corpus.slices import NOTES
from sparse_gpt.data.preparation.dedup import Seen
from sparse_gpt.data.preparation.options import held_out_below
from sparse_gpt.data.shards.format import INDEX
from sparse_gpt.data.shards.manifest import SPLITS, read_manifest
from sparse_gpt.errors import DataError
from sparse_gpt.progress import Progress

SAMPLES = Path(__file__).parents[3] / "data" / "novels"


def content(folder: Path) -> dict[str, bytes]:
    """All files but the notes of an unfinished run."""
    paths = (path for path in folder.iterdir() if not path.name.startswith(NOTES))
    return {path.name: path.read_bytes() for path in paths}


def hashes(folder: Path, split: str) -> list[int]:
    shards = read_manifest(folder).splits[split]
    return [
        h for s in shards for h in np.fromfile(folder / f"{s.name}.idx", INDEX)["hash"].tolist()
    ]


def json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen files of 470 KB: with small shards, sixteen units."""
    folder = tmp_path_factory.mktemp("corpus")
    novel = (SAMPLES / "persuasion.txt").read_text()
    for i in range(16):
        (folder / f"{i:02d}.txt").write_text(novel.replace("Anne", f"Anne {i}"))
    return folder


UNITS = 16  # that `corpus` has with these:
OPTIONS: dict[str, Any] = {"held_out": 0.1, "shard_tokens": 60_000, "separator": "\nChapter "}
PREPARE = """
import json, signal, sys
from sparse_gpt.data import prepare
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare([sys.argv[1]], sys.argv[2], **json.loads(sys.argv[3]), progress=True)
"""


def start_prepare(
    script: Path, corpus: Path, out: Path, workers: int, part: str = "1/1", **options: Any
) -> subprocess.Popen[str]:
    script.write_text(PREPARE)
    keywords = json.dumps({**OPTIONS, "workers": workers, "part": part, **options})
    command = [sys.executable, str(script), str(corpus), str(out), keywords]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait(condition: Callable[[], object], process: "subprocess.Popen[str] | None" = None) -> None:
    """Until `condition` holds, before `process` ends. The time limit is where a hang is seen."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stopped_at_work(
    script: Path, corpus: Path, out: Path, workers: int, units: int, part: str = "1/1"
) -> "subprocess.Popen[str]":
    """A `prepare` that stands still with at least so many units done, and not all of them.

    A busy machine may let us see the units so late that all are done: then once more.
    """
    for _ in range(10):
        process = start_prepare(script, corpus, out, workers, part)
        while process.poll() is None:
            if len(list(out.glob("unit-*"))) >= units:
                os.killpg(process.pid, signal.SIGSTOP)
                if len(list(out.glob("unit-*"))) < UNITS // int(part[-1]):
                    return process
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.001)
        assert process.returncode in (0, -signal.SIGKILL), process.communicate()
        process.communicate()
        shutil.rmtree(out)
    raise AssertionError("never seen at work")


def running(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def finished_files(out: Path) -> dict[Path, int]:
    """The files of units that have a record, and when they were written."""
    keys = [record.stem.split("-")[2] for record in out.glob("unit-*")]
    paths = [path for key in keys for path in out.glob(f"*{key}*")]
    return {path: path.stat().st_mtime_ns for path in paths}


def is_worker(pid: int) -> bool:
    """Whether a process is one that a parent spawned to work for it."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_same_bytes_for_any_workers_and_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    prepare([corpus], undisturbed, held_out=0.1, shard_tokens=60_000, separator="\nChapter ")
    expected = content(undisturbed)
    assert len([name for name in expected if name.startswith("unit-")]) == 16

    out = tmp_path / "killed"
    process = stopped_at_work(tmp_path / "run.py", corpus, out, workers=2, units=3)
    os.kill(process.pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGCONT)
    process.communicate()
    wait(lambda: not running(process.pid))  # workers do not outlive their killed parent
    with pytest.raises(DataError, match="killed: unfinished"):
        open_shards(out)
    finished = finished_files(out)
    assert 6 < len(finished) < len(expected) - 1

    process = start_prepare(tmp_path / "run.py", corpus, out, workers=2)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")  # and no progress drawn: not a terminal
    assert content(out) == expected
    assert verify(out) == []
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare([corpus], out, **OPTIONS)
    return content(out)


@pytest.mark.parametrize(
    ("kills", "workers"),
    [(3, 1), *(pytest.param(20, workers, marks=pytest.mark.long) for workers in (1, 2))],
)
def test_killed_at_any_moment(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path, kills: int, workers: int
) -> None:
    """SIGKILL at random moments from the first file to the last; a second run finishes."""
    random = np.random.default_rng(kills)
    at_work = 0
    for n in range(kills):
        out = tmp_path / str(n)
        files = random.integers(1, len(undisturbed))
        process = start_prepare(tmp_path / "run.py", corpus, out, workers)
        while process.poll() is None and len(list(out.glob("*"))) < files:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        wait(lambda ended=process.pid: not running(ended))
        at_work += content(out).keys() != undisturbed.keys()
        prepare([corpus], out, **OPTIONS)
        assert content(out) == undisturbed
    assert at_work > 0


def test_parts_together_are_the_whole(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """One after the other, at the same time, and after one of them was killed."""
    out = tmp_path / "in turn"
    for part in ("2/3", "1/3"):
        assert prepare([corpus], out, part=part, **OPTIONS) is None
        with pytest.raises(DataError, match="in turn: unfinished"):
            open_shards(out)
    manifest = prepare([corpus], out, part="3/3", **OPTIONS)
    assert content(out) == undisturbed
    assert prepare([corpus], out, part="1/3", **OPTIONS) == manifest
    assert content(out) == undisturbed

    out = tmp_path / "together"
    killed = start_prepare(tmp_path / "run.py", corpus, out, 1, "1/2")
    wait(lambda: list(out.glob("unit-*")))
    killed.kill()
    killed.communicate()
    both = [start_prepare(tmp_path / "run.py", corpus, out, 1, f"{i}/2") for i in (1, 2)]
    assert [process.communicate(timeout=300) for process in both] == [(None, ""), (None, "")]
    assert content(out) == undisturbed
    assert verify(out) == []


@pytest.mark.parametrize("part", ["1/2", "1/1", "2/3"])
def test_a_part_has_one_process(corpus: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "out"
    process = stopped_at_work(tmp_path / "run.py", corpus, out, 1, 1, "1/2")
    with pytest.raises(DataError, match=r"another prepare( with part 1/2)? is writing there"):
        prepare([corpus], out, part=part, **OPTIONS)
    process.send_signal(signal.SIGCONT)
    assert process.wait(300) == 0
    process.communicate()
    assert len(list(out.glob("unit-*"))) == 8
    assert [path.name for path in out.glob(".*")] == [".tmp-cuts-1-of-2"]


def test_parts_of_launchers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert part_of_environment() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert part_of_environment() == "1/4"
    for name, value in (("ID", "7"), ("COUNT", "3"), ("MIN", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert part_of_environment() == "3/3"
    for part in ("0/2", "3/2", "two"):
        with pytest.raises(DataError, match=r"part is .*; it is i/n with 1 ≤ i ≤ n"):
            prepare([SAMPLES], tmp_path / "out", part=part)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(
    corpus: Path, undisturbed: dict[str, bytes], small_disk: Any, workers: int
) -> None:
    out = small_disk.folder / "out"
    for _ in range(2):
        with pytest.raises(DataError, match="out: No space left on device; make room there and ru"):
            prepare([corpus], out, workers=workers, **OPTIONS)
        kept = content(out)
        assert 0 < len(kept) < len(undisturbed)
        assert kept.items() < undisturbed.items()  # whole files under their names, and no others
    before = finished_files(out)
    small_disk.resize(64)
    prepare([corpus], out, workers=workers, **OPTIONS)
    assert content(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(out.glob(".*")) == []


@pytest.mark.parametrize("separate", [True, False])
def test_a_worker_that_is_killed_and_an_interrupt(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path, separate: bool
) -> None:
    """Each worker at its own unit, or all at one: an end in one line, and no hang; then a rerun."""
    options = {**OPTIONS, "shard_tokens": 60_000 if separate else 10**7}
    source = tmp_path / "a.jsonl"
    if separate:
        source = corpus
    else:
        json_lines(source, [f.read_text() * 4 for f in corpus.iterdir()])
    for what in ("kill", "interrupt"):
        out = tmp_path / what
        process = start_prepare(tmp_path / "run.py", source, out, 2, **options)
        wait(lambda out=out: list(out.glob(".tmp-train*")), process)
        os.killpg(process.pid, signal.SIGSTOP)  # in the midst of it, however late we see it
        if what == "kill":
            workers = [pid for pid in running(process.pid) if is_worker(pid)]
            os.kill(workers[0], signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGCONT)
        _, errors = process.communicate(timeout=300)
        last = errors.strip().splitlines()[-1]
        assert ("a worker was killed" if what == "kill" else "KeyboardInterrupt") in last
        prepare([source], out, **options)
        if separate:
            assert content(out) == undisturbed
        else:
            assert verify(out) == []


@pytest.mark.slow
def test_one_worker_leaves_what_two_leave(tmp_path: Path) -> None:
    """A novel in 5 MB of lines: two chunks of one unit, so that both workers are at work."""
    texts = [
        f"{i} {t}" for i in range(6) for t in (SAMPLES / "persuasion.txt").read_text().split("\n\n")
    ]
    source = json_lines(tmp_path / "a.jsonl", texts * 2)
    assert source.stat().st_size > 5e6
    for workers in (1, 2):
        prepare([source], tmp_path / str(workers), workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert read_manifest(tmp_path / "1").documents("train") > 10_000


def test_input_is_cut_once_for_all_parts_and_runs(corpus: Path, tmp_path: Path) -> None:
    """A later part takes the first one's notes, but for files that changed since and for a line
    that a kill has torn; marks in the notes tell."""
    source = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    out = tmp_path / "out"
    assert prepare([source], out, part="1/2", **OPTIONS) is None
    (notes,) = out.glob(f"{NOTES}*")
    lines = [json.loads(line) for line in notes.read_text().splitlines() if line]
    assert [line["row"]["name"] for line in lines] == [f"{i:02d}.txt" for i in range(16)]
    for line in lines:
        line["row"]["xxh3_128"] = "noted"
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    notes.write_text(whole[:-100])
    (source / "03.txt").touch()
    manifest = prepare([source], out, part="2/2", **OPTIONS)
    assert [row["name"] for row in manifest.sources if row["xxh3_128"] != "noted"] == [
        "03.txt",
        "15.txt",
    ]
    assert list(out.glob(".*")) == []

    assert prepare([source], tmp_path / "changed", part="1/2", **OPTIONS) is None
    (source / "00.txt").write_text("another")
    with pytest.raises(DataError, match="changed: holds shards made from other input or options"):
        prepare([source], tmp_path / "changed", part="2/2", **OPTIONS)
    assert not list((tmp_path / "changed").glob(".*"))

    named = tmp_path / "named"  # the same files, but as of another folder
    shutil.copytree(source, tmp_path / "in" / "sub")
    assert prepare([tmp_path / "in" / "sub"], named, part="1/2", **OPTIONS) is None
    manifest = prepare([tmp_path / "in"], named, part="2/2", **OPTIONS)
    assert [row["name"] for row in manifest.sources][:2] == ["sub/00.txt", "sub/01.txt"]


def test_running_again_changes_nothing_and_mends_damage(novels: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(novels, tmp_path / "out"))
    expected = content(out)
    damaged = sorted(out.glob("train-*.bin"))[2]
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"xx")
    assert len(verify(out)) == 1
    prepare([SAMPLES], out, held_out=0.05, separator="\nChapter ", shard_tokens=20_000)
    assert content(out) == expected
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-*")}
    prepare([SAMPLES], out, held_out=0.05, separator="\nChapter ", shard_tokens=20_000)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-*")} == before


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 30), min_size=20, max_size=60),
    st.floats(0.2, 0.8),
    st.sampled_from([20, 200, 10**8]),
)
def test_duplicates_never_cross_and_every_document_is_somewhere(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    held_out: float,
    shard_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("cross")
    spaces = (" ", "\r\n", "  \t")  # the same text but for white space is the same text
    texts = [f"document{spaces[i % 3]}number {n}" for i, n in enumerate(numbers)]
    json_lines(folder / "a.jsonl", texts)
    try:
        prepare([folder / "a.jsonl"], folder / "out", held_out=held_out, shard_tokens=shard_tokens)
    except DataError as error:
        assert "are the same text" in str(error)  # noqa: PT017
        assert len(set(numbers)) == 1
        return
    train, held = hashes(folder / "out", "train"), hashes(folder / "out", "held_out")
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(map(content_hash, texts))
    expected = {h for h in train + held if h < held_out * 2**64}
    alone = expected in (set(), set(train + held))  # then one moves to the other side
    assert len(set(held) ^ expected) == alone


def test_held_out_is_stable_as_data_grows(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(2000)]
    for name, part in (("half", texts[:1000]), ("whole", texts[::-1])):
        prepare([json_lines(tmp_path / f"{name}.jsonl", part)], tmp_path / name, held_out=0.1)
    half, whole = (set(hashes(tmp_path / name, "held_out")) for name in ("half", "whole"))
    assert half == whole & {content_hash(text) for text in texts[:1000]}
    assert 150 < len(whole) < 250


def test_nothing_held_out_on_request(tmp_path: Path) -> None:
    manifest = prepare([SAMPLES / "persuasion.txt"], tmp_path / "out", held_out=0)
    assert (manifest.documents("train"), manifest.documents("held_out")) == (1, 0)
    assert open_shards(tmp_path / "out").held_out.n_tokens == 0


def test_grown_input_extends_a_folder(corpus: Path, tmp_path: Path) -> None:
    """Units are the input's own: more files after the first ones leave theirs as they are."""
    files = sorted(corpus.iterdir())
    options = {"held_out": 0.1, "shard_tokens": 60_000, "separator": "\nChapter "}
    prepare(files[:2], tmp_path / "out", **options)
    prepare(files[:3], tmp_path / "out", **options)
    prepare(files[:3], tmp_path / "fresh", **options)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_files_are_appended_and_old_shards_stay(tmp_path: Path) -> None:
    """With a vocabulary of its own; the same command again, and one that was killed, go on."""
    source, out, vocab = tmp_path / "in", tmp_path / "out", tmp_path / "own.tiktoken"
    source.mkdir()
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    texts = [f"{words[n % 7]} document, number {n}" for n in range(900)]
    json_lines(source / "a.jsonl", texts[:300])
    with open(source / "a.jsonl", "a") as file:
        file.write("{\n")
    train_vocab([source], vocab, size=300)
    options: dict[str, Any] = {"held_out": 0.1, "shard_tokens": 2_000, "vocab": vocab}
    first = prepare([source], out, **options)
    before = content(out)
    json_lines(source / "b.jsonl", texts[300:600])
    prepare([source], out, append=True, **options)
    both = content(out)
    (source / "c.jsonl").write_text(" \n{\n" + (source / "b.jsonl").read_text().replace("d", "D"))
    (source / "d.txt").write_text(texts[0])  # a text that is there already: on its side
    made = prepare([source], out, append=True, max_rejected=0.1, **options)
    after = content(out)
    again = prepare([source], out, append=True, **options)
    assert first is not None
    assert made is not None
    assert made == again == read_manifest(out)
    assert after == content(out)
    assert made.hash not in (first.hash, json.loads(both["manifest.json"])["hash"])
    changed = {"manifest.json", "rejected.jsonl"}
    for old, new in ((before, both), (both, after)):
        assert {name: new[name] for name in old if name not in changed} == {
            name: value for name, value in old.items() if name not in changed
        }
    assert verify(out) == []
    assert [row["name"] for row in made.sources] == ["a.jsonl", "b.jsonl", "c.jsonl", "d.txt"]
    assert made.rejected == len((out / "rejected.jsonl").read_text().splitlines()) == 2
    train, held = hashes(out, "train"), hashes(out, "held_out")
    assert not set(train) & set(held)
    expected = [*texts[:600], *(text.replace("d", "D") for text in texts[300:600]), texts[0]]
    assert len(expected) == len(train + held)
    assert set(map(content_hash, texts[:600])) < set(train + held)
    shutil.rmtree(out)  # what a run that was killed before its manifest leaves goes on
    for name, value in {**after, **{name: both[name] for name in changed}}.items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(value)
    prepare([source], out, append=True, max_rejected=0.1, **options)
    assert content(out) == after
    for other, says in [
        ({"separator": "x"}, "was made with separator None, not 'x'; append with the same"),
        ({"keep_separator": False}, "was made with keep_separator True, not False"),
        ({"vocab": None}, "was made with vocab_size '300', not '50257'"),
        ({"dedup": True}, "append cannot find duplicates"),
    ]:
        with pytest.raises(DataError, match=says):
            prepare([source], out, append=True, **{**options, **other})
        assert content(out) == after
    with pytest.raises(DataError, match=r"new: not a folder of shards \(no manifest"):
        prepare([source], tmp_path / "new", append=True, **options)
    assert not (tmp_path / "new").exists()


def test_a_literal_end_of_text_is_counted_and_can_be_dropped(tmp_path: Path) -> None:
    mark = "<|endoftext|>"
    (tmp_path / "a.txt").write_text(mark.join(f"text {n}\n" for n in range(200)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": f"of {mark} itself"}))
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    kept = prepare(sources, tmp_path / "kept", held_out=0.1, separator=mark)
    dropped = prepare(
        sources, tmp_path / "dropped", held_out=0.1, separator=mark, keep_separator=False
    )
    assert kept is not None
    assert dropped is not None
    assert (kept.markers, dropped.markers) == (200, 1)
    assert kept.documents("train") + kept.documents("held_out") == 201
    tokens = [sum(of.tokens(split) for split in SPLITS) for of in (kept, dropped)]
    assert tokens[0] - tokens[1] == 199 * len(load_tokenizer().encode(mark))


def test_of_one_text_the_last_part_is_held_out(tmp_path: Path) -> None:
    lines = [f"line {n} of a text\n" for n in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.writelines(lines)
    tokenizer = load_tokenizer()
    for name in ("a.txt", "b.txt.gz"):
        prepare([tmp_path / name], tmp_path / f"{name}-out", held_out=0.1)
        dataset = open_shards(tmp_path / f"{name}-out")
        texts = []
        for split in (dataset.train, dataset.held_out):
            tokens = np.empty((1, split.n_tokens), np.uint16)
            split.read(np.zeros(1, np.int64), tokens)
            assert tokens[0, 0] == tokenizer.eot
            assert split.n_documents == 1
            texts.append(tokenizer.decode(tokens[0, 1:].tolist()))
        assert "".join(texts) == "".join(lines)
        assert texts[1].startswith("line 9")
        assert 0.1 <= len(texts[1]) / len("".join(lines)) < 0.102
        assert dataset.manifest.options["cut_last"] is True
    both = prepare([tmp_path / "a.txt", tmp_path / "b.txt.gz"], tmp_path / "both", held_out=0)
    assert both is not None
    assert "cut_last" not in both.options


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text("abc ", min_size=4).map(lambda text: f"{text}.".strip()), min_size=1, max_size=5
    ),
    held_out=st.sampled_from([1e-9, 0.01, 0.5, 0.9999]),
    form=st.sampled_from(["jsonl", "files", "separator"]),
)
def test_a_small_corpus_has_both_sides(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], held_out: float, form: str
) -> None:
    """Whatever it is given as: nothing is lost, no text is on both sides, and but for a text that
    was cut each is where its hash says, except at most one."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "in").mkdir()
    if form == "jsonl":
        json_lines(folder / "in/a.jsonl", texts)
    elif form == "separator":
        (folder / "in/a.txt").write_text("#".join(texts))
    else:
        for number, text in enumerate(texts):
            (folder / "in" / f"{number}.txt").write_text(text)
    found = {content_hash(text) for text in texts}
    options = {"separator": "#", "keep_separator": False, "held_out": held_out}
    if len(found) == 1 < len(texts):
        with pytest.raises(DataError, match="documents are the same text"):
            prepare([folder / "in"], folder / "out", **options)
        return
    prepare([folder / "in"], folder / "out", **options)
    train, held = (set(hashes(folder / "out", split)) for split in ("train", "held_out"))
    assert train
    assert held
    if len(texts) == 1:
        assert open_shards(folder / "out").manifest.options["cut_last"] is True
        return
    assert not train & held
    assert train | held == found
    expected = {hash for hash in found if hash < held_out_below(held_out)}
    assert len(held ^ expected) == (expected in (set(), found))
    assert len(hashes(folder / "out", "train") + hashes(folder / "out", "held_out")) == len(texts)


def test_a_document_that_moves_is_told_and_not_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["zzzz yyyy " * 30, "qqqq wwww " * 30]
    path = json_lines(tmp_path / "a.jsonl", texts)
    prepare([path], tmp_path / "out")
    (moved,) = hashes(tmp_path / "out", "held_out")
    info(str(tmp_path / "out"))
    assert "a share of 0.01 left no document to be held out: one is" in capsys.readouterr().out
    train_vocab([path], tmp_path / "v", size=262)
    tokenizer = load_tokenizer(tmp_path / "v")
    for text in texts:
        is_learned = len(tokenizer.encode(text)) < 0.6 * len(text)
        assert is_learned == (content_hash(text) != moved)


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ({}, {}, "in: the folder holds no"),
        ({"a.txt": "", "b.jsonl": ""}, {}, r"the corpus is empty: 2 file\(s\)"),
        ({"a.txt": " \n", "b.jsonl": '\n{"text": ""}\n'}, {}, "the corpus holds no text"),
        ({"a.txt": "x"}, {}, "the corpus is one document"),
        ({"a.txt": "x", "b.txt": "x"}, {}, "all 2 documents are the same text"),
        ({"a.jsonl": GOOD * 3 + "{"}, {}, r"a\.jsonl:4: not JSON.*1 of 4 documents .* than 1.00%"),
        (
            {"a.jsonl": GOOD * 200 + "{"},
            {"max_rejected": 0},
            r"a\.jsonl:201: not JSON: [^;]*; each",
        ),
        ({"a.jsonl": GOOD}, {"max_rejected": -1}, "max_rejected is -1; it is a fraction"),
        ({"a.jsonl": GOOD}, {"text_field": "body"}, r"a\.jsonl:1: no key 'body'; keys there: text"),
        ({"a.txt": "\xff"}, {}, r"a\.txt:1: not UTF-8"),
        ({"a.txt": " " * 2_000_000 + "x"}, {"held_out": 0}, r"a\.txt:1: text that tiktoken cannot"),
        ({"a.txt": "x"}, {"separator": ""}, "separator is empty"),
        ({"a.txt": "x"}, {"held_out": 1}, "held_out is 1"),
        ({"a.txt": "x"}, {"shard_tokens": 0}, "shard_tokens is 0"),
        ({"a.txt": "x"}, {"workers": 0}, "workers is 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, files: dict[str, str], options: dict, says: str
) -> None:
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=says) as error:
        prepare([tmp_path / "in"], tmp_path / "new" / "out", **options)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_too_many_rejects_late_in_the_work_keep_what_is_finished(
    corpus: Path, tmp_path: Path
) -> None:
    """A run that allows more goes on from there."""
    files = [*sorted(corpus.iterdir())[:4], tmp_path / "bad.txt"]
    files[-1].write_bytes(b"\xff")
    options = {"held_out": 0.1, "shard_tokens": 60_000, "separator": "\nChapter "}
    for out, workers in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        with pytest.raises(DataError, match=r"bad\.txt:1: not UTF-8"):
            prepare(files, out, workers=workers, max_rejected=0, **options)
        kept = content(out)
        assert len([name for name in kept if name.startswith("unit-")]) == 4
        manifest = prepare(files, out, max_rejected=0.05, **options)
        assert manifest.rejected == 1
        assert kept.items() < content(out).items()
    with pytest.raises(DataError, match=r"bad\.txt:1"):  # all done, and still too many
        prepare(files, tmp_path / "one", max_rejected=0, **options)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert verify(tmp_path / "one") == []


@pytest.mark.slow
def test_broken_documents_are_set_aside(tmp_path: Path) -> None:
    """The same for any number of workers, and the shards are those of the good ones alone."""
    good = (SAMPLES / "persuasion.txt").read_text().split("\n\n") * 12
    lines = [json.dumps({"text": text}).encode() for text in good if text]
    for at, line in ((10, b'{"text": "\xff"}'), (9_000, b"{"), (12_000, b'{"text": null}')):
        lines.insert(at - 1, line)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    for workers in (1, 2):
        manifest = prepare([tmp_path / "a.jsonl"], tmp_path / f"{workers}", workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert manifest.rejected == 3
    with open(tmp_path / "1" / "rejected.jsonl") as file:
        rejects = [json.loads(line) for line in file]
    assert [(reject["file"], reject["line"]) for reject in rejects] == [
        ("a.jsonl", 10),
        ("a.jsonl", 9_000),
        ("a.jsonl", 12_000),
    ]
    assert rejects[2]["reason"] == "'text' is NoneType, must be a string"
    clean = prepare([json_lines(tmp_path / "b.jsonl", good)], tmp_path / "clean")
    for split in SPLITS:
        (shard,), (expected,) = manifest.splits[split], clean.splits[split]
        assert (shard.bin, shard.idx) == (expected.bin, expected.idx)
    assert not (tmp_path / "clean" / "rejected.jsonl").exists()


@pytest.mark.slow
def test_a_run_stops_early_where_much_is_broken(tmp_path: Path) -> None:
    """Not only when all is read: the first 20,000 of a million documents are enough to see."""
    lines = ['{"text": "a document"}', "{"] * 5 + ['{"text": "a document"}'] * 300
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines * 1000))
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON.* of \d\d\d?,\d{3} documents"):
        prepare([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12))
def test_a_hash_is_new_once(batches: list[list[int]]) -> None:
    seen, before = Seen(), set[int]()
    for batch in batches:
        is_new = seen.add(np.array(batch, np.uint64))
        assert is_new.tolist() == [n not in before | set(batch[:i]) for i, n in enumerate(batch)]
        before |= set(batch)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_duplicates_are_left_out(tmp_path: Path, workers: int) -> None:
    """Over units and files, also where units of an earlier run are taken over."""
    texts = [
        f"document  number {n % 700}" if n % 2 else f"document number\n{n}" for n in range(2000)
    ]
    sources = [json_lines(tmp_path / f"{i}.jsonl", texts[i::20]) for i in range(20)]
    expected = {content_hash(text) for text in texts}
    options: dict[str, Any] = {"held_out": 0.1, "shard_tokens": 500, "dedup": True}
    out = tmp_path / "out"
    manifest = prepare(sources, out, workers=workers, **options)
    found = [h for split in SPLITS for h in hashes(out, split)]
    assert sorted(found) == sorted(expected)
    assert manifest.duplicates == len(texts) - len(expected) > 0
    before = content(out)
    units = sorted(out.glob("unit-*"))
    assert len(units) == 20
    for unit in (units[2], units[7], units[-1]):
        unit.unlink()
    assert prepare(sources, out, **options) == manifest
    assert content(out) == before
    with pytest.raises(DataError, match="dedup needs all documents, not part 1/2"):
        prepare(sources, out, part="1/2", **options)


@pytest.mark.long
def test_memory_of_ten_million_documents(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w") as file:
        for n in range(10_000_000):
            file.write(f'{{"text": "the short document of number {n}"}}\n')
    code = (
        "import resource\nfrom sparse_gpt.data import prepare\n"
        f"prepare([{str(tmp_path / 'a.jsonl')!r}], {str(tmp_path / 'out')!r}, dedup=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1e9


def test_folders_that_are_not_for_us(novels: Path, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", [f"document {n}" for n in range(50)])
    out = Path(shutil.copytree(novels, tmp_path / "other"))
    before = content(out)
    with pytest.raises(DataError, match="other: holds shards made from other input or options"):
        prepare([source], out, held_out=0.2)
    with pytest.raises(DataError, match="holds shards made from other input or options"):
        prepare([SAMPLES], out, held_out=0.05, separator="\nChapter ", shard_tokens=20_001)
    assert content(out) == before
    with pytest.raises(DataError, match=r"not empty: it holds 'a\.jsonl'"):
        prepare([source], tmp_path, held_out=0.2)
    with pytest.raises(DataError, match="lies in the source"):
        prepare([tmp_path], tmp_path / "out", held_out=0.2)
    with pytest.raises(DataError, match=r"a\.jsonl/out: cannot write there: Not a directory"):
        prepare([source], source / "out", held_out=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "other"]


def test_two_at_once_in_one_folder(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = stopped_at_work(tmp_path / "run.py", corpus, out, workers=1, units=1)
    with pytest.raises(DataError, match="another prepare is writing there"):
        prepare([corpus], out, held_out=0.1, shard_tokens=60_000, separator="\nChapter ")
    process.send_signal(signal.SIGCONT)
    assert process.wait(300) == 0
    process.communicate()
    assert verify(out) == []
    assert all(read_manifest(out).documents(split) for split in SPLITS)


def test_progress_shows_rates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    began = time.monotonic()
    with Progress("tokenizing", 4_000_000, wanted=True) as bar:
        for _ in range(2):
            time.sleep(0.1)
            bar.advance(1_000_000, 1_500_000, 500_000)
        slowest = 3 / (time.monotonic() - began)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    rates = re.findall(r"2\.0/4\.0 MB +([0-9.]+) MB/s, ([0-9.]+)M tokens/s +0:0", drawn)
    megabytes, tokens = map(float, rates[-1])
    assert slowest - 0.1 < megabytes <= 15  # it is printed with one digit
    assert megabytes == pytest.approx(3 * tokens, abs=0.1)
    with Progress("reading", 4_000_000, wanted=True) as bar:
        time.sleep(0.1)
        bar.advance(1_000_000)
        bar.title("read")
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"read .* 1\.0/4\.0 MB +[0-9.]+ MB/s", drawn)
    with Progress("", 1, wanted=False) as bar:
        bar.advance(1, 1, 1)
    assert capsys.readouterr().err == ""
