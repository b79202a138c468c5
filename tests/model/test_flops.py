import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt import (
    GPT,
    DenseFFN,
    DenseFFNConfig,
    FlopCount,
    ModelConfig,
    SparseBlock,
    UltraEfficientSparseFFN,
    count_flops,
)
from sparse_gpt.model.config import DictionaryConfig


def measure(run):
    """Matmul FLOPs by module path, as torch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}


def backward_matmul(count):
    return 2 * (count.matmul - count.fixed) + count.fixed


def test_gpt_equals_the_counter_forward_and_backward_module_by_module(model_config):
    model = GPT(model_config)
    tokens = torch.randint(97, (3, 11))
    report = count_flops(model, batch=3, seq=11)

    forward = measure(lambda: model(tokens))
    training = measure(lambda: model(tokens, tokens).backward())

    total = report.total
    assert forward["Global"] == total.matmul
    assert training["Global"] == total.matmul + backward_matmul(total)
    for path, count in report.rows.items():
        assert forward.get(f"GPT.{path}", 0) == count.matmul, path
    counted = {path for path, count in report.rows.items() if count.matmul}
    leaves = {p for p in forward if not any(o.startswith(f"{p}.") for o in forward)} - {"Global"}
    assert {p.removeprefix("GPT.").removesuffix(".qkv").removesuffix(".out") for p in leaves} == {
        p + suffix for p in counted for suffix in ffn_leaves(p, model_config)
    }


def ffn_leaves(path, config):
    """What the counter lists within a module of a formula: the Linear layers of it. A dictionary's
    own products are beside its router."""
    if config.ffn.kind == "dense" and path.endswith("ffn"):
        return (".up", ".down")
    learned = config.ffn.kind == "sparse" and isinstance(config.ffn.spectral, DictionaryConfig)
    return (".router",) if learned and path.endswith("spectral") else ("",)


def test_lone_ffn_equals_the_counter(model_config):
    if model_config.ffn.kind == "dense":
        ffn = DenseFFN(32, model_config.ffn)
    else:
        ffn = UltraEfficientSparseFFN(32, config=model_config.ffn)
    x = torch.randn(2, 5, 32, requires_grad=True)
    total = count_flops(ffn, batch=2, seq=5).total
    assert measure(lambda: ffn(x))["Global"] == total.matmul
    training = measure(lambda: ffn(x).sum().backward())["Global"]
    assert training == total.matmul + backward_matmul(total)


def test_paper_reproduces_the_published_arithmetic():
    report = count_flops(UltraEfficientSparseFFN(128, "paper"), batch=1, seq=1)
    costs = {path: row.mac_equivalents for path, row in report.rows.items()}
    assert costs == {
        "norm_in": 512,
        "spectral": 9_984,
        "polynomial": 15_104,
        "refine": 2_048,
        "projection": 16_384,
        "norm_out": 512,
    }
    assert report.total.mac_equivalents == 44_544
    dense = count_flops(DenseFFN(128, DenseFFNConfig()), batch=1, seq=1).total
    assert dense.mac_equivalents == 131_072
    assert dense.elementwise == 8 * 4 * 128


def test_options_cost_what_the_design_says():
    ffn = {
        "preset": "paper",
        "spectral": {"threshold": "constant"},
        "feedback": {"rank": 4, "groups": 8, "iterations": 3, "share": 0.25},
        "projection": {"kind": "factored", "block": 32},
    }
    block = SparseBlock(ModelConfig.preset("tiny", ffn=ffn))
    rows = count_flops(block, batch=1, seq=1).rows
    assert rows["ffn.spectral"].mac_equivalents == 2 * 128 * 24 + 3 * 128
    assert rows["ffn.feedback"].mac_equivalents == 128 + 3 * 2 * 128 * 4
    assert rows["ffn.projection"].mac_equivalents == 2 * 128**2 // 4
    masked = rows["ffn.feedback"].forward - rows["ffn.feedback"].forward_algorithmic
    assert masked == 0.75 * 2 * 3 * 2 * 128 * 4


def test_training_counts_fixed_matrices_twice_and_the_rest_three_times():
    count = FlopCount(matmul=100, fixed=30, scores=20, elementwise=7)
    assert count.forward == 107
    assert count.training == 3 * 70 + 2 * 30 + 3 * 7
    assert count.forward_causal == 97
    assert count.training_causal == count.training - 30


def test_logits_and_causal_halves():
    with torch.device("meta"):
        model = GPT(ModelConfig.preset("124m"))
    report = count_flops(model, batch=2, seq=1024)
    tokens, d = 2 * 1024, 768
    logits = 2 * tokens * d * 50304
    scores = 12 * 2 * tokens * 2 * 1024 * d
    assert report.forward - report.without_logits.forward == logits
    assert report.training - report.without_logits.training == 3 * logits
    assert report.total.scores == scores
    assert report.total.forward_causal == report.forward - scores // 2
    assert report.without_logits.total.matmul == tokens * 2 * 12 * 12 * d**2 + scores


@pytest.mark.parametrize(
    ("ffn", "components"),
    [
        ("dense", ["ln_1", "attention", "ln_2", "ffn"]),
        (
            {"preset": "paper", "feedback": {}},
            [
                "ln_1",
                "attention",
                "ffn.norm_in",
                "ffn.spectral",
                "ffn.polynomial",
                "ffn.feedback",
                "ffn.refine",
                "ffn.projection",
                "ffn.norm_out",
            ],
        ),
    ],
)
def test_blocks_list_their_components_in_order(ffn, components):
    report = count_flops(GPT(ModelConfig.preset("tiny", ffn=ffn)), batch=1, seq=8)
    blocks = report.blocks()
    assert [list(block) for block in blocks] == [components] * 4
    in_blocks = sum((count for block in blocks for count in block.values()), FlopCount())
    assert in_blocks + report.rows["ln_f"] + report.rows["lm_head"] == report.total


def test_json_holds_rows_and_totals():
    report = count_flops(UltraEfficientSparseFFN(128, "paper"), batch=1, seq=1)
    data = json.loads(report.to_json())
    assert data["total"]["mac_equivalents"] == 44_544
    assert [row["path"] for row in data["rows"]] == list(report.rows)
    assert sum(row["training"] for row in data["rows"]) == data["total"]["training"]


def test_a_module_without_a_formula_is_refused():
    with pytest.raises(TypeError, match="Conv1d at '1'"):
        count_flops(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 1)), 1, 1)
