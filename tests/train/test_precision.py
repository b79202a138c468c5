from typing import get_args

import pytest
from ranks import stage

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.train.precision import DTYPES


def test_every_precision_has_its_dtype():
    assert set(DTYPES) == set(get_args(RunConfig.model_fields["precision"].annotation))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # fp16 needs a GPU
def test_weights_are_of_it(engine, precision):
    module = engine(f"precision={precision}", stage(2)).module
    assert {p.dtype for p in module.parameters()} == {DTYPES[precision]}
