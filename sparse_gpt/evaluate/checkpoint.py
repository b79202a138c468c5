"""A trained model by the name of its checkpoint: RUN, RUN@STEP, or the folder of an export."""

import copy
from collections.abc import Sequence
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
from sparse_gpt.train.checkpoint.named import find, load_model
from sparse_gpt.train.feed import open_data
from sparse_gpt.train.precision import DTYPES
from sparse_gpt.train.run_dir import read_provenance


@dataclass(frozen=True)
class Trained:
    """A model as its run evaluates it: in evaluation mode, in the run's precision.

    run: its folder, or that of its export.
    """

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
    if (Path(name) / "config.json").exists():
        run, step, model = _exported(Path(name))
    else:
        run, step = find(name)
        model = load_model(run, step)
    config = load_config(run / "config.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, dtype or DTYPES[config.precision]).eval()
    return Trained(run, step, config, read_provenance(run), model)


def on_devices(model: GPT, devices: Sequence[torch.device] = ()) -> list[GPT]:
    """The model, which is on the first of the devices, and a copy on each other one; by default on
    all GPUs."""
    devices = devices or [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    return [model, *(copy.deepcopy(model).to(one) for one in devices[1:])]


def _exported(folder: Path) -> tuple[Path, int, GPT]:
    """The folder, the checkpoint's step, and the model in fp32."""
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder}: was not exported by sparse-gpt; a run may begin from it (start_from)"
        )
    try:
        from sparse_gpt.huggingface.convert import read_model
    except ImportError:
        raise ConfigError(f"reading {folder} needs: pip install 'sparse-gpt[hf]'") from None
    try:
        model = read_model(str(folder))
        step: int = read_provenance(folder)["exported"]["step"]
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder}: is damaged: {str(error).splitlines()[0]}") from None
    return folder, step, model
