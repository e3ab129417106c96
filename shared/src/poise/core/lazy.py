"""Public names that are imported on first use.

``poise list`` reads every installed catalog, and a catalog lives inside a package whose public names need torch. So a
package's ``__init__.py`` imports nothing: its public names stand in ``__init__.pyi``, which type checkers and editors
read as usual and :func:`attach` turns into a module-level ``__getattr__`` (PEP 562).
"""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a package from the stub beside ``file``.

    Args:
        package: the package's ``__name__``.
        file: the package's ``__file__``; ``__init__.pyi`` is read from the same folder. It holds nothing but
            ``from package.module import name as name`` and ``from package import module as module``.

    Raises:
        ImportError: the stub holds anything else, a name twice, or a name that a submodule would take when imported.
    """
    stub = Path(file).with_suffix(".pyi")
    folder = stub.parent
    origins: dict[str, str] = {}
    for name, module in _imports(stub):
        if name in origins:
            raise ImportError(f"{stub}: {name!r} is imported twice, from {origins[name]} and {module}")
        if module != package and ((folder / f"{name}.py").exists() or (folder / name).is_dir()):
            # Importing package.name would set the attribute `name` of the package to the module.
            raise ImportError(f"{stub}: {name!r} is also the name of a submodule of {package}; rename one of them")
        origins[name] = module

    def __getattr__(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = origins[name]
        if module == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)  # from now on an ordinary attribute
        return value

    names = sorted(origins)
    return __getattr__, lambda: names, names


def _imports(stub: Path) -> Iterator[tuple[str, str]]:
    """The (name, module) pairs of a stub."""
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.ImportFrom) and node.module and node.level == 0):
            raise ImportError(f"{stub}, line {node.lineno}: only `from module import name as name` may stand here")
        for alias in node.names:
            if alias.asname != alias.name:
                raise ImportError(f"{stub}, line {node.lineno}: write `import {alias.name} as {alias.name}`")
            yield alias.name, node.module
