"""Each module of a run and of where it runs has its tests where one looks for them."""

from pathlib import Path

import pytest
from ranks import ROOT

PACKAGE = ROOT / "sparse_gpt"
MODULES = [
    path.relative_to(PACKAGE)
    for room in ("train", "cluster")
    for path in sorted((PACKAGE / room).rglob("*.py"))
    if not path.name.startswith("__")
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_its_tests(module: Path) -> None:
    tests = ROOT / "tests" / module.with_name(f"test_{module.name}")
    assert tests.exists(), f"{tests.relative_to(ROOT)} is for the tests of sparse_gpt/{module}"
    assert "\ndef test_" in tests.read_text()
