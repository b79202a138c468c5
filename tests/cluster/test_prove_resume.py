"""The proof holds, and finds a resume that is not exact."""

from pathlib import Path

import pytest
import torch
import xxhash
from ranks import ENVIRONMENT, stage

from sparse_gpt.cluster.prove_resume import Proof
from sparse_gpt.train.checkpoint.manifest import read_manifest, write_manifest

DROPOUT = ("model.dropout=0.1", "model.ffn.dropout=0.1", "model.ffn.feedback={}")


def rewrite(change, field=None):
    """A function that changes the newest checkpoint, so that its hashes are right again."""

    def tamper(run_dir: Path) -> None:
        folder = max((run_dir / "checkpoints").glob("step-*"))
        manifest = read_manifest(folder)
        change(manifest)
        for name in manifest["files"]:
            content = torch.load(folder / name, weights_only=True)
            if field is not None:
                field(content)
            torch.save(content, folder / name)
            digest = xxhash.xxh3_128_hexdigest((folder / name).read_bytes())
            manifest["files"][name] = digest
        write_manifest(folder, manifest)

    return tamper


def nothing(_):
    pass


def skip_a_batch(manifest):
    manifest["samples"] += 16


def other_random_numbers(content):
    content["rng"]["cpu"] = torch.Generator().manual_seed(7).get_state()


def forgotten_moments(content):
    for fragment in content["fragments"].values():
        fragment["exp_avg"].zero_()


@pytest.mark.long
def test_resume_is_proved_and_tampering_found(run_file, tmp_path, monkeypatch):
    """ZeRO 1 and 2: train/test_loop.py, without the launcher; ZeRO 0: sweep/test_sweep.py."""
    monkeypatch.setattr("os.environ", ENVIRONMENT)
    proof = Proof(run_file, [*DROPOUT, stage(3)], tmp_path / "proof", steps=12, ranks=2)
    proof.train()
    cut = proof.resumed("cut", 2)
    assert cut.holds, cut
    for change in (skip_a_batch, other_random_numbers, forgotten_moments):
        fields = (change, None) if change is skip_a_batch else (nothing, change)
        tampered = proof.resumed(change.__name__, 2, between=rewrite(*fields))
        assert not tampered.holds, change
        # The first loss is of the weights as they were; the update after it needs the moments.
        assert tampered.first_difference == (14 if change is forgotten_moments else 13)
        assert tampered.same_tokens == (change is not skip_a_batch)
