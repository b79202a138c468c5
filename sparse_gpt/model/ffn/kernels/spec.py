"""What the kernels must know of an FFN besides its tensors, as text that an operator can take."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from sparse_gpt.model.ffn.kernels import spectral

if TYPE_CHECKING:
    from sparse_gpt.model.ffn.sparse import UltraEfficientSparseFFN


class Spec(NamedTuple):
    """The options of an FFN that its tensors' shapes do not tell."""

    path: str  # "none" without a spectral stage
    soft: bool
    exact: bool
    k: int
    quantile: float
    degrees: tuple[int, ...]
    stages: int
    steps: int  # of feedback, 0 without
    factored: bool
    norm_out: str

    def text(self) -> str:
        """For an operator's argument; in constructs that torch.compile can trace."""
        degrees = ",".join([str(n) for n in self.degrees])
        return (
            f"{self.path} {int(self.soft)} {int(self.exact)} {self.k} {self.quantile!r} "
            f"{degrees} {self.stages} {self.steps} {int(self.factored)} {self.norm_out}"
        )

    @property
    def series(self) -> bool:
        """Whether the polynomial reads what the selection left, renormalised."""
        return self.path == "series"

    @property
    def selecting(self) -> spectral.Selection:
        """The selection as the spectral kernels take it."""
        return self.soft, self.exact, self.k, self.quantile

    @property
    def gradients(self) -> list[tuple[str, ...]]:
        """Names of parameters, grouped as backward makes them: rows of one tensor, or one alone."""
        refine = [f"refine.{x}.{n}" for x in ("alpha", "a", "b") for n in range(self.stages)]
        groups: list[list[str]] = [["norm_in.weight", "norm_in.bias"]]
        if self.path != "none":
            groups[0].append("spectral.gain")
        groups.append(["polynomial.weight"])
        if self.steps:
            groups.append(["polynomial.bias", "feedback.score"])
            groups += [["feedback.a"], ["feedback.b"], refine]
        else:
            groups.append(["polynomial.bias", *refine])
        factors = ("first", "second") if self.factored else ("weight",)
        groups += [[f"projection.{name}"] for name in factors]
        groups.append(["norm_out.weight", "norm_out.bias"])
        return [tuple(group) for group in groups if group]

    @property
    def names(self) -> list[str]:
        """Names of all parameters, in the order of the operators' arguments."""
        return [name for group in self.gradients for name in group]


@lru_cache
def parse(text: str) -> Spec:
    words = iter(text.split())
    return Spec(
        path=next(words),
        soft=next(words) == "1",
        exact=next(words) == "1",
        k=int(next(words)),
        quantile=float(next(words)),
        degrees=tuple(int(n) for n in next(words).split(",")),
        stages=int(next(words)),
        steps=int(next(words)),
        factored=next(words) == "1",
        norm_out=next(words),
    )


def spec_of(ffn: UltraEfficientSparseFFN) -> Spec:
    config, s = ffn.config, ffn.spectral
    return Spec(
        path="none" if s is None else s.config.path,
        soft=s is not None and s.config.selection == "soft",
        exact=s is not None and s.config.threshold == "exact",
        k=0 if s is None else s.k,
        quantile=0.0 if s is None else s.quantile,
        degrees=config.polynomial.degrees,
        stages=config.refine.stages if config.refine else 0,
        steps=config.feedback.iterations if config.feedback else 0,
        factored=config.projection.kind == "factored",
        norm_out=config.norm_out,
    )
