"""A small GPT-2 of transformers, and how to look at it; what imports this is skipped without."""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(kind=GPT2LMHeadModel, **overrides):
    sizes = {"vocab_size": 211, "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return kind(GPT2Config(**{**sizes, **ends, **overrides})).eval()


def sample(batch=2, seq=16):
    return torch.randint(1, 211, (batch, seq))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def state_equals(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(
        own[key].dtype == state[key].dtype and torch.equal(own[key], state[key]) for key in own
    )
