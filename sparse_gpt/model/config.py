"""What a model is: strict, frozen configurations of GPT and of its feed-forward networks.

Every mistake raises `pydantic.ValidationError`: unknown keys and wrong types with the key in `loc`
(inside a discriminated union the tag comes first: `ffn.sparse.spectral.kep`), relations between
values (such as p·q = d_model) with both values named in the message.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_T = TypeVar("_T")
Share = Annotated[float, Field(gt=0, le=1)]
# What somebody can build, with room: beyond it a wrong number would take memory and time first.
Size = Annotated[int, Field(gt=0, le=10_000_000)]
Count = Annotated[int, Field(gt=0, le=10_000)]
Degree = Annotated[int, Field(gt=0, le=256)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def check_divides(name: str, value: int, d_model: int) -> None:
    """Raise ValueError, listing what is possible, when `value` does not divide d_model."""
    if d_model % value:
        low = [n for n in range(1, math.isqrt(d_model) + 1) if d_model % n == 0]
        divisors = ", ".join(map(str, sorted({*low, *(d_model // n for n in low)})))
        raise ValueError(f"{name} {value} does not divide d_model {d_model}; possible: {divisors}")


class Part(BaseModel):
    """A part of a configuration: immutable, no unknown keys. The docstring below a key is its
    description in docs/configuration.md and in editors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DenseFFNConfig(Part):
    """GPT-2's d → 4d → d."""

    kind: Literal["dense"] = "dense"
    """Which of the two networks it is."""
    fan_in_init: bool = False
    """Weights start at std 1/√(inputs), which trains better at small widths (docs/sparse-ffn.md);
    else at GPT-2's 0.02 whatever the width."""
    dropout: Probability = 0.0
    """Probability, on the branch's output."""


class SpectralConfig(Part):
    """The 2-D DCT over the channels reshaped (p, q), then a selection of coefficients."""

    kind: Literal["dct"] = "dct"
    """Which of the two spectra it is."""
    path: Literal["series", "parallel"] = "series"
    """`series` feeds the polynomial, `parallel` works beside it on the same input."""
    factors: tuple[Size, Size] | None = None
    """p and q, whose product is `d_model`; null: the most square ones."""
    selection: Literal["hard", "soft"] = "hard"
    """Kept coefficients stay as they are, or `soft`: less the threshold."""
    threshold: Literal["exact", "constant"] = "exact"
    """`exact`: top-k of the token. `constant`: the normal quantile, right for a token of unit RMS,
    which is what the norm before makes of each; no sorting, no statistics."""
    keep: Share = 0.5
    """Share of a token's coefficients that is kept, about."""

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


class DictionaryConfig(Part):
    """A learned spectrum: blocks of atoms, of which a token computes those of most energy. The
    polynomial is in it, between analysis and synthesis."""

    kind: Literal["dictionary"] = "dictionary"
    """Which of the two spectra it is."""
    blocks: Count = 64
    """Blocks of the dictionary. More hold more and cost no more products, but memory."""
    block_size: Size | None = None
    """Atoms of a block; null: `d_model` / `top_k`, so that a token has `d_model` coefficients."""
    top_k: Count = 2
    """Blocks that a token computes; at most `blocks`."""
    balance_rate: Annotated[float, Field(ge=0)] = 0.05
    """How far a block's logit moves a step, up where it was given less than its share."""

    def size(self, d_model: int) -> int:
        """Atoms of a block at a width in channels; ValueError where there is no such number."""
        if self.block_size is not None:
            return self.block_size
        check_divides("spectral.top_k", self.top_k, d_model)
        return d_model // self.top_k

    @model_validator(mode="after")
    def _enough(self) -> DictionaryConfig:
        if self.top_k > self.blocks:
            raise ValueError(f"top_k {self.top_k} is more than the {self.blocks} blocks there are")
        return self


class PolynomialConfig(Part):
    """Chebyshev features, mixed within groups of channels."""

    group_size: Size = 16
    """Channels of a group; divides `d_model`."""
    degrees: Annotated[tuple[Degree, ...], Field(min_length=1)] = (1, 2, 3, 4, 5, 6, 7)
    """Degrees of the Chebyshev polynomials, rising."""

    @field_validator("degrees")
    @classmethod
    def _ascending(cls, degrees: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in itertools.pairwise(degrees)):
            raise ValueError(f"degrees {degrees} must rise without repeats, such as (1, 2, 3)")
        return degrees


class RefineConfig(Part):
    """Stacked scalar refinements of every channel."""

    stages: Count = 4
    """How many, one after another."""


class FeedbackConfig(Part):
    """Extra low-rank steps for some of the tokens.

    Executed cost is d + iterations·2·d·rank multiply-accumulates a token, selected or not.
    """

    rank: Count = 4
    """Inner channels of a group."""
    groups: Count = 8
    """Groups of channels; divides `d_model`."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the tokens that is selected, about."""
    iterations: Count = 1
    """Steps, one after another."""


class ProjectionConfig(Part):
    """The last mixing of channels."""

    kind: Literal["dense", "factored"] = "dense"
    """`factored`: two block-diagonal matrices."""
    block: Size = 64
    """Channels of a `factored` block; divides `d_model`. Under 64 matrix units idle; from √d_model
    on every output sees every input."""


class SparseFFNConfig(Part):
    """The sparse FFN, part by part; its defaults are the preset `paper`.

    `paper` is the published claim: 44,544 MAC-equivalents at d_model 128. Its arithmetic has no
    token feedback, so feedback is None; the claim names no share of kept coefficients (the cost
    does not depend on it), so `keep` 0.5 is our choice.
    """

    kind: Literal["sparse"] = "sparse"
    """Which of the two networks it is."""
    spectral: Annotated[SpectralConfig | DictionaryConfig | None, Field(discriminator="kind")] = (
        SpectralConfig()
    )
    """Fixed (`kind: dct`) or learned (`kind: dictionary`)."""
    polynomial: PolynomialConfig | None = PolynomialConfig()
    """Null with a dictionary, which has its own."""
    feedback: FeedbackConfig | None = None
    refine: RefineConfig | None = RefineConfig()
    projection: ProjectionConfig = ProjectionConfig()
    norm_out: Literal["after", "before"] | None = "after"
    """On which side of the projection the second norm stands; null with a dictionary, which the
    projection stands beside."""
    out_gain: Annotated[float, Field(gt=0)] = 1.0
    """RMS with which the branch starts, or what is beside a dictionary."""
    dropout: Probability = 0.0
    """Probability, on the branch's output."""

    @model_validator(mode="before")
    @classmethod
    def _of_0_1(cls, value: Any) -> Any:
        """Version 0.1 wrote `backend`, of kernels that are gone, and knew one kind of spectrum."""
        if not isinstance(value, Mapping):
            return value
        value = {k: v for k, v in value.items() if (k, v) not in _OF_0_1}
        spectral = value.get("spectral")
        if isinstance(spectral, Mapping):
            value["spectral"] = {"kind": "dct", **spectral}
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> SparseFFNConfig:
        learned = isinstance(self.spectral, DictionaryConfig)
        for name in ("polynomial", "norm_out"):
            if learned != (getattr(self, name) is None):
                raise ValueError(f"{name} must be null with a dictionary, and with nothing else")
        return self

    def check(self, d_model: int) -> None:
        """Raise ValueError, naming the value, when a part cannot have this width in channels."""
        if isinstance(self.spectral, DictionaryConfig):
            self.spectral.size(d_model)
        elif self.spectral:
            self.spectral.split(d_model)
        if self.polynomial:
            check_divides("polynomial.group_size", self.polynomial.group_size, d_model)
        if self.feedback:
            check_divides("feedback.groups", self.feedback.groups, d_model)
        if self.projection.kind == "factored":
            check_divides("projection.block", self.projection.block, d_model)


_OF_0_1 = (("backend", "auto"), ("backend", "eager"))

FFNConfig = Annotated[DenseFFNConfig | SparseFFNConfig, Field(discriminator="kind")]

# docs/sparse-ffn.md has the studies that they come from
_DEFAULT = SparseFFNConfig(
    spectral=DictionaryConfig(), polynomial=None, refine=None, norm_out=None, out_gain=0.3
)
_LIGHT = SparseFFNConfig(
    spectral=SpectralConfig(path="parallel", selection="soft", threshold="constant"),
    polynomial=PolynomialConfig(degrees=(1, 2)),
    feedback=FeedbackConfig(),
    refine=RefineConfig(stages=2),
    norm_out="before",
    out_gain=0.08,
)
FFN_PRESETS: dict[str, DenseFFNConfig | SparseFFNConfig] = {
    "dense": DenseFFNConfig(),
    "paper": SparseFFNConfig(),
    "light": _LIGHT,
    "default": _DEFAULT,
}
SIZES: dict[str, dict[str, int]] = {  # 124m and up: GPT-2 (Radford et al. 2019), table 2
    "tiny": {"d_model": 128, "n_layer": 4, "n_head": 4, "max_seq_len": 128},
    "124m": {"d_model": 768, "n_layer": 12, "n_head": 12, "max_seq_len": 1024},
    "355m": {"d_model": 1024, "n_layer": 24, "n_head": 16, "max_seq_len": 1024},
    "774m": {"d_model": 1280, "n_layer": 36, "n_head": 20, "max_seq_len": 1024},
    "1558m": {"d_model": 1600, "n_layer": 48, "n_head": 25, "max_seq_len": 1024},
}


def _named(presets: Mapping[str, _T], name: object) -> _T:
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"no preset {name!r}; possible: {', '.join(presets)}")
    return presets[name]


def ffn_preset(name: str) -> DenseFFNConfig | SparseFFNConfig:
    """The FFN called `dense`, `paper`, `light` or `default`; ValueError for any other name."""
    found: DenseFFNConfig | SparseFFNConfig = _named(FFN_PRESETS, name)
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


class ModelConfig(Part):
    """A GPT: its sizes, and the feed-forward network of its blocks.

    A mapping may name presets, `preset: tiny` and `ffn: default` or
    `ffn: {preset: default, spectral: {keep: 0.25}}`; they are expanded, so a dump names none.
    """

    vocab_size: Size = 50257
    """Ids of the data's vocabulary; `sparse-gpt shards info` says how many."""
    max_seq_len: Size
    """Tokens of a sequence, the context."""
    d_model: Size
    """Channels: the width of the residual stream."""
    n_layer: Annotated[Count, Field(le=1000)]  # what a model costs is counted by building it
    """Transformer blocks."""
    n_head: Count
    """Attention heads of a block; divides `d_model`."""
    dropout: Probability = 0.0
    """Probability, on the embeddings and the attention's output; the FFN has its own."""
    document_mask: bool = False
    """No token sees another document's, and positions start anew in each."""
    ffn: FFNConfig = DenseFFNConfig()
    """Feed-forward network: a preset's name, or a `preset` and what differs, or a `kind`."""

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
            return {**_named(SIZES, value["preset"]), **rest}
        return value

    @field_validator("ffn", mode="before")
    @classmethod
    def _expand_ffn(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if isinstance(value, Mapping) and "preset" in value:
            rest = {key: field for key, field in value.items() if key != "preset"}
            named, spectral = ffn_preset(value["preset"]).model_dump(), rest.get("spectral")
            kind = (named.get("spectral") or {}).get("kind")
            if isinstance(spectral, Mapping) and spectral.get("kind", kind) != kind:
                named["spectral"] = None  # of another kind, nothing of it can stay
            return merge(named, rest)
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
