import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt import SparseSpectral
from sparse_gpt.model.config import SpectralConfig
from sparse_gpt.model.ffn.spectral import dct_matrix


def dct_by_definition(n):
    rows = [
        [
            math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n))
            for i in range(n)
        ]
        for k in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 40])
def test_dct_is_the_definition_and_orthonormal(n):
    matrix = dct_matrix(n)
    torch.testing.assert_close(matrix, dct_by_definition(n), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("factors", [(4, 8), (8, 4), (2, 16), (1, 32)])
def test_transform_is_the_kronecker_product_and_inverts(factors):
    part = SparseSpectral(32, SpectralConfig(factors=factors))
    kronecker = torch.kron(*(dct_matrix(n) for n in factors)).float()
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(part.transform(x), x @ kronecker.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.inverse(part.transform(x)), x, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(keep=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_exact_selection_keeps_the_k_largest(keep, seed):
    part = SparseSpectral(32, SpectralConfig(keep=keep)).double()
    x = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kept = part.transform(part(x))
    c = part.transform(x)
    k = max(1, round(keep * 32))
    for before, after in zip(c.tolist(), kept.tolist(), strict=True):
        chosen = sorted(range(32), key=lambda i: -abs(before[i]))[:k]
        expected = [v if i in chosen else 0.0 for i, v in enumerate(before)]
        assert after == pytest.approx(expected, abs=1e-5)
    assert part.sparsity(x).item() == pytest.approx(k / 32)


def test_ties_are_kept_together():
    part = SparseSpectral(16, SpectralConfig(keep=0.25))
    with torch.no_grad():  # transforms that round nothing
        part.left.copy_(torch.eye(4))
        part.right.copy_(torch.eye(4))
    ones = torch.ones(1, 16)
    torch.testing.assert_close(part(ones), ones)
    assert part.sparsity(ones).item() == 1


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("selection", ["hard", "soft"])
def test_constant_threshold_keeps_about_its_share_of_a_unit_token(keep, selection):
    config = SpectralConfig(threshold="constant", selection=selection, keep=keep)
    part = SparseSpectral(256, config)
    x = torch.nn.functional.layer_norm(3 * torch.randn(2000, 256), (256,))
    assert part.sparsity(x).item() == pytest.approx(keep, abs=0.01)
    kept = part.transform(part(x)).abs() > 1e-4
    assert kept.float().mean().item() == pytest.approx(keep, abs=0.01)


@settings(max_examples=30)
@given(keep=st.floats(0.01, 1), threshold=st.sampled_from(["exact", "constant"]))
def test_soft_selection_draws_the_kept_ones_to_zero_by_the_threshold(keep, threshold):
    hard, soft = (
        SparseSpectral(32, SpectralConfig(threshold=threshold, selection=selection, keep=keep))
        for selection in ("hard", "soft")
    )
    c = torch.randn(20, 32, dtype=torch.float64)
    kept, shrunk = hard.select(c), soft.select(c)
    bound = c.abs().topk(hard.k).values[:, -1:] if threshold == "exact" else hard.quantile
    torch.testing.assert_close(shrunk, kept - kept.sign() * bound)


def test_gain_acts_on_the_coefficients():
    part = SparseSpectral(32, SpectralConfig(keep=1))
    x = torch.randn(4, 32)
    torch.testing.assert_close(part(x), x, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        part.gain.normal_()
    torch.testing.assert_close(
        part.transform(part(x)), part.transform(x) * part.gain, rtol=1e-4, atol=1e-5
    )
