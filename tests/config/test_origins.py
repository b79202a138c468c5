import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sparse_gpt.config.load import Dumper, load_config, to_yaml
from sparse_gpt.config.origins import settings, to_commented_yaml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BASE = """\
run_dir: runs/base
model:
  preset: tiny
  n_layer: 2
  ffn: paper
data: {blend: {a: 3, b: {weight: 1}}}
batch: &batch
  global_tokens: 4096
  micro_batch: 4
duration: {steps: 10}
optimizer: {lr: 1e-3}
deepspeed: {zero_optimization: {stage: 2}}
log:
  <<: {every: 5}
"""
CHILD = """\
base: base.yaml
model:
  preset: 124m
  ffn: {spectral: {keep: 0.25}}
duration: {tokens: 8192}
deepspeed:
  zero_optimization: {overlap_comm: false}
"""


@pytest.fixture
def child(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(CHILD)
    return tmp_path / "child.yaml"


def origins(path, *overrides):
    return {".".join(one.keys): (one.value, one.origin) for one in settings(path, overrides)}


def test_every_value_says_where_it_is_from(child):
    found = origins(child, "optimizer.betas=[0.9, 0.99]", "seed=1", "seed=2")
    base = child.with_name("base.yaml")
    assert found["run_dir"] == ("runs/child", "default")  # no file inherits another one's
    assert found["model.d_model"] == (768, f"preset 124m ({child}:3)")
    assert found["model.n_layer"] == (2, f"{base}:4")
    assert found["model.vocab_size"] == (50257, "default")
    assert found["model.ffn.polynomial.group_size"] == (16, f"preset paper ({base}:5)")
    assert found["model.ffn.feedback"] == (None, f"preset paper ({base}:5)")
    assert found["model.ffn.spectral.keep"] == (0.25, f"{child}:4")
    assert found["data.path"] == (None, "default")
    assert found["data.blend.a.weight"] == (3, f"{base}:6")
    assert found["data.blend.a.max_epochs"] == (None, "default")
    assert found["data.blend.b.weight"] == (1, f"{base}:6")
    assert found["batch.micro_batch"] == (4, f"{base}:9")
    assert found["duration.tokens"] == (8192, f"{child}:5")
    assert found["duration.steps"] == (None, "default")  # the base's had to go
    assert found["optimizer.betas"] == ([0.9, 0.99], "override")
    assert found["optimizer.lr"] == (1e-3, f"{base}:11")
    assert found["deepspeed.zero_optimization.stage"] == (2, f"{base}:12")
    assert found["deepspeed.zero_optimization.overlap_comm"] == (False, f"{child}:7")
    assert found["log.every"] == (5, f"{base}:14")  # through YAML's own way to inherit
    assert found["seed"] == (2, "override")


def test_an_override_takes_the_place_of_what_it_replaces(child):
    named = origins(child, "model.ffn=default", "data.path=c")
    assert named["model.ffn.spectral.top_k"] == (2, "preset default (override)")
    assert named["model.ffn.kind"] == ("sparse", "preset default (override)")
    assert named["data.path"] == ("c", "override")
    assert named["data.blend"] == (None, "default")
    kind = origins(child, "model.ffn=null", "model.ffn.kind=sparse")
    assert kind["model.ffn.kind"] == ("sparse", "override")
    assert kind["model.ffn.spectral.keep"] == (0.5, "default")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_line_that_is_named_holds_the_key(path):
    named = 0
    for one in settings(path):
        if place := re.fullmatch(r"(.*\.yaml):(\d+)", one.origin):
            line = Path(place[1]).read_text().splitlines()[int(place[2]) - 1]
            assert f"{one.keys[-1]}:" in line
            named += 1
    assert named >= 10


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_printed_is_the_run_as_a_run_file(path, tmp_path):
    overrides = ["data.blend={shards/a: 1}", "checkpoint.at=[10, 20]", "model.ffn=paper"]
    for given_here in ([], overrides):
        text = to_commented_yaml(settings(path, given_here))
        (tmp_path / "shown.yaml").write_text(text)
        assert load_config(tmp_path / "shown.yaml") == load_config(path, given_here)
        values = [line for line in text.splitlines() if not line.endswith(":")]
        assert all(re.search(r"\S +# \S", line) for line in values)


plain = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=200))
native = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=150), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis_settings(max_examples=25)
@given(
    folders=st.dictionaries(st.text(max_size=200), st.just(1), min_size=1, max_size=3),
    deepspeed=st.dictionaries(st.text(max_size=20), native, max_size=3),
)
@example(folders={"1e5": 1}, deepspeed={"text": "3E-4", "a\nb": "# c: d"})
def test_no_text_breaks_what_is_printed(tmp_path_factory, folders, deepspeed):
    tree = yaml.safe_load((ROOT / "configs/tiny-dense.yaml").read_text().replace("2e-3", "0.002"))
    tree |= {"data": {"blend": folders}, "deepspeed": deepspeed}
    folder = tmp_path_factory.mktemp("printed")
    (folder / "run.yaml").write_text(yaml.dump(tree, Dumper=Dumper))
    (folder / "shown.yaml").write_text(to_commented_yaml(settings(folder / "run.yaml")))
    config = load_config(folder / "run.yaml")
    assert config.deepspeed == deepspeed
    assert load_config(folder / "shown.yaml") == config
    (folder / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(folder / "resolved.yaml") == config
