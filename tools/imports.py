"""Who imports whom in the workspace, read from the sources without running them."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@cache
def members() -> dict[str, Path]:
    """The folder of every member by the name of its package, the core first."""
    domains = sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml"))
    return {"core": ROOT / "shared"} | {path.name: path for path in domains}


@cache
def project(package: str) -> dict[str, Any]:
    """The table ``project`` of a member's pyproject.toml."""
    return tomllib.loads((members()[package] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@cache
def modules() -> dict[str, Path]:
    """The source of every module of the workspace, by its dotted name."""
    found = {}
    for folder in members().values():
        for path in (folder / "src").rglob("*.py"):
            parts = path.relative_to(folder / "src").with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imported(module: str) -> tuple[str, ...]:
    """The modules of the workspace that ``module`` imports, in the order in which it does."""
    return tuple(dict.fromkeys(name for name in _imported(module) if name in modules() and name != module))


def _imported(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("poise."):
            yield from (home(node.module, alias.name) for alias in node.names)


def home(module: str, name: str) -> str:
    """The module that ``from module import name`` reaches: a submodule, where a lazy export is defined, or ``module`` itself."""
    if f"{module}.{name}" in modules():
        return f"{module}.{name}"
    return _exports(module).get(name, module)


@cache
def _exports(module: str) -> dict[str, str]:
    stub = modules()[module].with_suffix(".pyi") if module in modules() else None
    if stub is None or not stub.is_file():
        return {}
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    return {
        alias.name: node.module
        for node in statements
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def defines(module: str, name: str) -> bool:
    """Whether ``module`` has ``name`` at its top level or, as ``Class.method``, in a class there."""
    body: list[ast.stmt] = tree(module).body
    for part in name.split("."):
        found = [node for node in body if part in _names(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def mentions(module: str, name: str) -> bool:
    """Whether the code of ``module`` names ``name``, alone or as an attribute."""
    return any(
        name in (getattr(node, "id", None), getattr(node, "attr", None))
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Name | ast.Attribute)
    )
