import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import ROOT

from sparse_gpt.train.checkpoint.manifest import read_manifest, step_of, tag_of, write_manifest


def flips(whole: bytes):
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


@pytest.fixture
def of_0_1():
    return (ROOT / "tests/assets/checkpoint-manifest-0.1.json").read_bytes()


def test_what_version_0_1_sealed_is_read_and_a_flipped_bit_found(tmp_path, of_0_1):
    path = tmp_path / "manifest.json"
    path.write_bytes(of_0_1)
    manifest = read_manifest(tmp_path)
    assert (manifest["step"], manifest["samples"]) == (13, 208)
    for bit, flipped in flips(of_0_1):
        path.write_bytes(flipped)
        assert read_manifest(tmp_path) in (None, manifest), bit  # white space is not sealed


def test_a_flipped_bit_in_a_manifest_is_found(tmp_path):
    guard = {"skipped": 0, "in_a_row": 0, "window": [[0.5, 1.25]]}
    manifest = {"step": 40, "samples": 640, "guard": guard, "files": {"a": "1f"}}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for bit, flipped in flips(whole):
        path.write_bytes(flipped)
        assert read_manifest(tmp_path) is None, bit


def test_where_none_is_there_is_none(tmp_path):
    assert read_manifest(tmp_path) is None
    for content in ("", "[]", "null", "3", '{"step": 1}', '{"hash": 1}', '{"hash": ""}'):
        (tmp_path / "manifest.json").write_text(content)
        assert read_manifest(tmp_path) is None, content
    write_manifest(tmp_path, {"step": 1})
    assert read_manifest(tmp_path) is None  # sealed, but of no files


@given(st.integers(0, 10**8 - 1), st.integers(0, 10**8 - 1))
def test_names_sort_as_steps_do(one, other):
    assert step_of(tag_of(one)) == one
    assert (tag_of(one) < tag_of(other)) == (one < other)
