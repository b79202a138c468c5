import pytest
import torch

from sparse_gpt.train.checkpoint.manifest import write_manifest
from sparse_gpt.train.checkpoint.weights import load_weights


def write(folder, *ranks):
    """A checkpoint whose ranks hold `{name: (start, values)}`."""
    folder.mkdir()
    for number, fragments in enumerate(ranks):
        held = {
            name: {"start": start, "master": torch.tensor(values)}
            for name, (start, values) in fragments.items()
        }
        torch.save({"fragments": held}, folder / f"rank-{number}.pt")
    names = {f"rank-{number}.pt": "" for number in range(len(ranks))}
    write_manifest(folder, {"step": 1, "files": names})
    return folder


def test_parts_are_put_together_in_their_order_whichever_rank_held_them(tmp_path):
    ranks = ({"a": (3, [4.0, 5.0]), "b": (0, [1.0])}, {"a": (0, [1.0, 2.0, 3.0])}, {})
    found = load_weights(write(tmp_path / "step", *ranks))
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": [1.0, 2.0, 3.0, 4.0, 5.0],
        "b": [1.0],
    }


def test_they_are_those_of_the_run(train_here, engine, tmp_path):
    train_here("duration.steps=2", "deepspeed={zero_optimization: {stage: 3}}")
    found = load_weights(tmp_path / "run/checkpoints/step-00000002")
    shapes = {name: p.numel() for name, p in engine().module.named_parameters()}
    assert {name: value.numel() for name, value in found.items()} == shapes


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"manifest\.json"):
        load_weights(tmp_path)
    folder = write(tmp_path / "step", {"a": (0, [1.0])})
    (folder / "rank-0.pt").unlink()
    with pytest.raises(OSError, match=r"rank-0\.pt"):
        load_weights(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        load_weights(folder)
