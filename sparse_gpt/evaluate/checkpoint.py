"""A trained model by the name of its checkpoint: RUN, its newest whole one, or RUN@STEP."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.data import Tokenizer, tokenizer_beside
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.checkpoint.manifest import damage, read_manifest, step_of, tag_of, tags
from sparse_gpt.train.checkpoint.weights import load_weights
from sparse_gpt.train.feed import open_data
from sparse_gpt.train.precision import DTYPES
from sparse_gpt.train.run_dir import read_provenance


@dataclass(frozen=True)
class Trained:
    """A model as its run evaluates it: in evaluation mode, in the run's precision."""

    run: Path
    step: int
    config: RunConfig
    provenance: dict[str, Any]
    model: GPT

    @property
    def name(self) -> str:
        """RUN@STEP."""
        return f"{self.run}@{self.step}"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the run's vocabulary. Raises DataError where it is neither with the run nor with the
        shards."""
        identity = self.provenance.get("tokenizer")
        if identity is not None:
            return tokenizer_beside(self.run, identity)
        dataset = open_data(self.config.data).sources[0].dataset  # a run of 0.1
        return tokenizer_beside(dataset.train.folder, dataset.manifest.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.wte.weight.device


def load_trained(name: str, dtype: torch.dtype | None = None) -> Trained:
    """The model of checkpoint `name`, on a GPU if there is one; in `dtype`, or that of the run.

    Raises ConfigError where there is no such run, or no whole checkpoint of it.
    """
    run, step = find(name)
    folder = run / "checkpoints" / tag_of(step)
    config = load_config(run / "config.yaml")
    model = GPT(config.model)
    try:
        weights = load_weights(folder)
        first = torch.load(folder / "rank-0.pt", map_location="cpu", weights_only=True, mmap=True)
        statistics = first["engine"]["statistics"]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(weights[key].view_as(parameter))
            for key, buffer in model.named_buffers():
                if key in statistics:
                    buffer.copy_(statistics[key])
    except (KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{folder}: is not of the model in {run / 'config.yaml'}: {error}"
        ) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, dtype or DTYPES[config.precision]).eval()
    return Trained(run, step, config, read_provenance(run), model)


def find(name: str) -> tuple[Path, int]:
    """The run's folder and the step of checkpoint `name`; a folder may have an @ in its name.

    Raises ConfigError where there is no such run, or no whole checkpoint of it.
    """
    run, _, wanted = name.rpartition("@") if not Path(name).is_dir() else (name, "", "")
    root = Path(run or name) / "checkpoints"
    if not (Path(run or name) / "config.yaml").exists():
        raise ConfigError(f"{name}: is no run; give the folder of one, or FOLDER@STEP")
    there = tags(root)
    steps = ", ".join(str(step_of(tag)) for tag in reversed(there)) or "none"
    if wanted:
        if not wanted.isdigit() or tag_of(int(wanted)) not in there:
            raise ConfigError(f"{run}: has no checkpoint of step {wanted}; there are: {steps}")
        there = [tag_of(int(wanted))]
    for tag in there:
        manifest = read_manifest(root / tag)
        if manifest is not None and damage(root / tag, manifest, manifest["files"]) is None:
            return root.parent, step_of(tag)
    raise ConfigError(f"{name}: has no whole checkpoint (steps tried: {wanted or steps})")
