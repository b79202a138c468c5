"""Which configurations the kernels can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_gpt.model.config import SparseFFNConfig

_MAX_WIDTH = 4096  # channels: a tile holds whole tokens in registers
_MAX_FACTOR = 128  # of the transform, a matrix in shared memory
_MAX_GROUP = 512  # channels of a feedback group, likewise
_MAX_RANK = 64


def unsupported(config: SparseFFNConfig, d_model: int) -> str | None:
    """One line naming the first value that the kernels cannot do, or None."""
    spectral, polynomial, feedback = config.spectral, config.polynomial, config.feedback
    if d_model % 16 or d_model > _MAX_WIDTH:
        return f"d_model {d_model}: kernels need a multiple of 16 up to {_MAX_WIDTH}"
    if spectral:
        factors = spectral.split(d_model)
        if max(factors) > _MAX_FACTOR:
            return f"spectral.factors {factors}: kernels need both at most {_MAX_FACTOR}"
    if polynomial.group_size not in (16, 32, 64):
        return f"polynomial.group_size {polynomial.group_size}: kernels need 16, 32 or 64"
    if feedback and d_model // feedback.groups > _MAX_GROUP:
        width = d_model // feedback.groups
        return f"feedback.groups {feedback.groups}: {width} channels a group, not {_MAX_GROUP}"
    if feedback and feedback.rank > _MAX_RANK:
        return f"feedback.rank {feedback.rank}: kernels need at most {_MAX_RANK}"
    return None
