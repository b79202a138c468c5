"""A trained model as a folder that transformers, and what reads its files, loads."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparse_gpt.config.load import to_yaml
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.evaluate.checkpoint import Trained
from sparse_gpt.files import new_folder, to_json
from sparse_gpt.model.config import SparseFFNConfig
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.train.metrics_file import read_metrics

if TYPE_CHECKING:
    from transformers import GenerationConfig


def export(
    trained: Trained, out: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB"
) -> None:
    """Write weights (safetensors, of at most `shard_size` a file), configuration, tokenizer and
    model card to the new folder `out`.

    Dense: a plain GPT-2 of transformers. Sparse: a SparseGPT2LMHeadModel, whose code lies beside
    it for `trust_remote_code=True` where sparse_gpt is not installed. With the run's configuration
    and provenance the folder is a checkpoint for `load_trained`. Raises ConfigError without
    transformers, and DataError where `out` is there already or cannot be written, or where the
    vocabulary is not at hand.
    """
    try:
        from sparse_gpt.huggingface.convert import to_transformers
        from sparse_gpt.huggingface.tokenizer import fast_tokenizer
        from sparse_gpt.huggingface.travel import AUTO_MAP, travelling_code
    except ImportError:
        raise ConfigError("exporting needs: pip install 'sparse-gpt[hf]'") from None
    tokenizer, model = trained.tokenizer, trained.config.model
    with new_folder(out) as aside:
        made = to_transformers(trained.model.to(dtype), tokenizer.eot)
        if isinstance(model.ffn, SparseFFNConfig):
            made.config.auto_map = AUTO_MAP
            for name, code in travelling_code().items():
                (aside / name).write_text(code)
        generation: GenerationConfig = made.generation_config
        generation.pad_token_id = tokenizer.eot
        made.save_pretrained(aside, max_shard_size=shard_size)
        fast_tokenizer(tokenizer.ranks, tokenizer.pattern, model.max_seq_len).save_pretrained(aside)
        (aside / "README.md").write_text(_card(trained, out.name))
        _write_origin(trained, aside)


def _write_origin(trained: Trained, aside: Path) -> None:
    """What makes the folder a checkpoint for our own commands."""
    origin = {"exported": {"run": str(trained.run), "step": trained.step}}
    (aside / "config.yaml").write_text(to_yaml(trained.config))
    (aside / "provenance.json").write_text(to_json({**trained.provenance, **origin}) + "\n")
    trained.tokenizer.publish(aside)


def _card(trained: Trained, name: str) -> str:
    """What a reader of the folder wants to know of the model."""
    config, came_from = trained.config, trained.provenance
    counts, start = parameter_counts(config.model), came_from["starts"][-1]
    rows = [row for row in read_metrics(trained.run) if row["step"] <= trained.step]
    losses = [f"{row['val/loss']:.4f}" for row in rows if "val/loss" in row]
    tokens = trained.step * config.batch.global_tokens
    facts = {
        "checkpoint": f"step {trained.step:,}, {tokens:,} tokens",
        "held-out loss": f"{losses[-1]} nats a token" if losses else "not measured",
        "training FLOPs": f"{rows[-1]['gflops'] * 1e9:.4g}, logits counted" if rows else "unknown",
        "parameters": f"{counts.total:,}, of which a token uses {counts.active:,}",
        "shape": _shape(config),
        "feed-forward network": config.model.ffn.kind,
        "data": f"`{came_from['data_manifest_hash']}` (hash of the manifest)",
        "vocabulary": f"`{came_from['vocab_hash']}` (sha256 of the rank file)",
        "code": f"sparse-gpt {start['versions']['sparse-gpt']}, commit {start['git_commit']}",
        "trained with": f"torch {start['versions']['torch']}, DeepSpeed "
        f"{start['versions']['deepspeed']}, {start['hardware']['world_size']} × "
        f"{start['hardware']['device']}, {start['date']}",
    }
    sparse = isinstance(config.model.ffn, SparseFFNConfig)
    option = ", trust_remote_code=True" if sparse else ""
    installed = "\nWith sparse_gpt installed, `import sparse_gpt.huggingface` does instead of "
    return "\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
            f"# {name}\n",
            "| | |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{option})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{option})\n```',
            *([f"{installed}`trust_remote_code`."] if sparse else []),
            "\nIn training every document began with `<|endoftext|>`; put one before a prompt.\n",
        ]
    )


def _shape(config: RunConfig) -> str:
    model = config.model
    return (
        f"{model.n_layer} layers of {model.d_model} channels and {model.n_head} heads, context "
        f"{model.max_seq_len:,}, {model.vocab_size:,} ids"
    )
