"""What a model is: strict, frozen configurations of GPT and of its feed-forward networks.

Every mistake raises `pydantic.ValidationError`: unknown keys and wrong types with the key in `loc`
(inside a discriminated union the tag comes first: `ffn.sparse.spectral.kep`), relations between
values (such as p·q = d_model) with both values named in the message.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def check_divides(name: str, value: int, d_model: int) -> None:
    """Raise ValueError, listing what is possible, when `value` does not divide d_model."""
    if d_model % value:
        divisors = ", ".join(str(n) for n in range(1, d_model + 1) if d_model % n == 0)
        raise ValueError(f"{name} {value} does not divide d_model {d_model}; possible: {divisors}")


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseFFNConfig(_Config):
    """GPT-2's d → 4d → d; `dropout` acts on the branch's output.

    `fan_in_init` starts the weights at std 1/√(inputs), which trains better at small widths
    (docs/sparse-ffn.md), not at GPT-2's 0.02 whatever the width.
    """

    kind: Literal["dense"] = "dense"
    fan_in_init: bool = False
    dropout: Probability = 0.0


class SpectralConfig(_Config):
    """The 2-D DCT over the channels reshaped (p, q), then a selection of coefficients.

    `path`: `series` feeds the polynomial, `parallel` works beside it on the same input.
    `factors` None is the most square split of d_model. Selection keeps about a share `keep` of a
    token's coefficients, `hard` as they are, `soft` less the threshold. The threshold is `exact`
    (top-k of the token) or `constant`: the normal quantile, right for a token of unit RMS, which
    is what the norm before makes of each; no sorting, no statistics.
    """

    path: Literal["series", "parallel"] = "series"
    factors: tuple[PositiveInt, PositiveInt] | None = None
    selection: Literal["hard", "soft"] = "hard"
    threshold: Literal["exact", "constant"] = "exact"
    keep: Share = 0.5

    def split(self, d_model: int) -> tuple[int, int]:
        """(p, q) for a width in channels; ValueError when p·q is another."""
        if self.factors is None:
            p = next(n for n in range(math.isqrt(d_model), 0, -1) if d_model % n == 0)
            factors = (p, d_model // p)
        else:
            factors = self.factors
        p, q = factors
        if p * q != d_model:
            raise ValueError(
                f"spectral.factors {factors}: p·q is {p * q} and must be d_model {d_model}"
            )
        return factors


class PolynomialConfig(_Config):
    """Chebyshev features of the kept `degrees`, mixed within groups of `group_size` channels."""

    group_size: PositiveInt = 16
    degrees: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 4, 5, 6, 7)

    @field_validator("degrees")
    @classmethod
    def _ascending(cls, degrees: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in itertools.pairwise(degrees)):
            raise ValueError(f"degrees {degrees} must rise without repeats, such as (1, 2, 3)")
        return degrees


class RefineConfig(_Config):
    """`stages` stacked scalar refinements of every channel."""

    stages: PositiveInt = 4


class FeedbackConfig(_Config):
    """Extra low-rank steps for about a `share` of the tokens.

    `rank` is per group of d_model / `groups` channels; executed cost is d + iterations·2·d·rank
    multiply-accumulates for every token, selected or not.
    """

    rank: PositiveInt = 4
    groups: PositiveInt = 8
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    iterations: PositiveInt = 1


class ProjectionConfig(_Config):
    """The last mixing of channels; `block` is the width of a `factored` projection's blocks.

    Blocks narrower than 64 leave matrix units idle; a block of at least √d_model lets every
    output see every input.
    """

    kind: Literal["dense", "factored"] = "dense"
    block: PositiveInt = 64


class SparseFFNConfig(_Config):
    """The sparse FFN, part by part; its defaults are the preset `paper`.

    `paper` is the published claim: 44,544 MAC-equivalents at d_model 128. Its arithmetic has no
    token feedback, so feedback is None; the claim names no share of kept coefficients (the cost
    does not depend on it), so `keep` 0.5 is our choice.
    `backend`: `eager` is plain PyTorch, `triton` the fused GPU kernels, `auto` these where they
    can run. `norm_out` says on which side of the projection the second norm stands; `out_gain` is
    the RMS with which the branch starts.
    """

    kind: Literal["sparse"] = "sparse"
    spectral: SpectralConfig | None = SpectralConfig()
    polynomial: PolynomialConfig = PolynomialConfig()
    feedback: FeedbackConfig | None = None
    refine: RefineConfig | None = RefineConfig()
    projection: ProjectionConfig = ProjectionConfig()
    backend: Literal["auto", "eager", "triton"] = "auto"
    norm_out: Literal["after", "before"] = "after"
    out_gain: Annotated[float, Field(gt=0)] = 1.0
    dropout: Probability = 0.0

    def check(self, d_model: int) -> None:
        """Raise ValueError, naming the value, when a part cannot have this width in channels."""
        if self.spectral:
            self.spectral.split(d_model)
        check_divides("polynomial.group_size", self.polynomial.group_size, d_model)
        if self.feedback:
            check_divides("feedback.groups", self.feedback.groups, d_model)
        if self.projection.kind == "factored":
            check_divides("projection.block", self.projection.block, d_model)
        if self.backend == "triton":
            from sparse_gpt.model.ffn.kernels.limits import unsupported

            if problem := unsupported(self, d_model):
                raise ValueError(f"backend triton: {problem}")


FFNConfig = Annotated[DenseFFNConfig | SparseFFNConfig, Field(discriminator="kind")]

_PAPER = SparseFFNConfig()
_DEFAULT = SparseFFNConfig(  # docs/sparse-ffn.md has the study that it comes from
    spectral=SpectralConfig(path="parallel", selection="soft", threshold="constant"),
    polynomial=PolynomialConfig(degrees=(1, 2)),
    feedback=FeedbackConfig(),
    refine=RefineConfig(stages=2),
    norm_out="before",
    out_gain=0.08,
)
_FFN_PRESETS: dict[str, DenseFFNConfig | SparseFFNConfig] = {
    "dense": DenseFFNConfig(),
    "paper": _PAPER,
    "default": _DEFAULT,
}
_SIZES: dict[str, dict[str, int]] = {  # 124m and up: GPT-2 (Radford et al. 2019), table 2
    "tiny": {"d_model": 128, "n_layer": 4, "n_head": 4, "max_seq_len": 128},
    "124m": {"d_model": 768, "n_layer": 12, "n_head": 12, "max_seq_len": 1024},
    "355m": {"d_model": 1024, "n_layer": 24, "n_head": 16, "max_seq_len": 1024},
    "774m": {"d_model": 1280, "n_layer": 36, "n_head": 20, "max_seq_len": 1024},
    "1558m": {"d_model": 1600, "n_layer": 48, "n_head": 25, "max_seq_len": 1024},
}


def _named(presets: Mapping[str, Any], name: object) -> Any:
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"no preset {name!r}; possible: {', '.join(presets)}")
    return presets[name]


def ffn_preset(name: str) -> DenseFFNConfig | SparseFFNConfig:
    """The FFN called `dense`, `paper` or `default`; ValueError for any other name."""
    found: DenseFFNConfig | SparseFFNConfig = _named(_FFN_PRESETS, name)
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


class ModelConfig(_Config):
    """A GPT: sizes in tokens (`vocab_size`, `max_seq_len`) and channels (`d_model`).

    `dropout` acts on the embeddings and the attention's output; the FFN has its own.
    With `document_mask` no token sees another document's, and positions start anew in each.
    A mapping may name presets, `preset: tiny` and `ffn: default` or
    `ffn: {preset: default, spectral: {keep: 0.25}}`; they are expanded, so a dump names none.
    """

    vocab_size: PositiveInt = 50257
    max_seq_len: PositiveInt
    d_model: PositiveInt
    n_layer: PositiveInt
    n_head: PositiveInt
    dropout: Probability = 0.0
    document_mask: bool = False
    ffn: FFNConfig = DenseFFNConfig()

    @classmethod
    def preset(
        cls, name: str, ffn: str | Mapping[str, Any] = "dense", **overrides: Any
    ) -> ModelConfig:
        """Size `tiny`, `124m`, `355m`, `774m` or `1558m` with an FFN preset and other fields.

        Raises pydantic.ValidationError (a ValueError) for an unknown name or a bad value.
        """
        return cls.model_validate({"preset": name, "ffn": ffn, **overrides})

    def dense_twin(self) -> ModelConfig:
        """The same shape with the dense FFN, to compare with."""
        return self.model_copy(update={"ffn": DenseFFNConfig(dropout=self.ffn.dropout)})

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "preset" in value:
            rest = {key: field for key, field in value.items() if key != "preset"}
            return {**_named(_SIZES, value["preset"]), **rest}
        return value

    @field_validator("ffn", mode="before")
    @classmethod
    def _expand_ffn(cls, value: Any) -> Any:
        if isinstance(value, str):
            return ffn_preset(value)
        if isinstance(value, Mapping) and "preset" in value:
            rest = {key: field for key, field in value.items() if key != "preset"}
            return merge(ffn_preset(value["preset"]).model_dump(), rest)
        return value

    @model_validator(mode="after")
    def _shapes_agree(self) -> ModelConfig:
        check_divides("n_head", self.n_head, self.d_model)
        if isinstance(self.ffn, SparseFFNConfig):
            try:
                self.ffn.check(self.d_model)
            except ValueError as error:
                raise ValueError(f"ffn.{error}") from None
        return self
