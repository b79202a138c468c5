"""The code of a sparse GPT-2 that travels with a saved one, for who has not installed ours.

transformers runs it with `trust_remote_code=True`. It is `modelling.py` and what that imports of
ours, a file a module: without the registration of Auto classes, and of operators, of which a
process has one each.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

ROOT = "sparse_gpt.huggingface.modelling"
CODE = "modelling_sparse_gpt2"
AUTO_MAP = {
    "AutoConfig": f"{CODE}.SparseGPT2Config",
    "AutoModelForCausalLM": f"{CODE}.SparseGPT2LMHeadModel",
}


def travelling_code() -> dict[str, str]:
    """The files by their names."""
    files: dict[str, str] = {}
    unread = [ROOT]
    while unread:
        module = unread.pop()
        if _file(module) in files:
            continue
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        transformer = _Travelling()
        tree = transformer.visit(ast.parse(Path(spec.origin).read_text()))
        head = f"# {module}, of sparse-gpt (Apache License 2.0)\n"
        files[_file(module)] = head + ast.unparse(ast.fix_missing_locations(tree)) + "\n"
        unread += transformer.imported
    return files


def _file(module: str) -> str:
    return f"{_name(module)}.py"


def _name(module: str) -> str:
    return CODE if module == ROOT else module.replace(".", "_")


class _Travelling(ast.NodeTransformer):
    """Absolute imports of ours become relative ones; what registers anything goes."""

    def __init__(self) -> None:
        self.imported: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if node.module is None or not node.module.startswith("sparse_gpt"):
            return node
        self.imported.append(node.module)
        return ast.ImportFrom(_name(node.module), node.names, 1)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value
        registers = isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".register")
        return None if registers else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any("register_fake" in one or "register_flop_formula" in one for one in decorators):
            return None
        if any("custom_op" in one for one in decorators):
            node.decorator_list = []
        return node
