"""Scaling laws: fits of loss against model size, tokens and compute, and what they say.

`fit_law` and `isoflop_minima` describe one architecture; `fit_families`, `compute_multiplier` and
`compare` say how much compute one architecture saves against another, with intervals. Pure
functions on arrays: reading runs and drawing plots happen elsewhere.
"""

from .compare import Comparison, HeldOut, compare, held_out_error, predict_points
from .families import FamilyLaw, LawKind, Optimum, fit_families
from .law import Law, Minima, fit_law, isoflop_minima
from .measured import MeasuredMultiplier, measured_multiplier
from .multiplier import Draws, Estimate, Multiplier, bootstrap, compute_multiplier
from .points import Points, ScalingError, best_learning_rates, usable

__all__ = [
    "Comparison",
    "Draws",
    "Estimate",
    "FamilyLaw",
    "HeldOut",
    "Law",
    "LawKind",
    "MeasuredMultiplier",
    "Minima",
    "Multiplier",
    "Optimum",
    "Points",
    "ScalingError",
    "best_learning_rates",
    "bootstrap",
    "compare",
    "compute_multiplier",
    "fit_families",
    "fit_law",
    "held_out_error",
    "isoflop_minima",
    "measured_multiplier",
    "predict_points",
    "usable",
]
