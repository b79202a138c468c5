"""The schema for editors agrees with `load_config`, and docs/configuration.md with the schema."""

import json
import re
from pathlib import Path
from types import NoneType

import pytest
import yaml

from sparse_gpt.config.load import find_file, load_config, parse, read_yaml, to_yaml
from sparse_gpt.config.origins import settings, to_commented_yaml
from sparse_gpt.config.reference import fill, run_schema
from sparse_gpt.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGE = (ROOT / "docs/configuration.md").read_text()
SCHEMA = run_schema()
GOOD = """\
model: {preset: tiny, ffn: default}
data: {path: shards/novels}
batch: {global_tokens: 4096, micro_batch: 4}
duration: {steps: 10}
optimizer: {lr: 1e-3}
"""


class EditorsLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, which editors read: 1_000 and `yes` are text, 3e-4 is a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for tag, pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    regexp = re.compile(f"(?:{pattern})$")
    EditorsLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", regexp, None)
EditorsLoader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node))
)


TYPES = {"object": dict, "array": list, "string": str, "null": NoneType, "boolean": bool}
ABOUT = {
    **dict.fromkeys(("required", "properties", "additionalProperties", "minProperties"), dict),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), list),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (int, float)),
    "pattern": str,
}


def has_type(value, name):
    if name in TYPES:
        return isinstance(value, TYPES[name])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (name == "number" or value == int(value))


def valid(value, schema):
    """Draft 2020-12, as far as our schema uses it."""
    return all(holds(value, keyword, rule, schema) for keyword, rule in schema.items())


def holds(value, keyword, rule, schema):
    if not isinstance(value, ABOUT.get(keyword, object)):
        return True
    match keyword:
        case "$schema" | "$defs" | "title" | "description" | "default" | "else":
            return True
        case "$ref":
            return valid(value, SCHEMA["$defs"][rule.removeprefix("#/$defs/")])
        case "type":
            return any(
                has_type(value, name) for name in ([rule] if isinstance(rule, str) else rule)
            )
        case "enum":
            return value in rule
        case "const":
            return value == rule
        case "anyOf":
            return any(valid(value, one) for one in rule)
        case "if":
            return valid(value, rule) or valid(value, schema["else"])
        case "required":
            return set(rule) <= value.keys()
        case "properties":
            return all(valid(value[key], rule[key]) for key in rule.keys() & value.keys())
        case "additionalProperties":
            others = value.keys() - schema.get("properties", {}).keys()
            return rule is True or all(rule and valid(value[key], rule) for key in others)
        case "minProperties":
            return len(value) >= rule
        case "items":
            return all(valid(one, rule) for one in value)
        case "prefixItems":
            return all(valid(one, of_it) for one, of_it in zip(value, rule, strict=False))
        case "minItems":
            return len(value) >= rule
        case "maxItems":
            return len(value) <= rule
        case "minimum":
            return value >= rule
        case "exclusiveMinimum":
            return value > rule
        case "maximum":
            return value <= rule
        case "exclusiveMaximum":
            return value < rule
        case "pattern":
            return re.search(rule, value) is not None
    return pytest.fail(f"the schema uses {keyword}, which nothing here checks")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_we_ship_is_valid_in_an_editor(path):
    assert valid(read_yaml(path), SCHEMA)
    assert valid(yaml.load(path.read_text(), EditorsLoader), SCHEMA)
    assert valid(yaml.safe_load(to_yaml(load_config(path))), SCHEMA)


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({"optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}}, True),
        ({"optimizer": {"lr": 1e-3, "betas": [0.9]}}, False),
        ({"optimizer": {"lr": 1e-3, "lrr": 1}}, False),
        ({"optimizer": {"lr": 0}}, False),
        ({"optimizer": {}}, False),
        ({"optimiser": {"lr": 1e-3}}, False),
        ({"batch": {"global_tokens": 4096}}, False),
        ({"batch": {"global_tokens": 4096, "micro_batch": True}}, False),
        ({"batch": {"global_tokens": 4096, "micro_batch": 1.5}}, False),
        ({"data": {"blend": {"a": 3, "b": {"weight": 1, "max_epochs": 2}}}}, True),
        ({"data": {"blend": {"a": 0}}}, False),
        ({"data": {"blend": {"a": {"max_epochs": 2}}}}, False),
        ({"data": {"blend": {}}}, False),
        ({"model": {"preset": "tiny"}}, True),
        ({"model": {"preset": "small"}}, False),
        ({"model": {"d_model": 32, "n_layer": 1, "n_head": 1, "max_seq_len": 8}}, True),
        ({"model": {"d_model": 32, "n_layer": 1, "n_head": 1}}, False),
        ({"model": {"preset": "tiny", "dropout": 1}}, False),
        ({"model": {"preset": "tiny", "ffn": "paper"}}, True),
        ({"model": {"preset": "tiny", "ffn": "papper"}}, False),
        ({"model": {"preset": "tiny", "ffn": {"preset": "dense", "fan_in_init": True}}}, True),
        ({"model": {"preset": "tiny", "ffn": {"preset": "paper", "fan_in_init": True}}}, False),
        ({"model": {"preset": "tiny", "ffn": {"kind": "sparse", "spectral": None}}}, True),
        ({"model": {"preset": "tiny", "ffn": {"spectral": {"keep": 0.25}}}}, False),
        ({"model": {"preset": "tiny", "ffn": {"preset": "paper", "spectral": {"kep": 1}}}}, False),
        (
            {"model": {"preset": "tiny", "ffn": {"preset": "default", "spectral": {"top_k": 1}}}},
            True,
        ),
        (
            {"model": {"preset": "tiny", "ffn": {"preset": "light", "spectral": {"kind": "x"}}}},
            False,
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, True),
        ({"precision": "fp8"}, False),
        ({"seed": None}, False),
    ],
)
def test_the_schema_and_the_loader_agree(change, good, tmp_path):
    tree = {**yaml.safe_load(GOOD.replace("1e-3", "0.001")), **change}
    assert valid(tree, SCHEMA) == good
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    if good:
        load_config(tmp_path / "run.yaml")
    else:
        with pytest.raises(ConfigError):
            load_config(tmp_path / "run.yaml")


def test_what_is_left_to_a_base_is_no_mistake():
    part = {"batch": {"micro_batch": 2}, "model": {"ffn": {"spectral": {"keep": 0.25}}}}
    assert valid({"base": "other.yaml", **part}, SCHEMA)
    assert not valid(part, SCHEMA)
    assert not valid({"base": "other.yaml", "batch": {"micro": 2}}, SCHEMA)


def sections():
    return {"RunConfig": SCHEMA["properties"]} | {
        name: part["properties"] for name, part in SCHEMA["$defs"].items()
    }


def test_every_key_is_described():
    for name, keys in sections().items():
        for key, value in keys.items():
            of_section = re.search(r"#/\$defs/(\w+)", json.dumps(value))
            described = value.get("description") or SCHEMA["$defs"][of_section[1]]["description"]
            assert described.endswith("."), (name, key)


def test_the_page_is_what_the_schema_makes_it():
    assert fill(PAGE) == PAGE, "run: python -m sparse_gpt.config.reference docs/configuration.md"
    assert sorted(re.findall(r"<!-- (\w+Config) -->", PAGE)) == sorted(sections())


def test_links_of_the_page_lead_somewhere():
    headings = {f"#{name}" for name in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    links = set(re.findall(r"\]\(([^)]+)\)", PAGE))
    assert {link for link in links if link.startswith("#")} <= headings
    assert all((ROOT / "docs" / link).exists() for link in links if not link.startswith("#"))


def test_examples_of_the_page_are_runs(tmp_path):
    whole, *parts = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "tiny-dense.yaml").write_text(whole)
    load_config(tmp_path / "tiny-dense.yaml")
    parts = [part for part in parts if "..." not in part and not part.startswith("# yaml-lang")]
    assert len(parts) >= len(SCHEMA["else"]["required"])
    for part in parts:
        tree = parse(part)[0] | {"base": "tiny-dense.yaml"}
        assert valid(tree, SCHEMA)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        load_config(tmp_path / "run.yaml")


def test_what_the_page_shows_is_what_is_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    command, shown = re.search(
        r"sparse-gpt config show (.+)\n```\n```yaml\n(.*?)```", PAGE, re.DOTALL
    ).groups()
    file, *overrides = command.split()
    printed = to_commented_yaml(settings(find_file(Path(file)), overrides))
    lines = printed.replace(str(ROOT), "…").splitlines()
    assert set(shown.splitlines()) - set(lines) == {"..."}
