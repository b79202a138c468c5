"""A run file, what it inherits and what overrides it, to a RunConfig."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sparse_gpt.config.explain import explain
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `key.sub=value` overrides and check everything.

    `run_dir` defaults to `runs/<name of the file>`. Raises ConfigError.
    """
    path = Path(path)
    return build_config(path, {"run_dir": f"runs/{path.stem}", **read_yaml(path)}, overrides)


def build_config(path: Path, tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `tree`, found in the file `path`, and the overrides on it describe.

    Raises ConfigError.
    """
    tree = _inherit(path, tree, seen=())
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig(**tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, RunConfig)}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4 and takes the rest for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader: plain data only


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError."""
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a run file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no `key: value` lines")
    return tree


def _inherit(path: Path, tree: dict[str, Any], seen: tuple[Path, ...]) -> dict[str, Any]:
    """`tree`, found in `path`, over the file that its `base` names."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: inherits from itself through `base`")
    if "base" not in tree:
        return dict(tree)
    base = path.parent / str(tree["base"])
    own = {key: value for key, value in tree.items() if key != "base"}
    return _merge(_inherit(base, read_yaml(base), (*seen, path.resolve())), own)


_DATA = {"path", "blend"}  # of the data section; one is given, whole, and replaces what was before


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping.

    A name where a mapping could stand is its preset (`ffn: paper` is `ffn: {preset: paper}`), so
    that one of its keys can be overridden.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if key in ("model", "ffn") and isinstance(old, str):
            old = {"preset": old}
        # Of the duration's keys only one may stand: an inherited one must go.
        if isinstance(value, dict) and isinstance(old, dict) and key != "duration":
            if key == "data" and value.keys() & _DATA:
                old = {name: v for name, v in old.items() if name not in _DATA}
            value = _merge(old, value)
        merged[key] = value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals or not all(keys.split(".")):
        raise ConfigError(f"'{override}': an override is written key=value or section.key=value")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        raise ConfigError(f"'{override}': the value is not YAML; quote it") from None
    for key in reversed(keys.split(".")):
        value = {key: value}
    merged = _merge(tree, value)
    tree.clear()
    tree.update(merged)
