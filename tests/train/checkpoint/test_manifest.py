import json

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.train.checkpoint.manifest import read_manifest, step_of, tag_of, write_manifest


def test_a_flipped_bit_in_a_manifest_is_found(tmp_path):
    manifest = {"step": 40, "samples": 640, "guard": {"norms": [0.5, 1.25]}, "files": {"a": "1f"}}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert read_manifest(tmp_path) is None, bit


def test_where_none_is_there_is_none(tmp_path):
    assert read_manifest(tmp_path) is None
    for content in ("", "[]", "null", "3", '{"step": 1}', '{"hash": 1}', '{"hash": ""}'):
        (tmp_path / "manifest.json").write_text(content)
        assert read_manifest(tmp_path) is None, content


def test_a_run_of_version_0_1_goes_on(tmp_path):
    """As it wrote its manifests: the hash last, xxh3 over the sorted rest."""
    manifest = {"step": 40, "samples": 640, "guard": {"skipped": 0}, "files": {"a": "1f"}}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**manifest, "hash": digest}, indent=1))
    assert read_manifest(tmp_path) == manifest
    path.write_text(path.read_text().replace("640", "641"))
    assert read_manifest(tmp_path) is None


@given(st.integers(0, 10**8 - 1), st.integers(0, 10**8 - 1))
def test_names_sort_as_steps_do(one, other):
    assert step_of(tag_of(one)) == one
    assert (tag_of(one) < tag_of(other)) == (one < other)
