"""What blocks do: counted as by hand, told by the words that use them, shown in a page."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from one_rank import train_here, world  # noqa: F401 - fixtures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_gpt.data import open_shards
from sparse_gpt.evaluate.checkpoint import load_trained
from sparse_gpt.evaluate.inspect import inspect


@pytest.fixture
def looked_at(run, shards):
    trained = load_trained(str(run))
    return trained, inspect(trained, "novels", open_shards(shards).held_out, 2048)


def test_uses_are_those_of_the_forward_pass(looked_at, shards):
    """Counted anew, token by token."""
    trained, found = looked_at
    from sparse_gpt.data import evaluation

    seq, blocks = trained.config.model.max_seq_len, 64
    split = open_shards(shards).held_out
    counts = torch.zeros(2, blocks)
    energies, words = torch.zeros(2, blocks), [[{} for _ in range(blocks)] for _ in range(2)]
    outs = {n: [] for n in range(2)}
    for n, block in enumerate(trained.model.blocks):
        block.ffn.spectral.register_forward_pre_hook(
            lambda part, args, n=n: outs[n].append(part.route(args[0].reshape(-1, 32)))
        )
    total = 0
    for batch in evaluation(split, seq, 4, max_tokens=2048):
        with torch.no_grad():
            trained.model(batch.tokens)
        total += batch.tokens.numel()
        for n in range(2):
            kept, chosen = outs[n].pop()
            for token, own, which in zip(
                batch.tokens.flatten().tolist(), kept.tolist(), chosen.tolist(), strict=True
            ):
                for energy, b in zip(own, which, strict=True):
                    counts[n, b] += 1
                    energies[n, b] += energy
                    words[n][b][token] = words[n][b].get(token, 0) + 1
    assert found.tokens == total
    for n, layer in enumerate(found.layers):
        assert layer.number == n
        for block in layer.blocks:
            b = block.number
            assert block.load == pytest.approx((counts[n, b] / counts[n].mean()).item(), rel=1e-5)
            if counts[n, b]:
                mean = (energies[n, b] / counts[n, b]).item()
                assert block.energy == pytest.approx(mean, rel=1e-4)
            for text, share, _ in block.tokens:
                same = [
                    count
                    for token, count in words[n][b].items()
                    if trained.tokenizer.decode([token]) == text
                ]
                assert any(share == pytest.approx(c / counts[n, b].item()) for c in same)


def test_contexts_are_of_the_largest_energies_and_marked(looked_at):
    _, found = looked_at
    for layer in found.layers:
        assert 0 < layer.entropy <= 4.16  # ln 64
        assert layer.parts.keys() == {"spectral", "projection"}
        for block in layer.blocks:
            sizes = [context.energy for context in block.contexts]
            assert sizes == sorted(sizes, reverse=True)
            assert all(block.energy <= sizes[0] + 1e-6 for _ in sizes[:1])
            assert all(b != block.number for b, _ in block.together)


def test_writes_are_the_heads_answer_to_what_a_block_adds(looked_at):
    """Turning a block's synthesis around turns what it writes around."""
    trained, found = looked_at
    layer = found.layers[-1]
    block = max(layer.blocks, key=lambda one: one.load)
    trained.model.blocks[-1].ffn.spectral.synthesis.data[block.number].neg_()
    again = inspect(trained, "novels", *_split(trained)).layers[-1].blocks[block.number]
    assert block.writes[0][0] not in [text for text, _ in again.writes]


def _split(trained):
    return open_shards(trained.config.data.path).held_out, 2048


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.loads = [], 0

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert "src" not in found
        assert "href" not in found  # it needs nothing else
        if tag == "tr" and "id" in found:
            self.rows.append(found["id"])
        self.loads += tag == "rect"


def test_the_page_has_every_block_and_needs_nothing_else(command, run, tmp_path):
    done = command("inspect", str(run), "--max-tokens", "1024")
    assert (done.returncode, done.stdout) == (0, f"{run}/inspect-4.html: open it in a browser\n")
    reader = Reader()
    reader.feed((run / "inspect-4.html").read_text())
    assert len(set(reader.rows)) == len(reader.rows) == reader.loads == 2 * 64
    found = json.loads(command("inspect", str(run), "--max-tokens", "1024", "--json").stdout)
    assert [len(layer["blocks"]) for layer in found["layers"]] == [64, 64]
    board = EventAccumulator(str(run / "evaluations/tensorboard")).Reload()
    for n, layer in enumerate(found["layers"]):
        [branch] = board.Scalars(f"inspect/layer_{n:02d}/branch")
        assert (branch.step, branch.value) == (4, pytest.approx(layer["branch"]))
        [load] = board.Histograms(f"inspect/layer_{n:02d}/load")
        assert load.histogram_value.num == 64
        assert load.histogram_value.sum == pytest.approx(64, rel=1e-3)
        [table] = board.Tensors(f"inspect/layer_{n:02d}/blocks/text_summary")
        rows = table.tensor_proto.string_val[0].decode().splitlines()
        assert len(rows) == 2 + 64
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


@pytest.mark.parametrize("ffn", ["light", pytest.param("paper", marks=pytest.mark.long)])
def test_fixed_parts_have_their_sizes(command, train_here, tmp_path, ffn):  # noqa: F811
    train_here("duration.steps=1", f"model.ffn={ffn}")
    found = json.loads(command("inspect", str(tmp_path / "run"), "--json").stdout)
    for layer in found["layers"]:
        assert layer["blocks"] == []
        assert layer["entropy"] is None
        assert {"spectral", "polynomial", "projection"} <= layer["parts"].keys()


def test_a_dense_model_has_no_parts(command, train_here, tmp_path):  # noqa: F811
    train_here("duration.steps=1", "model.ffn=dense")
    done = command("inspect", str(tmp_path / "run"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "its FFNs are dense" in done.stderr
