"""The model of a checkpoint by its name: RUN, its newest whole one, or RUN@STEP."""

from pathlib import Path

import torch

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.checkpoint.manifest import damage, read_manifest, step_of, tag_of, tags
from sparse_gpt.train.checkpoint.weights import load_weights


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


def load_model(run: Path, step: int) -> GPT:
    """The model of a run after `step` steps, in fp32, with its running statistics.

    Raises ConfigError where the checkpoint is of another model than the run's configuration.
    """
    folder = run / "checkpoints" / tag_of(step)
    model = GPT(load_config(run / "config.yaml").model)
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
    return model
