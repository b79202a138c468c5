"""Where each value of a run came from: a line of a file, a preset, an override or the default."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from sparse_gpt.config.load import (
    Dumper,
    lay_over,
    lineage,
    load_config,
    parse,
    read_override,
    read_yaml,
)


@dataclass(frozen=True)
class Setting:
    """One value of a resolved run: its keys from the outermost on, plain data, where it is from."""

    keys: tuple[str, ...]
    value: Any
    origin: str


def settings(path: Path, overrides: Sequence[str] = ()) -> list[Setting]:
    """Every value of the run that `load_config` makes of the same. Raises ConfigError."""
    config = load_config(path, overrides)
    layers = []
    for file, _ in lineage(path, read_yaml(path)):
        _, root = parse(file.read_text(encoding="utf-8"))
        layers.append(_places(root, file))
    layers[-1] = {"run_dir": "default", **layers[-1]}
    for text in overrides:
        root = yaml.representer.SafeRepresenter().represent_data(read_override(text))
        layers.append(_places(root, None))
    return list(_settings(config, reduce(lay_over, layers), "default"))


def _places(node: Any, file: Path | None, key: str = "") -> Any:
    """The tree below a node of a file, or an override, with each value's place for the value: it is
    laid over others as the values are."""
    if isinstance(node, yaml.MappingNode):
        return {name.value: _places(value, file, name.value) for name, value in node.value}
    place = f"{file}:{node.start_mark.line + 1}" if file else "override"
    return f"preset {node.value} ({place})" if key in ("model", "ffn", "preset") else place


def _settings(value: Any, place: Any, above: str, keys: tuple[str, ...] = ()) -> Iterator[Setting]:
    """`place` is of all of `value`, or a mapping of places; what it leaves out is from `above`."""
    if isinstance(place, str):
        place, above = {}, place
    above = place.get("preset", above)
    inside = dict(value) if isinstance(value, BaseModel | dict) else {}
    if not inside:
        yield Setting(keys, to_jsonable_python(value), above)
    for key, inner in inside.items():
        default = isinstance(value, BaseModel) and key not in value.model_fields_set
        of_key = "default" if default else place.get(str(key), {})
        yield from _settings(inner, of_key, above, (*keys, str(key)))


class _Dumper(Dumper):
    """One value a line."""

    def check_simple_key(self) -> bool:
        return True  # a key of any length, such as a folder's name, stays on the line of its value


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)


def to_commented_yaml(found: Iterable[Setting]) -> str:
    """The run file of these values, each with its origin as a comment."""
    lines: list[tuple[str, str]] = []
    before: tuple[str, ...] = ()
    for setting in found:
        same = [one == other for one, other in zip(before, setting.keys, strict=False)]
        shared = [*same, False].index(False)
        tree = setting.value
        for key in reversed(setting.keys[shared:]):
            tree = {key: tree}
        text = indent(yaml.dump(tree, Dumper=_Dumper, width=math.inf), "  " * shared)
        *sections, last = text.splitlines()
        lines += [*((section, "") for section in sections), (last, f"  # {setting.origin}")]
        before = setting.keys
    width = max(len(line) for line, origin in lines if origin)
    return "".join(f"{f'{line:<{width}}' if origin else line}{origin}\n" for line, origin in lines)
