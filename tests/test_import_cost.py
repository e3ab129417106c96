"""Importing a member costs next to nothing on top of torch; told by what gets imported, never by a clock."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", *sorted(path.name for path in (ROOT / "packages").iterdir() if path.is_dir()))

# Each takes about as long to import as torch, or drags in something that does. Methods import them inside functions.
HEAVY = {
    "accelerate",
    "diffusers",
    "faiss",
    "jax",
    "matplotlib",
    "monai",
    "ot",
    "pandas",
    "peft",
    "scipy",
    "skimage",
    "sklearn",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
}

every_package = pytest.mark.parametrize("package", PACKAGES)


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``code``."""
    program = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(shown.stdout.split())


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """What an interpreter of this environment has before any import."""
    return modules_after("")


@every_package
def test_a_package_imports_nothing_but_the_standard_library(package: str, bare: set[str]) -> None:
    assert modules_after(f"import poise.{package}") - bare - sys.stdlib_module_names <= {"poise"}


@every_package
def test_all_public_names_together_import_nothing_slow(package: str) -> None:
    assert modules_after(f"from poise.{package} import *") & HEAVY == set()


@every_package
def test_all_public_names_together_do_not_import_the_compiler(package: str) -> None:
    program = f"import sys; from poise.{package} import *; print('torch._dynamo' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_public_names_of_core_parts_import_nothing_slow() -> None:
    parts = sorted(path.parent for path in (ROOT / "shared/src/poise/core").glob("*/__init__.pyi"))
    imports = "\n".join(f"from poise.core.{part.name} import *" for part in parts if part.name != "lab")
    assert modules_after(imports) & HEAVY == set()


def test_the_lab_starts_without_what_only_some_runs_need() -> None:
    assert modules_after("from poise.core.lab import *") & {"accelerate", "matplotlib", "scipy", "tensorboard"} == set()
