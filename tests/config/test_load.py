import os
import re
import time
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.config.load import find_file, lay_over, load_config, read_yaml, to_yaml
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import ffn_preset
from sparse_gpt.model.costs import model_report

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


GOOD = """
model: {preset: tiny, ffn: default}
data: {path: shards/novels}
batch: {global_tokens: 4096, micro_batch: 4}
duration: {steps: 10}
optimizer: {lr: 1e-3}
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_we_ship_loads_and_survives_its_resolved_form(path, file):
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    assert load_config(file(to_yaml(config), "resolved.yaml")) == config


def test_there_is_a_config_for_every_size():
    assert {"124m", "355m", "774m", "1558m"} < {path.stem for path in CONFIGS}


def test_base_is_inherited_and_overrides_win(file):
    file(GOOD, "base.yaml")
    child = file("base: base.yaml\noptimizer: {lr: 2e-3}\nmodel: {n_layer: 2}", "child.yaml")
    config = load_config(child, ["optimizer.weight_decay=0", "model.ffn.spectral.blocks=32"])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-3, 0)
    assert (config.model.n_layer, config.model.d_model) == (2, 128)
    assert config.model.ffn.spectral.blocks == 32
    assert load_config(child, ["duration.tokens=5000"]).duration.steps is None


def test_a_blend_and_a_path_replace_each_other(file):
    file(GOOD, "base.yaml")
    child = "base: base.yaml\ndata: {blend: {a: 3, b: {weight: 1, max_epochs: 2}}, max_epochs: 4}"
    config = load_config(file(child, "child.yaml"))
    assert config.data.path is None
    found = {path: (part.weight, part.max_epochs) for path, part in config.data.blend.items()}
    assert found == {"a": (3, None), "b": (1, 2)}
    assert load_config(file(to_yaml(config), "resolved.yaml")) == config
    again = load_config(file(child, "child.yaml"), ["data.path=c"]).data
    assert (again.path, again.blend, again.max_epochs) == ("c", None, 4)
    whole = load_config(file(child, "child.yaml"), ["data.blend={c: 1}"]).data
    assert list(whole.blend) == ["c"]  # nothing of the inherited one is left in it


def test_base_that_leads_back_to_itself(file):
    file("base: b.yaml", "a.yaml")
    with pytest.raises(ConfigError, match="inherits from itself"):
        load_config(file("base: a.yaml", "b.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat: unknown key"),
        ("optimizer.weight_decai=1", "did you mean 'weight_decay'"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean 'optimizer'"),
        ("model.n_layr=1", "model.n_layr: unknown key; did you mean 'n_layer'"),
        ("model.ffn.spectral.kep=1", "model.ffn.spectral.kep: unknown key; did you mean 'keep'"),
        ("model.ffn.spectral.block=1", "spectral.block: unknown key; did you mean 'blocks'"),
        ("model.ffn.spectral.top_k=65", "ffn.spectral: top_k 65 is more than the 64 blocks"),
        ("model.ffn.spectral.top_k=0", "top_k: input should be greater than 0, got 0"),
        ("model.ffn.spectral.top_k=3", "ffn.spectral.top_k 3 does not divide d_model 128"),
        ("model.ffn.norm_out=after", "norm_out must be null with a dictionary"),
        ("model.ffn.polynomial={}", "polynomial must be null with a dictionary"),
        ("model.ffn=papper", "no preset 'papper'; possible: dense, paper, light, default"),
        ("model.preset=125m", "no preset '125m'; possible: tiny, 124m"),
        ("model.n_head=3", "n_head 3 does not divide d_model 128"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number, got 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, got -1"),
        ("batch.micro_batch=true", "batch.micro_batch: input should be a valid integer, got True"),
        ("batch.global_tokens=1000", "use 896 or 1024"),
        ("duration={steps: 1, tokens: 5}", "exactly one of steps, tokens, flops"),
        ("duration={}", "exactly one of steps, tokens, flops"),
        (
            "data={path: a, blend: {a: 1}}",
            "data: give exactly one of path, blend; here is path and",
        ),
        ("data.path=null", "data: give exactly one of path, blend; here is none"),
        ("data.blend={shards/a: -1}", "data.blend.shards/a.weight: input should be greater than 0"),
        ("data.blend={shards/a: true}", "data.blend.shards/a: input should be"),
        (
            "data.blend={a: {weight: 1, epochs: 3}}",
            "data.blend.a.epochs: unknown key; did you mean",
        ),
        ("data.blend={}", "data.blend: dictionary should have at least 1 item"),
        ("data.max_epochs=0", "data.max_epochs: input should be greater than 0"),
        ("precision=fp8", "precision: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("data=null", "data: "),
        ("no-equals-sign", "written key=value"),
        ("a..b=1", "written key=value"),
        ("optimizer.lr={", "the value is not YAML"),
    ],
)
def test_bad_values_get_one_line_that_names_the_key(file, change, message):
    with pytest.raises(ConfigError) as caught:
        load_config(file(GOOD), [change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_no_text(file):
    numbers = read_yaml(file("lr: {1e-3: [0], 2: [1]}"))["lr"]
    assert numbers == {"1e-3": [0], "2": [1]}  # as written
    for key in ("~", "on", "2001-01-01", "!!binary aGk=", "[a]", "{a: b}"):
        for text in (f"? {key}\n: 2\n", f"deepspeed:\n  x: {{? {key} : 2}}\n"):
            with pytest.raises(ConfigError, match=r"run\.yaml:\d+: .*a key that is no text; quote"):
                load_config(file(GOOD + text))


leaf = st.one_of(st.none(), st.integers(0, 2), st.just("paper"))
trees = st.dictionaries(
    st.sampled_from(["model", "ffn", "duration", "data", "path", "blend", "preset", "steps"]),
    st.recursive(
        leaf,
        lambda inner: st.dictionaries(
            st.sampled_from(["ffn", "path", "blend", "preset", "steps"]), inner, max_size=3
        ),
    ),
)


@given(below=trees, above=trees)
def test_what_lies_above_stands_and_the_rest_stays(below, above):
    def stands(above, found):
        if isinstance(above, dict):
            return all(stands(value, found[key]) for key, value in above.items())
        return found == above

    before = deepcopy((below, above))
    found = lay_over(below, above)
    assert stands(above, found)
    assert found.keys() == below.keys() | above.keys()
    assert all(found[key] == below[key] for key in below.keys() - above.keys())
    assert lay_over(below, {}) == below
    assert lay_over({}, above) == above
    assert (below, above) == before


def test_missing_key_and_bad_files(file, tmp_path):
    with pytest.raises(ConfigError, match="optimizer: is missing"):
        load_config(file(GOOD.replace("optimizer: {lr: 1e-3}", "")))
    with pytest.raises(ConfigError, match=r"run\.yaml:2: is not YAML"):
        load_config(file("a: 1\nb: [1"))
    with pytest.raises(ConfigError, match="holds no `key: value` lines"):
        load_config(file("just text"))
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")


@given(world=st.integers(1, 64), sequences=st.integers(1, 512), micro=st.integers(1, 64))
def test_grad_accum_divides_the_batch_or_lists_what_would(
    tmp_path_factory, world, sequences, micro
):
    folder = tmp_path_factory.mktemp("grad_accum")
    tree = yaml.safe_load(GOOD)
    tree["batch"] = {"global_tokens": sequences * 128, "micro_batch": micro}
    tree["optimizer"]["lr"] = 1.0
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "run.yaml")
    assert config.global_batch == sequences
    if sequences % (world * micro) == 0:
        assert config.grad_accum(world) * world * micro == sequences
    else:
        with pytest.raises(ConfigError, match="possible") as caught:
            config.grad_accum(world)
        listed = str(caught.value).split(": ")[-1].replace("…, ", "").split(", ")
        divided = sequences if sequences % world else sequences // world
        assert all(divided % int(value) == 0 for value in listed)


def test_duration_in_tokens_and_flops(file):
    config = load_config(file(GOOD), ["duration={tokens: 8193}"])
    assert config.total_steps == 3  # the last step is whole
    config = load_config(file(GOOD), ["duration={flops: 1e12}"])
    report = model_report(config.model)
    step = config.batch.global_tokens * report.training / report.seq
    assert (config.total_steps - 1) * step < 1e12 <= config.total_steps * step


@pytest.mark.parametrize("value", ["0x_", "2001-99-99", "!!int abc", "!!bool abc", "[" * 3000])
def test_what_yaml_cannot_make_is_one_line(file, value):
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(file(GOOD + f"seed: {value}\n"))
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(file(GOOD), [f"seed={value}"])


def aliases(first, count):
    """A list of nine of a list of nine … of `first`."""
    lines = [f"  a0: &a0 [{', '.join([first] * 9)}]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, count)]
    return "deepspeed:\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (aliases("x", 9), "is not YAML: it holds more than 20,000 values, aliases written out"),
        ("deepspeed: &all {x: *all}\n", "is not YAML: it holds more than 20,000 values"),
        ("seed: 1\nseed: 2\n", r":\d+: is not YAML: the key 'seed' comes twice"),
        ("deepspeed: {a: {b: 1, b: 2}}\n", r":\d+: is not YAML: the key 'b' comes twice"),
        ("deepspeed:\n" + "".join(" " * n + "a:\n" for n in range(1, 1200)), "more than 100 deep"),
        ("deepspeed:\n  x:\n    " + "- " * 100_000 + "1\n", "more than 100 deep"),
        ("? " * 100_000 + "1\n", "more than 100 deep"),
        ("deepspeed: {" + "a: 1, " * 100_000 + "}\n", "it holds more than 20,000 values"),
        ("deepspeed: " + "[]," * 200_000, "is not YAML"),
        *(
            (f"seed: {number}\n", "seed: input should be a valid integer, got '.{1,90}…$")
            for number in ("1" + ":59" * 300_000, "1_" * 300_000 + "e", "0x" + "f" * 900_000)
        ),
        (
            "seed: !!int 1" + ":59" * 300_000,
            r":\d+: is not YAML: 900,001 characters that are to be",
        ),
        (f"seed: *{'a' * 900_000}\n", "undefined alias '.{1,2000} … "),
        ("base: [a]\n", r"base is \['a'\]; it is the name of a run file"),
        ("base: /dev/zero\n", "/dev/zero: Is no regular file"),
        ("# " + "x" * 2**20, "Is larger than 1,048,576 bytes"),
    ],
)
def test_what_would_take_for_ever_is_one_line_at_once(file, text, says):
    path, before = file(GOOD + text), time.process_time()
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert time.process_time() - before < 2  # seconds; a good part of one, where nobody measures
    assert len(str(caught.value)) < 5000


def test_a_fifo_is_no_run_file(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="Is no regular file"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "override",
    [
        *(f"model.{key}={10**12}" for key in ("d_model", "n_layer", "vocab_size", "max_seq_len")),
        "model.ffn={preset: paper, polynomial: {degrees: [1, 1000000]}}",
        "model.ffn={preset: default, spectral: {blocks: 1000000000}}",
        f"duration.steps={10**30}",
        f"batch.micro_batch={10**12}",
    ],
)
def test_sizes_that_nobody_can_build_are_refused_at_once(file, override):
    with pytest.raises(ConfigError, match="input should be less than or equal to"):
        load_config(file(GOOD), [override])


def test_what_divides_a_large_width_is_listed_at_once(file):
    with pytest.raises(ConfigError, match=r"possible: 1, 2, 4, .* 5000000, 10000000$"):
        load_config(file(GOOD), ["model.d_model=10000000", "model.n_head=7"])


def test_a_preset_stands_for_all_keys_of_an_ffn(file):
    model = "model: {preset: tiny, ffn: {preset: dense, fan_in_init: true}}"
    dense = file(re.sub(r"model: .*", model, GOOD))
    config = load_config(dense, ["model.ffn.preset=paper"])
    assert config.model.ffn == ffn_preset("paper")
    with pytest.raises(ConfigError, match="fan_in_init: unknown key; known here"):
        load_config(dense, ["model.ffn={preset: paper, fan_in_init: true}"])


def test_a_bare_name_is_one_of_our_files_unless_a_file_of_that_name_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in CONFIGS:
        assert find_file(Path(path.stem)) == find_file(Path(path.name)) == path
    assert find_file(Path("laptop"), "sweeps") == ROOT / "configs/sweeps/laptop.yaml"
    (tmp_path / "tiny-dense").mkdir()  # a folder is no file
    (tmp_path / "tiny-paper.yaml").write_text(GOOD)
    assert find_file(Path("tiny-dense")) == ROOT / "configs/tiny-dense.yaml"
    assert find_file(Path("tiny-paper.yaml")) == Path("tiny-paper.yaml")
    assert find_file(Path("elsewhere/124m.yaml")) == Path("elsewhere/124m.yaml")
    with pytest.raises(ConfigError, match=r"labtop: is no file here.* mean 'laptop'.*cluster"):
        find_file(Path("labtop"), "sweeps")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr=1"], "lr: unknown key; did you mean 'optimizer.lr'?"),
        (["steps=3"], "steps: unknown key; did you mean 'duration.steps'?"),
        (["duration.steps=1.5e0"], "duration.steps: input should be a valid integer, got 1.5"),
        (["seed=-1", "duration.steps=-1", "a=1"], "got -1 (also wrong: seed, a)"),
    ],
)
def test_keys_are_found_in_their_sections_and_what_else_is_wrong_is_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(ROOT / "configs/tiny-sparse.yaml", overrides)
    assert message in str(error.value)


def test_a_whole_number_may_be_written_with_an_exponent():
    overrides = ["duration.tokens=1e9", "checkpoint.every=1_000", "eval.max_tokens=1e6"]
    run = load_config(ROOT / "configs/tiny-sparse.yaml", overrides)
    found = run.duration.tokens, run.checkpoint.every, run.eval.max_tokens
    assert found == (10**9, 1000, 10**6)
    assert all(type(number) is int for number in found)
