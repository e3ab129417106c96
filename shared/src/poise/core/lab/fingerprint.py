"""Tell whether a result still belongs to the code: a hash over an experiment and every poise module that it reaches by imports.

Comments, docstrings and formatting do not count, nor does the lab itself.
"""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def fingerprint(module: str, **settings: Any) -> str:
    """Hash the code that ``module`` (an experiment) reaches, together with JSON-able ``settings``."""
    reached = _reach(module)
    code = "\n".join(f"{name} {_code(_source(name))}" for name in sorted(reached))
    return hashlib.sha256(f"{code}\n{json.dumps(settings, sort_keys=True)}".encode()).hexdigest()[:16]


@cache
def _reach(module: str) -> frozenset[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith("poise.core.lab"):
            continue
        seen.add(name)
        waiting += [found for found in _imports(name) if found.startswith("poise.")]
    return frozenset(seen)


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_source(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("poise."):
            for alias in node.names:
                yield _defining_module(node.module, alias.name)


def _defining_module(module: str, name: str) -> str:
    """Where ``from module import name`` finds ``name``: a submodule, a lazily exported object's home, or ``module`` itself."""
    if _find(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    stub = _source(module).with_suffix(".pyi")
    if stub.name == "__init__.pyi" and stub.is_file():
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
                return node.module
    return module


def _source(name: str) -> Path:
    path = _find(name)
    if path is None:
        raise ModuleNotFoundError(f"no source of {name}", name=name)
    return path


@cache
def _find(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


@cache
def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
