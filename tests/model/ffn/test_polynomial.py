import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt import SparsePolynomial
from sparse_gpt.model.config import PolynomialConfig
from sparse_gpt.model.ffn.polynomial import ChebyshevMix, chebyshev, chebyshev_power


def first_kind(u, degree):
    return [sign * values for sign, values in chebyshev(u, 2 * u, degree)]


@settings(max_examples=30)
@given(u=st.floats(-1, 1), degree=st.integers(1, 12))
def test_recurrence_equals_the_cosine(u, degree):
    first = first_kind(torch.tensor([u], dtype=torch.float64), degree)
    expected = [math.cos(n * math.acos(u)) for n in range(1, degree + 1)]
    assert [v.item() for v in first] == pytest.approx(expected, abs=1e-10)


@settings(max_examples=30)
@given(degrees=st.sets(st.integers(1, 9), min_size=1), seed=st.integers(0, 99))
def test_gradients_are_the_differences(degrees, seed):
    torch.manual_seed(seed)
    degrees = tuple(sorted(degrees))
    u = torch.tanh(torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(len(degrees), 2, 4, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ChebyshevMix.apply, (u, weight, bias, degrees))


def test_gradients_are_finite_at_the_ends():
    u = torch.tensor([-1.0, 1.0], requires_grad=True)
    weight = torch.ones(1, 2, 1, 1)
    ChebyshevMix.apply(u.view(2, 1, 1), weight, torch.zeros(2), (7,)).sum().backward()
    assert u.grad.tolist() == [49, 49]  # T_n'(±1) = (±1)^(n-1) n²


def test_feature_power_is_the_designs():
    power = [chebyshev_power(n) for n in (1, 2, 3, 4)]
    assert power == pytest.approx([0.39, 0.44, 0.47, 0.48], abs=0.006)
    u = torch.tanh(torch.randn(1_000_000, dtype=torch.float64))
    for n, values in enumerate(first_kind(u, 7), 1):
        assert chebyshev_power(n) == pytest.approx(values.square().mean().item(), abs=3e-3)


def test_equals_the_definition():
    degrees = (1, 3, 4)
    part = SparsePolynomial(12, PolynomialConfig(group_size=3, degrees=degrees)).double()
    with torch.no_grad():
        part.bias.normal_()
    x = 2 * torch.randn(2, 5, 12, dtype=torch.float64)
    u = torch.tanh(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    expected = part.bias.expand(2, 5, 12).clone()
    for g in range(4):
        channels = u[..., g::4]  # the stride permutation: g, g + 4, g + 8
        for i, n in enumerate(degrees):
            features = torch.cos(n * torch.acos(channels))
            expected[..., 3 * g : 3 * g + 3] += features @ part.weight[i, g]
    torch.testing.assert_close(part(x), expected)


@pytest.mark.parametrize("degrees", [(1,), (1, 2, 3, 4, 5, 6, 7), (2, 5)])
def test_initial_output_has_unit_variance(degrees):
    part = SparsePolynomial(512, PolynomialConfig(degrees=degrees))
    y = part(torch.randn(4096, 512))
    assert y.square().mean().item() == pytest.approx(1, rel=0.05)


def test_degrees_share_the_variance_as_one_over_n_squared():
    part = SparsePolynomial(2048, PolynomialConfig(degrees=(1, 2, 3)))
    power = [
        w.square().mean().item() * 16 * chebyshev_power(n)
        for w, n in zip(part.weight, (1, 2, 3), strict=True)
    ]
    total = 1 + 1 / 4 + 1 / 9
    assert power == pytest.approx([1 / total, 1 / 4 / total, 1 / 9 / total], rel=0.05)


def test_scale_of_the_input_does_not_matter():
    part = SparsePolynomial(32, PolynomialConfig())
    x = torch.randn(10, 32)
    torch.testing.assert_close(part(100 * x), part(x), rtol=1e-4, atol=1e-4)


def test_features_are_well_conditioned():
    # Design section 5: 5 after renormalising to unit RMS, against 62 and 334 without.
    features = torch.stack(first_kind(torch.tanh(torch.randn(200_000, dtype=torch.float64)), 6))
    assert torch.linalg.cond(torch.corrcoef(features)).item() < 10
