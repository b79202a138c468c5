"""Files and folders that are whole or not there; locks."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.errors import DataError
from sparse_gpt.files import (
    locked,
    new_folder,
    publish_text,
    read_sealed,
    replaced_folder,
    to_json,
    write_sealed,
)


def fail_midway(out, work):
    with new_folder(out) as aside:
        work(aside)
        raise ValueError("the reason")


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "made/for/it"
    with pytest.raises(ValueError, match="the reason"):
        fail_midway(out, lambda aside: (aside / "half").write_text("1"))
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as aside:
        (aside / "file").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    with pytest.raises(DataError, match="is there already"), new_folder(out):
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(JSON, st.sampled_from([None, 1]))
def test_json_is_what_any_reader_takes(value, indent):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    def as_read(value):
        if isinstance(value, dict):
            return {key: as_read(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [as_read(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert json.loads(to_json(value, indent), parse_constant=refuse) == as_read(value)


def test_the_reason_is_told_where_others_use_the_parent(tmp_path):
    with pytest.raises(ValueError, match="the reason"):
        fail_midway(tmp_path / "parent/x", lambda _: (tmp_path / "parent/other").mkdir())
    assert (tmp_path / "parent/other").is_dir()


def test_a_replaced_folder_is_the_old_one_until_the_new_is_whole(tmp_path):
    out = tmp_path / "fit"
    for text in ("one", "two"):
        with replaced_folder(out) as aside:
            (aside / "inner").mkdir()
            (aside / "inner/file").write_text(text)
        assert (out / "inner/file").read_text() == text
    with pytest.raises(ValueError, match="no"), replaced_folder(out) as aside:
        raise ValueError("no")
    assert (out / "inner/file").read_text() == "two"


ROUNDS = [20, pytest.param(1000, marks=pytest.mark.long)]


def at_once(work, count=4):
    """What `work` gives to threads that begin together: a lock keeps them apart as processes."""
    begin = threading.Barrier(count)

    def one(number):
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_of_several_at_one_file_each_names_it_whole(tmp_path, rounds):
    path, size = tmp_path / "file", 100_000

    def publish_and_read(number):
        for _ in range(5):
            publish_text(path, str(number) * size)
            found = path.read_text()
            assert found == found[0] * size

    for _ in range(rounds // 10):
        at_once(publish_and_read)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_of_several_at_one_new_folder_one_fills_it_and_the_others_are_told(tmp_path, rounds):
    out, random = tmp_path / "out", Random(0)

    def fill(number):
        try:
            with new_folder(out) as aside:
                for name in "abc":
                    (aside / name).write_text(str(number))
                if number in failing:
                    raise DataError("the reason")
        except DataError as error:
            return str(error)
        return None

    for _ in range(rounds):
        failing = random.sample(range(4), random.randrange(4))
        said = at_once(fill)
        refused = "the reason|is there already|another run is writing|No such file|File exists"
        assert all(re.search(refused, line) for line in said if line), said
        filled = [str(number) for number, line in enumerate(said) if line is None]
        assert [path.name for path in tmp_path.iterdir()] == ["out"][: len(filled)]
        if filled:
            assert [(out / name).read_text() for name in "abc"] == filled * 3
            shutil.rmtree(out)


def test_a_lock_is_another_processs_until_that_ends_however_it_ends(tmp_path):
    code = "import pathlib, sys, time; from sparse_gpt.files import lock; "
    code += "path = pathlib.Path(sys.argv[1]); lock(path, folder=path.is_dir()); "
    code += "print('held', flush=True); time.sleep(600)"
    for path in (tmp_path / "file", tmp_path):
        command = [sys.executable, "-c", code, str(path)]
        how = {"folder": path.is_dir()}
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(path, **how):
            pass
        other.kill()
        with locked(path, wait=True, **how):
            pass
        other.wait()
    with locked(path, shared=True, **how), locked(path, shared=True, **how):
        pass


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.floats(-1, 1))))
def test_what_is_sealed_is_read_and_what_was_altered_is_not(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("sealed") / "file.json"
    fields.pop("hash", None)
    digest = write_sealed(path, fields)
    assert read_sealed(path) == {"hash": digest, **fields}
    publish_text(path, path.read_text().replace("{", "{ ", 1))
    with pytest.raises(DataError, match="damaged"):
        read_sealed(path)
