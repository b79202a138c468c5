"""Made-up sweeps of a known law."""

import numpy as np
import pytest

from sparse_gpt.scaling import FamilyLaw, Points


def make_law(alpha=(0.35, 0.35), families=("dense", "sparse"), entropy=(1.7, 1.7)):
    return FamilyLaw(
        families=families,
        E=np.array(entropy),
        A=np.array([250.0, 200.0]),
        B=np.array([400.0, 370.0]),
        alpha=np.array(alpha),
        beta=np.array([0.3, 0.3]),
        flops_ratio=np.array([3.0, 2.9]),
        kind=(
            "separate" if entropy[0] != entropy[1] else "own" if alpha[0] != alpha[1] else "shared"
        ),
        objective=np.array(0.0),
        aicc=0.0,
        agreement=1.0,
    )


def make_points(law, trunk_noise=0.0, own_noise=0.0, sizes=4, budgets=4, seeds=2, seed=0):
    """Each trunk (family, size, seed) gives a result a budget; a FLOP takes M^-0.1 · 1e-12 s."""
    rng = np.random.default_rng(seed)
    rows = []
    for family, ratio in zip(law.families, law.flops_ratio.tolist(), strict=True):
        for m in np.geomspace(1e6, 4e7, sizes).tolist():
            for number in range(seeds):
                shared = trunk_noise * rng.standard_normal()
                for budget in np.geomspace(1e15, 1e17, budgets).tolist():
                    tokens = budget / (ratio * m)
                    noise = np.exp(shared + own_noise * rng.standard_normal())
                    rows.append(
                        {
                            "family": family,
                            "size": f"{m:.3g}",
                            "trunk": f"{family} {m:.3g} {number}",
                            "seed": number,
                            "lr": 1e-3,
                            "budget": budget,
                            "params": m / 2,
                            "params_without_embeddings": m / 4,
                            "forward_flops": m,
                            "forward_flops_without_logits": m / 2,
                            "training_flops": budget,
                            "training_flops_without_logits": budget / 2,
                            "tokens": tokens,
                            "loss": float(law.predict(family, m, tokens)) * noise,
                            "device_seconds": budget * 1e-12 * m**-0.1,
                        }
                    )
    return Points.from_rows(rows)


@pytest.fixture(scope="session")
def law():
    return make_law()


@pytest.fixture(scope="session")
def exact(law):
    """Without noise."""
    return make_points(law)


@pytest.fixture(scope="session")
def noisy(law):
    return make_points(law, trunk_noise=0.004, own_noise=0.002, seeds=3)


@pytest.fixture(scope="session")
def sweep():
    """`make_points`, for sweeps of another shape."""
    return make_points


@pytest.fixture(scope="session")
def true_law():
    """`make_law`, for laws of other exponents."""
    return make_law
