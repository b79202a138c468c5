import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt import SparseSpectral
from sparse_gpt.config import SpectralConfig
from sparse_gpt.ffn.spectral import dct_matrix, hadamard_matrix


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


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_hadamard_is_the_definition_and_orthonormal(n):
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    matrix = hadamard_matrix(n)
    torch.testing.assert_close(matrix, torch.tensor(signs) / torch.tensor(n).double().sqrt())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("transform", ["dct", "hadamard", "learned"])
@pytest.mark.parametrize("factors", [(4, 8), (8, 4), (2, 16)])
def test_transform_is_the_kronecker_product_and_inverts(transform, factors):
    part = SparseSpectral(32, SpectralConfig(transform=transform, factors=factors))
    matrix = hadamard_matrix if transform == "hadamard" else dct_matrix
    kronecker = torch.kron(*(matrix(n) for n in factors)).float()
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(part.transform(x), x @ kronecker.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.inverse(part.transform(x)), x, rtol=1e-5, atol=1e-5)


def test_learned_transform_has_its_own_weights_a_block():
    part = SparseSpectral(32, SpectralConfig(transform="learned"))
    assert part.left.numel() + part.right.numel() == 32 * (4 + 8)
    with torch.no_grad():
        part.left.normal_()
        part.right.normal_()
    # The columns of C: block j of C_p ⊗ I_q and block i of I_p ⊗ C_q, each with its own matrix.
    i, j = 3, 5
    unit = torch.zeros(4, 8)
    unit[i, j] = 1
    expected = torch.stack([part.right[i, k, j] * part.left[k, :, i] for k in range(8)], 1)
    torch.testing.assert_close(part.transform(unit.view(32)).view(4, 8), expected)
    forward = torch.stack([part.transform(row) for row in torch.eye(32)])
    backward = torch.stack([part.inverse(row) for row in torch.eye(32)])
    torch.testing.assert_close(backward, forward.T)


@settings(max_examples=30, deadline=None)
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
    # H₄ ⊗ H₄ of this token has 16 coefficients of equal magnitude.
    part = SparseSpectral(16, SpectralConfig(transform="hadamard", keep=0.25))
    x = torch.zeros(1, 16)
    x[0, 5] = 1
    torch.testing.assert_close(part(x), x)
    assert part.sparsity(x).item() == 1


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_statistical_selection_keeps_about_its_share(keep):
    part = SparseSpectral(256, SpectralConfig(threshold="statistical", keep=keep))
    x = 3 * torch.randn(2000, 256)
    assert part.sparsity(x).item() == pytest.approx(keep, abs=0.01)
    kept = part.transform(part(x)).abs() > 1e-4
    assert kept.float().mean().item() == pytest.approx(keep, abs=0.01)


def test_no_selection_is_a_gain_on_the_coefficients():
    part = SparseSpectral(32, SpectralConfig(selection="none"))
    x = torch.randn(4, 32)
    assert part.sparsity(x).item() == 1
    torch.testing.assert_close(part(x), x, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        part.gain.normal_()
    torch.testing.assert_close(
        part.transform(part(x)), part.transform(x) * part.gain, rtol=1e-4, atol=1e-5
    )
