"""Files and folders that are whole or not there; locks."""

import errno
import fcntl
import json
import math
import os
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
from other_file_systems import where_refused

from sparse_gpt.errors import DataError
from sparse_gpt.files import (
    locked,
    new_file,
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


def test_a_new_file_is_whole_or_as_it_was_also_through_a_link(tmp_path):
    def write(out, text, fails=False):
        with new_file(out) as aside:
            aside.write_text(text)
            if fails:
                raise ValueError("the reason")

    (tmp_path / "disk").mkdir()
    out, link = tmp_path / "disk/file", tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(ValueError, match="the reason"):
        write(link, "half", fails=True)
    assert list(tmp_path.glob("disk/*")) == []
    for text in ("one", "two"):
        write(link, text)
        assert (out.read_text(), link.is_symlink()) == (text, True)
    with pytest.raises(ValueError, match="the reason"):
        write(link, "half", fails=True)
    assert out.read_text() == "two"
    assert [path.name for path in out.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("length", range(250, 257))
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, length):
    names = {kind: kind * length for kind in "fg"}
    try:
        for name in names.values():
            (tmp_path / name).touch()
            (tmp_path / name).unlink()
    except OSError:
        with pytest.raises(DataError, match="too long"), new_file(tmp_path / names["f"]):
            pass
        return
    with new_file(tmp_path / names["f"]) as file:
        file.write_text("whole")
    with new_folder(tmp_path / names["g"]) as folder:
        (folder / "in it").touch()
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())


def test_a_new_file_takes_the_place_of_files_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "pipe", "loop"):
        with pytest.raises(DataError, match=f"{name}: is there already, and is no file"):
            new_file(tmp_path / name).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "loop", "pipe"]


def test_what_cannot_be_published_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        publish_text(tmp_path / "folder", "text")
    assert refused.value.filename2 == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_replaced_folder_may_be_a_link(tmp_path):
    (tmp_path / "disk/fit").mkdir(parents=True)
    (tmp_path / "fit").symlink_to(tmp_path / "disk/fit")
    for text in ("one", "two"):
        with replaced_folder(tmp_path / "fit") as aside:
            (aside / "file").write_text(text)
        assert (tmp_path / "disk/fit/file").read_text() == text
        assert (tmp_path / "fit").is_symlink()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_where_a_file_system_cannot_lock_or_sync_all_else_goes_on(tmp_path, error):
    def work():
        with pytest.raises(OSError, match=os.strerror(error)), (tmp_path / "x").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
        with (
            locked(tmp_path / "file"),
            locked(tmp_path, folder=True),
            locked(tmp_path / "file", wait=True),
        ):
            publish_text(tmp_path / "text", "text")
        for make in (new_folder, replaced_folder):
            with make(tmp_path / make.__name__) as aside:
                (aside / "file").write_text("whole")

    cannot_sync = errno.EINVAL if error == errno.ENOLCK else error
    where_refused({"flock": error, "fsync": cannot_sync}, work)
    assert (tmp_path / "text").read_text() == "text"
    for name in ("new_folder", "replaced_folder"):
        assert (tmp_path / name / "file").read_text() == "whole"


def test_a_disk_that_fails_to_sync_is_an_error(tmp_path):
    def work():
        publish_text(tmp_path / "text", "text")

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        where_refused({"fsync": errno.EIO}, work)
    assert list(tmp_path.iterdir()) == []
