"""The weights alone of a checkpoint."""

import json
from pathlib import Path

import torch


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint by parameter name, flattened: `(numel,)` each.

    Raises OSError, ValueError or KeyError where `folder` holds no whole checkpoint.
    """
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name in json.loads((folder / "manifest.json").read_text())["files"]:
        file = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        for key, saved in file["fragments"].items():
            parts.setdefault(key, []).append((saved["start"], saved["master"]))
    return {
        key: torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])])
        for key, found in parts.items()
    }
