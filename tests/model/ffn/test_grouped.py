"""The grouped product and its weight gradient are those of a plain loop over the groups."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt.model.ffn.grouped import chosen_product, grouped_outer, grouped_product

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WIDTHS = st.sampled_from([1, 4, 5, 8, 12, 16, 24, 31, 64])  # of which some are 16 bytes a row
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 9, 40]), min_size=1, max_size=9)


def operands(sizes, a, c, dtype, seed):
    """Rows, grads of the product, weight, and where the groups end."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(sizes), a), (sum(sizes), c), (len(sizes), a, c)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return *values, torch.tensor(sizes).cumsum(0).int()


def close(found, expected, dtype):
    assert found.dtype == dtype
    rtol, atol = {torch.bfloat16: (2e-2, 0.3), torch.float32: (1e-5, 1e-4)}.get(
        dtype, (1e-12, 1e-12)
    )
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@settings(max_examples=40)
@given(
    sizes=SIZES,
    a=WIDTHS,
    c=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(sizes=[0, 0], a=16, c=16, dtype=torch.float32, transposed=False, seed=0)
@example(sizes=[0], a=5, c=7, dtype=torch.bfloat16, transposed=True, seed=0)
@example(sizes=[1, 0, 1, 1], a=16, c=8, dtype=torch.bfloat16, transposed=True, seed=0)
def test_both_are_a_loop_over_the_groups(sizes, a, c, dtype, transposed, seed):
    rows, grads, weight, ends = operands(sizes, a, c, dtype, seed)
    if transposed:  # as the backward hands it on
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    of = [slice(end - size, end) for end, size in zip(ends.tolist(), sizes, strict=True)]
    wide, wide_grads, wide_weight = rows.double(), grads.double(), weight.double()
    product = torch.cat([wide[at] @ wide_weight[b] for b, at in enumerate(of)])
    outer = torch.stack([wide[at].t() @ wide_grads[at] for at in of])
    close(grouped_product(rows, weight, ends), product, dtype)
    close(grouped_outer(rows, grads, ends), outer, dtype)


@settings(max_examples=40)
@given(
    sizes=SIZES,
    a=st.sampled_from([4, 8, 12, 24, 31, 48, 50, 64]),
    c=st.sampled_from([4, 8, 12, 24, 31, 48, 50, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(sizes, a, c, dtype, seed):
    """Not where there are under 8 columns and no multiple of 4, nor in float64: there MKL goes by a
    row's place, and a linear layer of torch's does the same."""
    rows, _, weight, ends = operands(sizes, a, c, dtype, seed)
    whole = grouped_product(rows, weight, ends)
    groups = [b for b, size in enumerate(sizes) for _ in range(size)]
    for row, (group, expected) in enumerate(zip(groups, whole, strict=True)):
        alone = (torch.arange(len(sizes)) >= group).int()
        assert torch.equal(grouped_product(rows[row : row + 1], weight, alone)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a", [5, 16])
def test_the_counter_counts_both(dtype, a):
    rows, grads, weight, ends = operands([3, 0, 8], a, 8, dtype, 0)
    for run in (
        lambda: grouped_product(rows, weight, ends),
        lambda: grouped_outer(rows, grads, ends),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 2 * 11 * a * 8


@pytest.mark.parametrize(
    ("dtype", "widths", "way"),
    [
        (torch.float32, (48, 24), "grouped_mm"),
        (torch.float32, (4, 4), "grouped_mm"),
        (torch.float32, (50, 24), "loop"),
        (torch.bfloat16, (48, 24), "grouped_mm"),
        (torch.bfloat16, (48, 20), "loop"),
        (torch.float64, (48, 24), "loop"),
    ],
)
def test_what_cannot_be_done_at_once_is_a_loop(dtype, widths, way):
    assert chosen_product(CPU, dtype, *widths) == way


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_are_known_without_values(dtype):
    """As torch's own check of an operator has it: schema, fake tensors, no hidden aliases."""
    rows, grads, weight, ends = operands([2, 0, 3], 8, 4, dtype, 0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(grouped_product, (rows, weight, ends), test_utils=tests)
    torch.library.opcheck(grouped_outer, (rows, grads, ends), test_utils=tests)
