"""What the tests of models share: the FFN options, and FlexAttention without a GPU."""

from collections.abc import Iterator

import pytest
import torch
from ffn_options import model_config, seed, wake  # noqa: F401 - fixtures
from torch.nn.attention import flex_attention


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are masked by FlexAttention on this device, whatever it is.

    On a CPU torch refuses its backward, for there is no kernel; its own reference has one.
    """
    monkeypatch.setattr("sparse_gpt.model.attention.has_flex", lambda *_: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.fixture
def eager_flex(flex: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`flex`, by torch's reference in place of compiled kernels (it warns of that)."""
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    with torch.compiler.set_stance("force_eager"):
        yield
