"""Which tests start processes: found in what they call, so that nobody keeps a list of them."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

HERE = str(Path(__file__).parent)


def launches(test: pytest.Function) -> bool:
    """Whether a test, a fixture of it or a function in `tests/` that either calls uses subprocess.

    What the package starts by itself (`prove_resume`, workers of `prepare`) is not seen.
    """
    fixtures = [found[-1].func for found in test._fixtureinfo.name2fixturedefs.values()]
    return _launches([test.obj, *fixtures], set())


def _launches(functions: list[Any], seen: set[Any]) -> bool:
    for function in functions:
        if hasattr(function, "hypothesis"):
            function = function.hypothesis.inner_test
        function = inspect.unwrap(function)
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        if not function.__code__.co_filename.startswith(HERE):
            continue
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        for value in (function.__globals__.get(name) for name in names):
            if "subprocess" in (getattr(value, "__name__", ""), getattr(value, "__module__", "")):
                return True
            called = list(vars(value).values()) if inspect.isclass(value) else [value]
            if _launches(called, seen):
                return True
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code with that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
