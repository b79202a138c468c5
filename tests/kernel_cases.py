"""FFNs for the tests of the fused path: options, tokens, gradients, errors.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before anything imports
triton: then tests marked `runs` are left to a process of their own, which
test_in_tritons_interpreter starts.
"""

import copy
import os

import pytest
import torch

from sparse_gpt import SparseFFNConfig, UltraEfficientSparseFFN

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="see test_in_tritons_interpreter")

FEEDBACK = {"rank": 2, "groups": 4, "share": 0.4, "iterations": 2}
OPTIONS = {
    "paper": {},
    "default": {
        "spectral": {"path": "parallel", "selection": "soft", "threshold": "constant"},
        "polynomial": {"degrees": (1, 2)},
        "feedback": {"rank": 4, "groups": 8, "share": 0.25},
        "norm_out": "before",
    },
    "constant": {"spectral": {"threshold": "constant", "keep": 0.3}},
    "soft": {"spectral": {"selection": "soft"}, "refine": {"stages": 1}},
    "soft-constant": {"spectral": {"selection": "soft", "threshold": "constant"}},
    "parallel": {"spectral": {"path": "parallel"}},
    "soft-parallel": {"spectral": {"path": "parallel", "selection": "soft"}},
    "no-spectral": {"spectral": None},
    "no-refine": {"spectral": None, "refine": None},
    "feedback": {"spectral": {"path": "parallel"}, "feedback": FEEDBACK},
    "feedback-only": {"spectral": None, "feedback": FEEDBACK | {"iterations": 1}, "refine": None},
    "factored": {"spectral": None, "projection": {"kind": "factored", "block": 8}},
    "degrees": {"spectral": None, "polynomial": {"degrees": (2, 5)}},
    "norm-before": {"spectral": None, "norm_out": "before"},
    "first-degree": {"spectral": None, "polynomial": {"degrees": (1,)}},
}


def build(options, d, dtype=torch.float32):
    """An FFN with no parameter at its initial value, in eval mode."""
    options = {"polynomial": {"degrees": (1, 2, 3, 4)}, "refine": {"stages": 2}, **options}
    ffn = UltraEfficientSparseFFN(d, config=SparseFFNConfig(**options)).eval()
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ffn.to(DEVICE, dtype)


def calm(ffn, tokens, dtype):
    """Tokens `(tokens, d)` whose decisions are clear of rounding, as far as they can be found."""
    exact = copy.deepcopy(ffn).double()
    margin = 1e-4 if dtype == torch.float32 else 0.015
    d = ffn.norm_in.normalized_shape[0]
    drawn = tokens * (200 if dtype == torch.bfloat16 else 20)
    x = torch.randn(max(drawn, 200), d, dtype=torch.float64, device=DEVICE).to(dtype).double()
    clear = torch.full((len(x),), torch.inf, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        if ffn.spectral is not None:
            c = exact.spectral.transform(exact.norm_in(x)).abs()
            if ffn.config.spectral.threshold == "exact":  # far from its neighbours by size
                c = c.sort(1, descending=True).values
                gaps = c[:, :-1] - c[:, 1:]
                k = ffn.spectral.k
                edges = gaps[:, max(0, k - 2) : k]
                clear = (edges if ffn.config.spectral.selection == "soft" else edges[:, -1:]).amin(
                    1
                )
            else:
                clear = (c - ffn.spectral.quantile).abs().amin(1)
        if ffn.feedback is not None:
            seen = []
            handle = exact.feedback.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            exact(x)
            handle.remove()
            m = exact.feedback._scores(seen[0]).squeeze(1)
            clear = torch.minimum(clear, (m - exact.feedback.threshold).abs())
    best = clear.argsort(descending=True)[:tokens]
    assert clear[best].min() > margin
    return x[best].to(dtype)


def gradients(ffn, function, x, dy):
    """Output and gradients by name."""
    x = x.detach().clone().requires_grad_()
    for parameter in ffn.parameters():
        parameter.grad = None
    y = function(x)
    y.backward(dy.to(y.dtype).view_as(y))
    return {"output": y.detach(), "x": x.grad} | {
        name: parameter.grad for name, parameter in ffn.named_parameters()
    }


def errors(found, expected):
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in expected.items()
    }
