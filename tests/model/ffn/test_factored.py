import pytest
import torch

from sparse_gpt import SparseFactorLinear


def dense_matrix(part, d):
    return part(torch.eye(d))


def test_equals_the_product_of_its_factors():
    part = SparseFactorLinear(12, 4)
    permutation = torch.arange(12).view(3, 4).T.flatten()
    first, second = torch.block_diag(*part.first), torch.block_diag(*part.second)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(part(x), (x @ first)[..., permutation] @ second)


@pytest.mark.parametrize(("d", "block"), [(16, 4), (64, 16), (64, 32)])
def test_every_output_sees_every_input(d, block):
    assert (dense_matrix(SparseFactorLinear(d, block), d) != 0).all()


def test_keeps_the_variance():
    y = SparseFactorLinear(512, 64)(torch.randn(2000, 512))
    assert y.square().mean().item() == pytest.approx(1, rel=0.05)


def test_a_block_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"projection\.block 5 does not divide d_model 12"):
        SparseFactorLinear(12, 5)
