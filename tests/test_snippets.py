"""The code that the documentation shows, runs: Python blocks, the usage of every method, and examples in docstrings."""

import doctest
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

from poise.core.catalog import Method
from poise.core.lab.catalogs import installed

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
PLAIN_LANGUAGES = {"", "bibtex", "console", "sh", "text"}


def documents() -> list[Path]:
    """All Markdown written by hand; the pages of methods repeat the catalog's ``usage``, which has its own test."""
    pages = [
        path for path in (ROOT / "docs").rglob("*.md") if path.parent.parent.name != "methods" or ".notes" in path.name
    ]
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("packages/*/README.md"), ROOT / "shared/README.md", *pages])


def modules_with_examples() -> list[str]:
    """Every module whose docstrings have ``>>>``."""
    found = []
    for source in (ROOT / "shared/src", *ROOT.glob("packages/*/src")):
        for path in source.rglob("*.py"):
            if ">>>" in path.read_text(encoding="utf-8"):
                found.append(".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"))
    return sorted(found)


def run(code: str, origin: str, namespace: dict[str, object]) -> None:
    exec(compile(code, origin, "exec"), namespace)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snippets run in an empty folder, under a fixed seed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_of_a_page_run_one_after_the_other(path: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
        if block["language"] == "python":
            code = re.sub(f"^{block['indent']}", "", block["code"], flags=re.MULTILINE)
            run(code, str(path.relative_to(ROOT)), namespace)
        else:
            assert block["language"] in PLAIN_LANGUAGES, "a block that is neither Python nor plain cannot be checked"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell_blocks_are_well_formed(path: Path) -> None:
    for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
        if block["language"] == "sh":
            subprocess.run(["bash", "-n"], input=block["code"], text=True, check=True)


@pytest.mark.parametrize("method", installed().values(), ids=lambda method: method.name)
def test_usage_of_a_method_runs(method: Method) -> None:
    run(method.usage, f"usage of {method.name}", {"__name__": "__main__"})


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    outcome = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert outcome.failed == 0
