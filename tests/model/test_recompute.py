"""Activation checkpointing changes what is kept, and nothing that is computed."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt import GPT, count_flops


def train(model_config, what):
    """Losses, gradients and running statistics of two micro-batches accumulated."""
    torch.manual_seed(0)
    model = GPT(model_config)
    model.recompute(what)
    losses = []
    for _ in range(2):
        tokens = torch.randint(97, (3, 11))
        loss = model(tokens, tokens)
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad for p in model.parameters()]
    return losses, gradients, list(model.state_dict().values())


@pytest.mark.parametrize("what", ["selective", "full"])
def test_losses_gradients_and_statistics_are_equal(model_config, what):
    for ours, plain in zip(train(model_config, what), train(model_config, "none"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def kept(model, tokens):
    """Bytes that the forward leaves for the backward, parameters left out."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values()), loss


@pytest.mark.parametrize("model_config", ["dense", "together"], indirect=True)
def test_less_is_kept_and_more_computed(model_config):
    model = GPT(model_config)
    tokens = torch.randint(97, (4, 16))
    memory, flops = [], []
    for what in ("none", "selective", "full"):
        model.recompute(what)
        memory.append(kept(model, tokens)[0])
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
        flops.append(counter.get_total_flops())
    assert memory == sorted(memory, reverse=True)
    assert memory[2] < memory[0] / 2
    assert flops == sorted(flops)
    blocks = [count for block in count_flops(model, 4, 16).blocks() for count in block.values()]
    assert flops[2] <= flops[0] + sum(count.matmul for count in blocks)


def test_evaluation_keeps_nothing_and_moves_no_statistic(model_config):
    model = GPT(model_config).eval()
    model.recompute("full")
    before = [value.clone() for value in model.state_dict().values()]
    tokens = torch.randint(97, (2, 8))
    with torch.no_grad():
        model(tokens, tokens)
    assert all(map(torch.equal, before, model.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("model_config", ["dictionary-together"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_are_computed_again_as_plain_ones_are(model_config, dtype):
    """With dropout; `selective` does not go with `compile` and is refused."""
    torch._dynamo.reset()
    plain = GPT(model_config).to(dtype)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for model, what in ((plain, "none"), (compiled, "full")):
        model.recompute(what)
        torch.manual_seed(1)
        for _ in range(2):
            tokens = torch.randint(97, (3, 11))
            model(tokens, tokens).backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for one, other in zip(*found, strict=True):
        error = (one.double() - other).norm() / other.double().norm().clamp(min=1e-3)
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-4)
