import copy
import math

import pytest
import torch

from sparse_gpt import SparseMicroRefine, TokenFeedback
from sparse_gpt.model.config import FeedbackConfig, RefineConfig


def test_refine_equals_the_definition(wake):
    part = SparseMicroRefine(8, RefineConfig(stages=2))
    v = torch.randn(3, 5, 8)
    expected = v
    for _ in range(2):
        expected = expected + 0.1 * expected * torch.sigmoid(expected)
    torch.testing.assert_close(part(v), expected)
    wake(part)
    expected = v
    for alpha, a, b in zip(part.alpha, part.a, part.b, strict=True):
        z = a * expected + b
        expected = expected + alpha * z / (1 + torch.exp(-z))
    torch.testing.assert_close(part(v), expected)


def test_feedback_starts_as_the_identity():
    part = TokenFeedback(32, FeedbackConfig())
    v = torch.randn(3, 5, 32)
    assert torch.equal(part(v), v)


def test_feedback_equals_the_definition(wake):
    part = wake(TokenFeedback(12, FeedbackConfig(rank=2, groups=3, iterations=2))).eval()
    v = torch.randn(4, 10, 12)
    a, b = torch.block_diag(*part.a), torch.block_diag(*part.b)
    chosen = 0
    for token, result in zip(v.reshape(-1, 12), part(v).reshape(-1, 12), strict=True):
        m = (part.score @ token).item()
        expected = token
        if m > part.threshold:
            chosen += 1
            for _ in range(2):
                expected = expected + 1 / (1 + math.exp(-m)) * expected @ a @ b
        torch.testing.assert_close(result, expected)
    assert 0 < chosen < 40
    assert part.sparsity(v).item() == pytest.approx(chosen / 40)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_threshold_converges_to_its_share(share):
    part = TokenFeedback(32, FeedbackConfig(share=share))
    generator = torch.Generator().manual_seed(1)
    offset = 2 * torch.randn(32, generator=generator)

    def tokens(n):  # skewed, shifted and five times too wide for the initial threshold
        return 5 * torch.randn(n, 32, generator=generator).exp() + offset

    start = part.sparsity(tokens(5000)).item()
    assert abs(start - share) > 0.05
    for _ in range(400):
        part(tokens(256))
    assert part.sparsity(tokens(5000)).item() == pytest.approx(share, abs=0.02)


def test_threshold_is_read_before_it_moves_and_moves_in_training_only(wake):
    part = wake(TokenFeedback(32, FeedbackConfig()))
    v = 3 * torch.randn(64, 32)
    before = part.threshold.clone()
    expected = copy.deepcopy(part).eval()(v)
    assert torch.equal(part(v), expected)
    moved = part.threshold.clone()
    assert moved != before
    assert not part.threshold.requires_grad
    part.eval()(v)
    assert torch.equal(part.threshold, moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_running_statistics_stay_float32(dtype):
    part = TokenFeedback(32, FeedbackConfig())
    part.threshold.fill_(math.pi)  # not a bfloat16 number
    part.to(dtype)
    assert part.score.dtype == dtype
    assert part.threshold.dtype == part.scale.dtype == torch.float32
    assert part.threshold == torch.tensor(math.pi)
    assert set(part.state_dict()) >= {"threshold", "scale"}


def test_leaves_the_meta_device():
    with torch.device("meta"):
        part = TokenFeedback(32, FeedbackConfig())
    part.to(torch.bfloat16).to_empty(device="cpu")
    assert part.threshold.device.type == "cpu"
    assert part.threshold.dtype == torch.float32
