"""What the pages link to, name, call and import is there."""

import ast
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sparse_gpt.cli.main import app

ROOT = Path(__file__).parents[1]
if not (ROOT / ".git").exists():
    pytest.skip("git says which files belong to the repository", allow_module_level=True)

_LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
FILES = {file for file in _LISTED.stdout.splitlines() if (ROOT / file).exists()}
THINGS = FILES | {str(folder) for file in FILES for folder in Path(file).parents}
PAGES = sorted(file for file in FILES if file.endswith(".md"))
OURS = re.compile(r"(?:\./)?((?:sparse_gpt|data|launch|configs|scripts|tests|docs)/.*)")
METRICS = {"data/batch_hash"}  # of metrics.jsonl: no paths
PLACEHOLDER = re.compile(r"[A-Z]{2,}|[<>{}$…]")  # as in tests/ROOM/test_FILE.py
TESTS = "\n".join((ROOT / file).read_text() for file in FILES if fnmatch(file, "tests/*.py"))


def of_pages(faults: Callable[[str], Iterator[str]]) -> Callable[[str], None]:
    """Make a test of what yields the faults of a page: there are none, in any."""

    @pytest.mark.parametrize("page", PAGES)
    def test(page: str) -> None:
        if found := sorted(set(faults(page))):
            pytest.fail("\n".join([page, *found]), pytrace=False)

    return test


def read(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def within_text(page: str, kind: str) -> Iterator[Token]:
    """Its links, images or pieces of code."""
    for block in read(page):
        yield from (token for token in block.children or () if token.type == kind)


def shell_words(page: str) -> Iterator[list[str]]:
    """Of each line of its blocks for a shell, and of each piece of code in its text."""
    blocks = [b for b in read(page) if b.type == "fence" and b.info in ("", "bash", "sh")]
    lines = [line for b in blocks for line in b.content.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(token.content for token in within_text(page, "code_inline"))]:
        try:
            yield shlex.split(line, comments=True)
        except ValueError:  # a quotation of other text
            yield line.split()


def anchors(page: str) -> set[str]:
    """What links to its headings say, as GitHub makes it."""
    tokens, seen, found = read(page), Counter[str](), set()
    for opening, heading in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(token.content for token in heading.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


@of_pages
def test_links_lead_somewhere(page: str) -> Iterator[str]:
    links = [token.attrGet("href") for token in within_text(page, "link_open")]
    links += [token.attrGet("src") for token in within_text(page, "image")]
    for link in map(str, links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        whole = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        target = str(whole.relative_to(ROOT))
        if target not in THINGS:
            yield f"{link}: git has no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@of_pages
def test_paths_are_files(page: str) -> Iterator[str]:
    if page == "CHANGELOG.md":  # tells of what was, too
        return
    for word in {word for words in shell_words(page) for word in words}:
        path = OURS.fullmatch(word.split("::")[0].rstrip(".,;:)"))
        if path and word not in METRICS and not PLACEHOLDER.search(word):
            name = path[1].rstrip("/")
            if name not in THINGS and not any(fnmatch(file, name) for file in FILES):
                yield f"{word}: git has no such file"


@of_pages
def test_tests_are_there(page: str) -> Iterator[str]:
    for token in within_text(page, "code_inline"):
        if re.fullmatch(r"test_\w+", token.content) and f"def {token.content}(" not in TESTS:
            yield f"{token.content}: no such test"


@of_pages
def test_commands_and_options_are_there(page: str) -> Iterator[str]:
    for words in shell_words(page):
        for at, (before, word) in enumerate(pairwise(["", *words])):
            if Path(word).name == "sparse-gpt" or (before, word) == ("-m", "sparse_gpt"):
                yield from faults_of_command(words[at + 1 :])
            elif before in ("-m", "--module") and word.startswith("sparse_gpt."):
                place = word.replace(".", "/")
                if not FILES & {f"{place}.py", f"{place}/__main__.py"}:
                    yield f"{word}: no module that runs"


def faults_of_command(words: list[str]) -> Iterator[str]:
    """Of what follows `sparse-gpt`."""
    command: Any = typer.main.get_command(app)
    said = ["sparse-gpt"]
    for word in words:
        if word in ("|", "||", "&&", ">", ";"):
            return
        if word.startswith("--"):
            options = {name for parameter in command.params for name in parameter.opts}
            if word.split("=")[0] not in {*options, "--help"}:
                yield f"{' '.join(said)}: no option {word}"
        elif commands := getattr(command, "commands", None):
            names = word.split("|")  # `sparse-gpt shards info|verify`
            if PLACEHOLDER.search(word):
                return
            if unknown := [name for name in names if name not in commands]:
                yield f"{' '.join(said)}: no command {', '.join(unknown)}"
                return
            said, command = [*said, word], commands[names[0]]


@of_pages
def test_imports_work(page: str) -> Iterator[str]:
    python = [token.content for token in read(page) if token.info == "python"]
    for node in (node for block in python for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparse_gpt"):
            for name in node.names:
                try:
                    getattr(import_module(str(node.module)), name.name)
                except AttributeError:
                    yield f"{node.module} has no {name.name}"
                except ModuleNotFoundError as missing:  # of an extra, perhaps
                    if str(missing.name).startswith("sparse_gpt"):
                        yield f"{missing.name}: no such module"


def test_the_index_has_every_page():
    index = "docs/README.md"
    linked = {f"docs/{token.attrGet('href')}" for token in within_text(index, "link_open")}
    assert {page for page in PAGES if page.startswith("docs/")} - {index} <= linked


def test_the_version_is_said_alike():
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version[1]
    assert f"\n## {version[1]} - " in (ROOT / "CHANGELOG.md").read_text()
