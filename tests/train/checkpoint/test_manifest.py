from sparse_gpt.train.checkpoint.manifest import read_manifest, write_manifest


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
