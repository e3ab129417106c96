"""What works on this machine and what is missing."""

import os
import shutil
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from poise.core.lab import catalogs
from poise.core.lab.environment import environment, package_version

_OPTIONAL = {
    "accelerate": "lab",
    "rich": "lab",
    "matplotlib": "lab",
    "tensorboard": "lab",
    "torchmetrics": "lab",
    "scikit-learn": "lab",
    "scikit-image": "lab",
    "mlxtend": "lab",
    "pydicom": "lab",
    "ray": "ray",
    "faiss-cpu": "",
}


def examine() -> dict[str, Any]:
    """Everything ``poise doctor --json`` prints; ``problems`` is empty when nothing is missing for the installed packages."""
    from poise.core.data import bundled

    found = {
        "environment": environment(),
        "memory_gb": _memory_gb(),
        "disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "packages": {f"poise-{name}": package_version(f"poise-{name}") for name in catalogs.packages()},
        "methods": {name: len(catalogs.in_package(name)) for name in catalogs.packages()},
        "optional": {name: package_version(name) for name in _OPTIONAL},
        "data": [{"name": one.name, "package": one.package, "available": one.available} for one in bundled()],
    }
    return found | {"problems": _problems(found)}


def _problems(found: dict[str, Any]) -> list[str]:
    missing = [name for name, extra in _OPTIONAL.items() if extra == "lab" and found["optional"][name] is None]
    problems = []
    if missing:
        problems.append(f"for `poise run`, {', '.join(missing)} must be installed: pip install 'poise-core[lab]'")
    problems += [
        f"the data set {one['name']} is not available: it comes with {one['package']}"
        for one in found["data"]
        if not one["available"] and one["package"] not in missing
    ]
    for name in found["packages"]:
        problems += [
            f"{name} needs {dependency}, which is not installed"
            for dependency in _dependencies(name)
            if not package_version(dependency)
        ]
    return problems


def _dependencies(package: str) -> list[str]:
    names = [line for line in requires(package) or [] if "extra ==" not in line]
    return [_name(line) for line in names]


def _name(requirement: str) -> str:
    end = next((index for index, letter in enumerate(requirement) if not (letter.isalnum() or letter in "-_.")), None)
    return requirement[:end]


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
