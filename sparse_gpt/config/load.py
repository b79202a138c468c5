"""A run file, what it inherits and what overrides it, to a RunConfig."""

import errno
import re
import stat
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.error import MarkedYAMLError

from sparse_gpt.config.explain import explain
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError, did_you_mean
from sparse_gpt.model.config import merge

_MOST_NODES, _MOST_BYTES, _DEEPEST = 20_000, 1 << 20, 100  # of a run file
_LONGEST = 100  # characters of what is no text
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


def find_file(path: Path, folder: str = "") -> Path:
    """`path`, or, where nothing lies there and it is a bare name, the file of this name that we
    ship in `folder` of `configs/`. Raises ConfigError for names that are nowhere."""
    bare = path.name == str(path) and path.suffix in ("", ".yaml")
    if not bare or (path.exists() and not path.is_dir()):
        return path
    package = Path(__file__).parents[1]
    inside = package / "configs"  # in the wheel; in a checkout it lies beside the package
    home = (inside if inside.is_dir() else package.parent / "configs") / folder
    shipped = {file.stem: file for file in sorted(home.glob("*.yaml"))}
    name = path.name.removesuffix(".yaml")
    if name not in shipped:
        hint = did_you_mean(name, shipped)
        raise ConfigError(
            f"{path}: is no file here, nor one of ours; {hint and hint + ' '}"
            f"ours are {', '.join(shipped)}"
        )
    return shipped[name]


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
    layers = [own for _, own in lineage(path, tree)] + [read_override(text) for text in overrides]
    try:
        return RunConfig.model_validate(reduce(lay_over, layers))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, RunConfig)}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, which `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4 and takes the rest for text); not more
    of it than a run file needs, whatever is written there."""

    _nodes = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        self._depth += 1
        if self._nodes > _MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values")
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"values within values, more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """The tag of a value. What is long is text: expressions for numbers would take for ever."""
        if kind is yaml.ScalarNode and len(value) > _LONGEST:
            return _TEXT
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return tag


class Dumper(yaml.SafeDumper):
    """Quotes the text that would be such a number."""


yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
    Loader=_Loader,
    Dumper=Dumper,
)


def parse(text: str) -> tuple[Any, yaml.Node | None]:
    """The plain data that YAML text holds, and the nodes, with lines, which they are from.

    Raises YAMLError, also for a key that comes twice, and for aliases that make it endless.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            _check_nodes(node)
        return (None if node is None else loader.construct_document(node)), node
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"a value that cannot be: {error}") from None
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Makes text of keys that are numbers. Raises YAMLError for keys that come twice or are of
    another kind, for endless numbers, and where there are too many nodes, each alias counted as
    what it stands for."""
    pending, count = [root], 0
    while pending:
        node = pending.pop()
        count += 1
        if count > _MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values, aliases written out")
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                pending.append(value)
                if key.tag == _MERGE:
                    continue
                if key.tag in _NUMBERS:
                    key.tag = _TEXT  # as it is written: a learning rate of a study, say
                if key.tag != _TEXT:
                    raise _marked("a key that is no text; quote it", key)
                if key.value in seen:
                    raise _marked(f"the key {key.value!r} comes twice", key)
                seen.add(key.value)
        elif node.tag != _TEXT and len(node.value) > _LONGEST:
            raise _marked(f"{len(node.value):,} characters that are to be no text", node)


def _marked(problem: str, node: yaml.Node) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _read_text(path: Path) -> str:
    """Of a run file: what is no file may have no end. Raises OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "Is no regular file")
    if status.st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"Is larger than {_MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError."""
    try:
        tree, _ = parse(_read_text(path))
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


def lineage(path: Path, tree: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The files that `tree`, found in `path`, inherits from through `base`, the farthest first, and
    itself, each with what it holds. Raises ConfigError."""
    files = [(path, tree)]
    while "base" in tree:
        if not isinstance(tree["base"], str):
            raise ConfigError(f"{path}: base is {tree['base']!r}; it is the name of a run file")
        path = path.parent / tree["base"]
        if path.resolve() in [other.resolve() for other, _ in files]:
            raise ConfigError(f"{path}: inherits from itself through `base`")
        tree = read_yaml(path)
        files.insert(0, (path, tree))
    return [(path, {k: v for k, v in tree.items() if k != "base"}) for path, tree in files]


def read_override(text: str) -> dict[str, Any]:
    """What `section.key=value` sets, as a file would hold it. Raises ConfigError."""
    path, equals, written = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"'{text}': an override is written key=value or section.key=value")
    try:
        value, _ = parse(written)
    except yaml.YAMLError:
        raise ConfigError(f"'{text}': the value is not YAML; quote it") from None
    tree: dict[str, Any] = {keys.pop(): value}
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    return merge(_make_room(below, above), above)


_DATA = {"path", "blend"}  # of the data section; one is given, whole, and replaces what was before


def _make_room(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` without what cannot stand beside `above`.

    A name where a mapping could stand is its preset (`ffn: paper` is `ffn: {preset: paper}`), so
    that one of its keys can be overridden.
    """
    room = dict(below)
    for key, value in above.items():
        old = room.get(key)
        if key in ("model", "ffn") and isinstance(old, str):
            old = {"preset": old}
        if isinstance(value, dict) and isinstance(old, dict):
            # Of a duration only one key may stand; a preset stands for all keys.
            if key == "duration" or (key == "ffn" and "preset" in value):
                old = {}
            elif key == "data" and value.keys() & _DATA:
                old = {name: v for name, v in old.items() if name not in _DATA}
            room[key] = _make_room(old, value)
    return room
