"""The FFN options that every property of the FFN must hold for, at d_model 32, as fixtures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_gpt import ModelConfig

_FEEDBACK = {"rank": 2, "groups": 4, "share": 0.4, "iterations": 2}
_DICTIONARY = {
    "spectral": {"kind": "dictionary", "blocks": 4},
    "polynomial": None,
    "norm_out": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{path}-{selection}-{threshold}": {
            "spectral": {
                "path": path,
                "selection": selection,
                "threshold": threshold,
                "keep": 0.4,
            }
        }
        for path in ("series", "parallel")
        for selection in ("hard", "soft")
        for threshold in ("exact", "constant")
    },
    "uneven-factors": {"spectral": {"factors": (16, 2)}},
    "no-spectral": {"spectral": None},
    "no-refine": {"refine": None},
    "feedback": {"feedback": _FEEDBACK},
    "factored": {"projection": {"kind": "factored", "block": 8}},
    "sparse-degrees": {"polynomial": {"group_size": 16, "degrees": (1, 3, 4)}},
    "first-degree": {"polynomial": {"group_size": 4, "degrees": (1,)}},
    "norm-before": {"norm_out": "before", "out_gain": 0.5},
    "dictionary": _DICTIONARY,
    "dictionary-of-one": {
        **_DICTIONARY,
        "spectral": {"kind": "dictionary", "blocks": 3, "top_k": 1, "block_size": 8},
    },
    "dictionary-together": {**_DICTIONARY, "feedback": _FEEDBACK, "out_gain": 0.5},
    "together": {
        "spectral": {"path": "parallel", "selection": "soft", "threshold": "constant"},
        "feedback": _FEEDBACK,
        "projection": {"kind": "factored", "block": 16},
        "norm_out": "before",
    },
}


def small(ffn: Any, dropout: float = 0.0) -> ModelConfig:
    """A GPT of 2 layers and 97 tokens (padded to 128) around an FFN."""
    sizes = {"vocab_size": 97, "max_seq_len": 16, "d_model": 32, "n_layer": 2, "n_head": 4}
    return ModelConfig(**sizes, dropout=dropout, ffn=ffn)


@pytest.fixture(params=["dense", *OPTIONS])
def model_config(request: pytest.FixtureRequest) -> ModelConfig:
    """`small` with the dense FFN, then with every option; all dropouts 0.1."""
    if request.param == "dense":
        return small({"preset": "dense", "dropout": 0.1}, dropout=0.1)
    return small({"preset": "paper", "dropout": 0.1, **OPTIONS[request.param]}, dropout=0.1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _wake(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.fixture
def wake() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Move every parameter off its initial value, so that none (such as B = 0) hides a part."""
    return _wake
