"""Public names that are imported on first use.

``poise list`` reads every installed catalog, and a catalog lives inside a package whose public names need torch. So a package's
``__init__.py`` imports nothing: its public names stand in ``__init__.pyi``, which type checkers and editors read as usual and
:func:`attach` turns into a module-level ``__getattr__`` (PEP 562).
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a package from the stub beside ``file``.

    Args:
        package: the package's ``__name__``.
        file: the package's ``__file__``; ``__init__.pyi`` is read from the same folder. It may only hold
            ``from package.module import name as name`` and ``from package import module as module``.
    """
    origins = {
        alias.name: node.module
        for node in ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def __getattr__(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        origin = origins[name]
        if origin == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(origin), name)

    names = sorted(origins)
    return __getattr__, lambda: names, names
