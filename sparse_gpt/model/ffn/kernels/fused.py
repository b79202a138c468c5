"""The fused FFN as two custom operators, forward and backward, from the stages' kernels.

Operators, because autograd, torch.compile, torch.utils.checkpoint and FLOP counters then see one
opaque call each way. Their arguments are x, the parameters (as many as the options need), the
tensors that are not learned, and the options as text: all that an operator's signature allows.
Forward returns y and `stats`, 28 bytes a token; backward computes the chain again from x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_gpt.model.ffn.kernels import feedback, norm, polynomial, projection, spectral
from sparse_gpt.model.ffn.kernels.spec import Spec, parse, spec_of

if TYPE_CHECKING:
    from sparse_gpt.model.ffn.sparse import UltraEfficientSparseFFN

# Rows of stats, `(7, tokens)` float32: LN_in's mean and 1/std; in series 1/RMS(p), p the
# polynomial's input; LN_out's mean and 1/std; TokenFeedback's gate and m.
_ROWS, _IN, _SCALE, _OUT, _GATE, _M = 7, slice(0, 2), 2, slice(3, 5), 5, 6


class _Chain(NamedTuple):
    """What the chain computes up to the projection's input v."""

    p: Tensor
    s: Tensor | None  # what is added to the polynomial's output
    scored: Tensor | None  # v before feedback
    v: Tensor
    stages: Tensor | None  # the refine stages' parameters, `(3, stages, d)` float32


def _chain(
    x: Tensor,
    w: dict[str, Tensor],
    constants: Sequence[Tensor],
    spec: Spec,
    stats: Tensor,
    gate: Tensor | None = None,
) -> _Chain:
    """The chain for x `(tokens, d)`; writes its rows of stats. A known `gate` is not made again."""
    norm_in = w["norm_in.weight"], w["norm_in.bias"]
    s = scored = None
    if spec.path == "none":
        p = norm.forward(x, *norm_in, stats[_IN])
    else:
        left, right = constants[:2]
        p, s = spectral.forward(
            x, norm_in, left, right, w["spectral.gain"], stats[:3], spec.series, spec.selecting
        )
    stages = None
    if spec.stages:
        rows = [w[name] for name in spec.names if name.startswith("refine.")]
        stages = torch.stack(rows).float().view(3, spec.stages, -1)
    v, m = polynomial.forward(
        p,
        stats[_SCALE] if spec.series else None,
        s,
        w["polynomial.weight"],
        w["polynomial.bias"],
        w.get("feedback.score"),
        stages,
        spec.degrees,
    )
    if m is not None:
        scored = v
        if gate is None:
            stats[_M] = m
            gate = stats[_GATE] = torch.sigmoid(m) * (m > constants[-1])
        v = feedback.forward(v, gate, w["feedback.a"], w["feedback.b"], stages, spec.steps)
    return _Chain(p, s, scored, v, stages)


def _norm_out(w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return w["norm_out.weight"], w["norm_out.bias"]


def _projection(w: dict[str, Tensor]) -> list[Tensor]:
    return [weight for name, weight in w.items() if name.startswith("projection.")]


@torch.library.custom_op("sparse_gpt::ffn_forward", mutates_args=())
def _forward(
    x: Tensor, parameters: Sequence[Tensor], constants: Sequence[Tensor], spec: str
) -> tuple[Tensor, Tensor]:
    options = parse(spec)
    w = dict(zip(options.names, parameters, strict=True))
    stats = torch.zeros((_ROWS, len(x)), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        y = _chain(x, w, constants, options, stats).v
        if options.norm_out == "before":
            y = norm.forward(y, *_norm_out(w), stats[_OUT])
        y = projection.forward(y, _projection(w))
        if options.norm_out == "after":
            y = norm.forward(y, *_norm_out(w), stats[_OUT])
    return y, stats


@torch.library.custom_op("sparse_gpt::ffn_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: Sequence[Tensor],
    constants: Sequence[Tensor],
    spec: str,
) -> list[Tensor]:
    """The gradient of x, then one tensor for each of the spec's groups of parameters."""
    options = parse(spec)
    w = dict(zip(options.names, parameters, strict=True))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        gradients = _gradients(dy.contiguous(), x, stats, w, constants, options)
    made = [gradients.pop("x")]
    for group in options.gradients:
        first, value = w[group[0]], gradients[group[0]]
        shape = first.shape if len(group) == 1 else value.shape
        made.append(value.reshape(shape).to(first.dtype))
    return made


def _gradients(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    w: dict[str, Tensor],
    constants: Sequence[Tensor],
    spec: Spec,
) -> dict[str, Tensor]:
    """Gradients by the first name of their group, and that of "x"."""
    made: dict[str, Tensor] = {}
    scratch = torch.empty_like(stats)
    chain = _chain(x, w, constants, spec, scratch, stats[_GATE])
    p, v = chain.p, chain.v

    if spec.norm_out == "after":
        z = projection.forward(v, _projection(w))
        dy, made["norm_out.weight"] = norm.backward(dy, z, w["norm_out.weight"], stats[_OUT])
    mixed = v
    if spec.norm_out == "before":
        mixed = norm.forward(v, *_norm_out(w), scratch[_OUT])
    dv, weights = projection.backward(dy, mixed, _projection(w))
    made |= zip([name for name in w if name.startswith("projection.")], weights, strict=True)
    if spec.norm_out == "before":
        dv, made["norm_out.weight"] = norm.backward(dv, v, w["norm_out.weight"], stats[_OUT])

    dm = None
    if chain.scored is not None:
        gate = stats[_GATE]
        dv, dgate, made["feedback.a"], made["feedback.b"], made["refine.alpha.0"] = (
            feedback.backward(
                dv, chain.scored, gate, w["feedback.a"], w["feedback.b"], chain.stages, spec.steps
            )
        )
        dm = dgate * gate * (1 - gate)  # 0 where the mask is: the gate is 0 there
    dz, along, ds, made["polynomial.weight"], made["polynomial.bias"] = polynomial.backward(
        dv,
        dm,
        p,
        stats[_SCALE] if spec.series else None,
        chain.s,
        w["polynomial.weight"],
        w["polynomial.bias"],
        w.get("feedback.score"),
        chain.stages,
        spec.degrees,
    )

    if spec.path == "none":
        made["x"], made["norm_in.weight"] = norm.backward(dz, x, w["norm_in.weight"], stats[_IN])
    else:
        norm_in = w["norm_in.weight"], w["norm_in.bias"]
        left, right = constants[:2]
        made["x"], made["norm_in.weight"] = spectral.backward(
            dz, along, None if spec.series else ds, x, p, norm_in, left, right,
            w["spectral.gain"], stats[:3], spec.series, spec.selecting,
        )  # fmt: skip
    return made


@_forward.register_fake
def _(
    x: Tensor, parameters: Sequence[Tensor], constants: Sequence[Tensor], spec: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((_ROWS, x.shape[0]), dtype=torch.float32)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: Sequence[Tensor],
    constants: Sequence[Tensor],
    spec: str,
) -> list[Tensor]:
    options = parse(spec)
    w = dict(zip(options.names, parameters, strict=True))
    made = [torch.empty_like(x)]
    for group in options.gradients:
        first = w[group[0]]
        shape = first.shape if len(group) == 1 else (len(group), x.shape[1])
        made.append(first.new_empty(shape))
    return made


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, parameters, constants, ctx.spec = inputs
    ctx.constants = len(constants)
    if parse(ctx.spec).steps:
        constants = constants[:-1]  # training moves the threshold, and the gate is in stats
    ctx.parameters = len(parameters)
    ctx.save_for_backward(x, output[1], *parameters, *constants)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, dstats: Tensor | None) -> tuple[Any, ...]:
    x, stats, *rest = ctx.saved_tensors
    parameters, constants = rest[: ctx.parameters], rest[ctx.parameters :]
    dx, *groups = _backward(dy, x, stats, parameters, constants, ctx.spec)
    made: list[Tensor] = []
    for group, value in zip(parse(ctx.spec).gradients, groups, strict=True):
        made += [value] if len(group) == 1 else value.unbind()
    made = [gradient.to(w.dtype) for gradient, w in zip(made, parameters, strict=True)]
    return dx, made, [None] * ctx.constants, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _macs(x: Sequence[int], parameters: Any, constants: Any, spec: str) -> tuple[int, int]:
    """Multiply-accumulates by learned and by fixed matrices, from the arguments' shapes."""
    options = parse(spec)
    w = dict(zip(options.names, parameters, strict=True))
    tokens, d = x
    moving = fixed = 0
    for name, shape in w.items():
        if name in ("polynomial.weight", "feedback.score") or name.startswith("projection."):
            moving += tokens * torch.Size(shape).numel()
        elif name in ("feedback.a", "feedback.b"):
            moving += tokens * torch.Size(shape).numel() * options.steps
    if options.path != "none":
        fixed = sum(2 * tokens * d * shape[-1] for shape in constants[:2])
    return moving, fixed


@register_flop_formula(torch.ops.sparse_gpt.ffn_forward)
def _forward_flops(
    x: Sequence[int], parameters: Any, constants: Any, spec: str, *_: Any, **__: Any
) -> int:
    """The eager forward's matmuls."""
    return 2 * sum(_macs(x, parameters, constants, spec))


@register_flop_formula(torch.ops.sparse_gpt.ffn_backward)
def _backward_flops(
    dy: Any, x: Sequence[int], stats: Any, parameters: Any, constants: Any, spec: str,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The eager backward's matmuls, model FLOPs: what is computed again is not counted."""
    moving, fixed = _macs(x, parameters, constants, spec)
    return 2 * (2 * moving + fixed)


def arguments(
    ffn: UltraEfficientSparseFFN, x: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], str]:
    """The operators' arguments for an FFN and tokens `(tokens, d)`."""
    spec = spec_of(ffn)
    named = dict(ffn.named_parameters())
    constants = []
    if ffn.spectral is not None:
        constants += [ffn.spectral.left, ffn.spectral.right]
    if ffn.feedback is not None:
        constants.append(ffn.feedback.threshold)
    return x, [named[name] for name in spec.names], constants, spec.text()


def run(ffn: UltraEfficientSparseFFN, x: Tensor) -> Tensor:
    """See `fused_ffn`, which has checked the options and the device."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"fused_ffn: dtype {x.dtype} has no kernels: float32 or bfloat16")
    y: Tensor
    y, stats = _forward(*arguments(ffn, x.reshape(-1, x.shape[-1]).contiguous()))
    if ffn.feedback is not None and ffn.training:
        m = stats[_M].unsqueeze(1)
        ffn.feedback._follow(m, m > ffn.feedback.threshold)
    return y.view(x.shape)
