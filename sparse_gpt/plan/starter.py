"""A run file to begin with: a size, its data, and the recipe that our studies support for it."""

import json
import math
import shlex
from pathlib import Path
from typing import NamedTuple

from sparse_gpt.config.load import build_config, parse
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.data.shards.manifest import MANIFEST, Manifest, read_manifest
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.costs import model_report, parameter_counts

TOKENS_A_PARAMETER = 40
"""`default`'s best sizes in docs/scaling.md had 15 to 122 for each parameter that a token uses."""
EPOCHS = 4
"""Text that is read so often is nearly as good as new (Muennighoff et al. 2023)."""
_GPT2_VOCABULARY = 50257  # what prepare takes where it is given no other


class _Size(NamedTuple):
    model: str  # the keys of its shape, as YAML has them
    sequences: int  # of a step
    micro_batch: int  # at most
    recipe: str  # with {warmup}
    why: str


# The sizes and the recipe of configs/sweeps/laptop.yaml; above them those of configs/124m.yaml.
_SMALL = """optimizer: {lr: 4e-3, width_transfer: true, betas: [0.9, 0.95]}
schedule: {kind: wsd, warmup_steps: WARMUP, decay_fraction: 0.3, final_lr_ratio: 0.05}
deepspeed: {zero_optimization: {stage: 0}}"""
_STUDIED = """# Learning rate, schedule and batch: those of the runs of docs/scaling.md.
# The rate is that of d_model 128; width_transfer carries it to this width."""
_GPT2 = """optimizer: {lr: LR}
schedule: {kind: cosine, warmup_steps: WARMUP}
precision: bf16
deepspeed: {zero_optimization: {stage: 1}}"""
_PUBLISHED = """# Learning rate, schedule and batch: GPT-3's for a dense model of this size
# (Brown et al. 2020, table 2.1). Our own studies (docs/scaling.md) end at 2 million parameters that
# a token uses: try other rates before a long run."""


def _small(d_model: int, n_layer: int, n_head: int) -> _Size:
    shape = f"max_seq_len: 128, d_model: {d_model}, n_layer: {n_layer}, n_head: {n_head}"
    return _Size(shape, 16, 16, _SMALL, _STUDIED)


def _gpt2(name: str, lr: str, micro_batch: int) -> _Size:
    return _Size(f"preset: {name}", 512, micro_batch, _GPT2.replace("LR", lr), _PUBLISHED)


SIZES = {
    "d32": _small(32, 2, 2),
    "d48": _small(48, 2, 3),
    "d64": _small(64, 3, 4),
    "d96": _small(96, 3, 6),
    "d128": _small(128, 3, 8),
    "124m": _gpt2("124m", "6e-4", 8),
    "355m": _gpt2("355m", "3e-4", 4),
}


class Starter(NamedTuple):
    """The text of a run file, the run that it is, and the commands from here to a trained model."""

    text: str
    config: RunConfig
    commands: list[str]


def starter(
    path: Path, data: str, size: str | None = None, devices: int = 1, budget: float | None = None
) -> Starter:
    """A run file for `path`, of `data`: a folder of shards, or text to be prepared into one.

    budget: training FLOPs; without one a size gets 40 tokens for each parameter that a token uses,
    or 4 epochs of the shards where they have less.
    size: of `SIZES`; without one the size that comes nearest to that with the budget, or d64.
    Writes nothing. Raises ConfigError for what cannot be, DataError for damaged shards.
    """
    if size is not None and size not in SIZES:
        raise ConfigError(f"--size {size}: known are {', '.join(SIZES)}")
    if devices < 1:
        raise ConfigError(f"--devices {devices}: give 1 or more")
    if budget is not None and not 0 < budget < math.inf:
        raise ConfigError(f"--budget {budget:g}: give training FLOPs, above 0: 8e12, say")
    shards, manifest = _shards(data)
    vocab_size = manifest.tokenizer["vocab_size"] if manifest else _GPT2_VOCABULARY
    if size is None:
        size = "d64" if budget is None else _nearest(vocab_size, budget)
    one = SIZES[size]
    model = _model(size, vocab_size)
    there = manifest.tokens("train") if manifest else 0
    if budget is None:
        most = EPOCHS * there * _flops_a_token(model) if there else math.inf
        budget = min(_wanted(size, vocab_size), most)
    budget = float(f"{budget:.3g}")
    micro = min(one.micro_batch, math.ceil(one.sequences / devices))
    sequences = math.ceil(one.sequences / (micro * devices)) * micro * devices
    tokens_a_step = sequences * model.max_seq_len
    tokens = budget / _flops_a_token(model)
    steps = math.ceil(tokens / tokens_a_step)
    warmup = min(100 if one.why == _STUDIED else 700, steps // 10)
    parameters = parameter_counts(model)
    known = f", {tokens / there:.3g} times the data's {there:,}" if there else ""
    text = f"""# {shlex.join(["sparse-gpt", "init", str(path)])} wrote this: {parameters}.
# All keys: docs/configuration.md. Other values: sparse-gpt train FILE optimizer.lr=2e-3
# The dense twin: 'model.ffn={{preset: dense, fan_in_init: true}}'
model: {{vocab_size: {vocab_size}, {one.model}, ffn: default}}
# What sparse-gpt prepare wrote; vocab_size is its vocabulary's.
data: {{path: {json.dumps(shards, ensure_ascii=False)}}}
# {sequences} sequences of {model.max_seq_len} tokens a step, shared by the devices
# ({devices} here), each of which takes micro_batch at a time.
batch: {{global_tokens: {tokens_a_step}, micro_batch: {micro}}}
# Training FLOPs: {steps:,} steps, {tokens:.3g} tokens{known};
# {tokens / parameters.active:.3g} for each parameter that a token uses (in docs/scaling.md
# the best sizes had 15 to 122).
duration: {{flops: {budget:g}}}
{one.why}
{one.recipe.replace("WARMUP", str(warmup))}
# In steps. Ctrl-C saves a checkpoint too; the same command goes on from it.
checkpoint: {{every: {max(1, steps // 10)}}}
eval: {{every: {max(1, steps // 20)}, max_tokens: 65536}}
log: {{every: 10, profile_every: {max(10, steps // 10)}}}
"""
    tree, _ = parse(text)
    config = build_config(path, {"run_dir": f"runs/{path.stem}", **tree})
    prepare = ["sparse-gpt", "prepare", data if shards != data else "YOUR_TEXT", "--out", shards]
    train = ["sparse-gpt", "train", str(path), "--devices", str(devices)]
    generate = ["sparse-gpt", "generate", config.run_dir, "Once upon a time"]
    commands = [*([] if manifest else [prepare]), train, generate]
    return Starter(text, config, [shlex.join(words) for words in commands])


def _shards(data: str) -> tuple[str, Manifest | None]:
    """The folder of shards that `data` is or will be, and its manifest where that is there."""
    folder = Path(data)
    if (folder / MANIFEST).exists() or any(folder.glob("*-?????-*.bin")):
        return data, read_manifest(folder)
    if not folder.exists():
        return data, None
    shards = Path("shards") / (folder.resolve().name.split(".")[0] or "corpus")
    return str(shards), read_manifest(shards) if (shards / MANIFEST).exists() else None


def _model(size: str, vocab_size: int) -> ModelConfig:
    tree, _ = parse(f"{{vocab_size: {vocab_size}, {SIZES[size].model}, ffn: default}}")
    return ModelConfig.model_validate(tree)


def _flops_a_token(model: ModelConfig) -> float:
    return model_report(model).training / model.max_seq_len


def _wanted(size: str, vocab_size: int) -> float:
    """The training FLOPs that give a size 40 tokens for each parameter that a token uses."""
    model = _model(size, vocab_size)
    return TOKENS_A_PARAMETER * parameter_counts(model).active * _flops_a_token(model)


def _nearest(vocab_size: int, budget: float) -> str:
    return min(SIZES, key=lambda size: abs(math.log(_wanted(size, vocab_size) / budget)))
