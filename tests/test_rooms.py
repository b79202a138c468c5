"""The arrows of the package: which room imports which, no circles, what stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from ranks import ROOT

PACKAGE = ROOT / "sparse_gpt"
GROUND = {"errors", "files", "progress", "provenance", "schema"}
# Of each room, those that it may import besides itself and the ground; CONTRIBUTING.md draws them.
BELOW = {
    "data": set(),
    "model": set(),
    "scaling": set(),
    "huggingface": {"model"},
    "config": {"data", "model"},
    "train": {"config", "data", "model", "huggingface"},
    "plan": {"train", "config", "data", "model"},
    "evaluate": {"train", "config", "data", "model", "huggingface"},
    "cluster": {"train", "config", "data", "model"},
    "sweep": {"cluster", "plan", "train", "config", "data", "model", "scaling"},
    "cli": {
        *("sweep", "cluster", "plan", "evaluate", "train", "config", "data", "model", "scaling")
    },
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """What a file imports when it is loaded or run; not what only a type checker reads."""
    here = name_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    unread = [ast.parse(path.read_text())]
    while unread:
        node = unread.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            unread += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in FILES else module
        else:
            unread += ast.iter_child_nodes(node)


IMPORTS = {name: set(imports(path)) for name, path in FILES.items()}


def room(module: str) -> str:
    """Of `sparse_gpt.train.guard`: train. Of a file outside the rooms: its name."""
    return [*module.split("."), ""][1]


def test_every_file_is_in_a_room_or_the_ground():
    outside = {"", "__main__"}
    assert {room(name) for name in FILES} == {*BELOW, *GROUND, *outside}


@pytest.mark.parametrize("name", [*BELOW, *sorted(GROUND)])
def test_arrows_point_down(name):
    allowed = {name, *GROUND, *BELOW.get(name, ())}
    for module, found in IMPORTS.items():
        if room(module) == name:
            ours = {target for target in found if target.split(".")[0] == "sparse_gpt"}
            assert {room(target) for target in ours} <= allowed, (module, ours)


def test_no_imports_run_in_a_circle():
    graph = {
        name: {target for target in found if target in FILES} for name, found in IMPORTS.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        *((room, "deepspeed") for room in BELOW if room not in ("train", "cluster")),
        *((room, "datasets") for room in BELOW if room != "data"),
        *((room, "lm_eval") for room in BELOW if room != "evaluate"),
        *((room, "transformers") for room in BELOW if room != "huggingface"),
        ("data", "torch"),
    ],
)
def test_what_a_room_does_without(name, package):
    users = {module for module, found in IMPORTS.items() if room(module) == name}
    users = {m for m in users if any(t.split(".")[0] == package for t in IMPORTS[m])}
    if (name, package) == ("data", "torch"):
        users -= {f"sparse_gpt.data.batches.{file}" for file in ("batches", "prefetch")}
    assert not users


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import sparse_gpt", ("torch", "numpy", "pydantic", "deepspeed", "datasets")),
        ("import sparse_gpt.data", ("torch", "deepspeed", "datasets", "transformers")),
        ("import sparse_gpt.scaling", ("torch", "deepspeed", "datasets")),
        ("import sparse_gpt.cli.main", ("torch", "numpy", "deepspeed", "datasets")),
        ("from sparse_gpt import GPT", ("deepspeed", "datasets", "transformers")),
    ],
)
def test_an_import_stays_light(statement, heavy):
    code = f"import sys\n{statement}\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names_are_there():
    code = (
        "import sparse_gpt, sparse_gpt.data, sparse_gpt.scaling\n"
        "for room in (sparse_gpt, sparse_gpt.data, sparse_gpt.scaling):\n"
        "    for name in room.__all__: getattr(room, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_is_too_long():
    """One idea a file; a longer one has a seam."""
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 350} == {}
