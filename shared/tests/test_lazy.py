"""Laws of poise.core.lazy."""

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

INIT = "from poise.core.lazy import attach\n\n__getattr__, __dir__, __all__ = attach(__name__, __file__)\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `lazily` with a function in a submodule and a subpackage, not imported yet; its folder."""
    folder = tmp_path / "lazily"
    (folder / "tools").mkdir(parents=True)
    (folder / "__init__.py").write_text(INIT)
    (folder / "__init__.pyi").write_text(
        "from lazily import tools as tools\nfrom lazily.shapes import area as area\nfrom lazily.shapes import volume as volume\n"
    )
    (folder / "shapes.py").write_text("def area():\n    return 6\n\n\ndef volume():\n    return 7\n")
    (folder / "tools" / "__init__.py").write_text("name = 'tools'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "lazily"]:
        del sys.modules[name]


def imported() -> ModuleType:
    return importlib.import_module("lazily")


def test_names_are_imported_on_first_use_and_not_before(package: Path) -> None:
    lazily = imported()
    assert "lazily.shapes" not in sys.modules
    assert lazily.area() == 6
    assert "lazily.shapes" in sys.modules
    assert "lazily.tools" not in sys.modules
    assert lazily.tools.name == "tools"


def test_a_name_is_looked_up_once(package: Path) -> None:
    lazily = imported()
    assert "area" not in vars(lazily)
    area = lazily.area
    assert vars(lazily)["area"] is area
    assert lazily.area is sys.modules["lazily.shapes"].area


def test_dir_and_star_import_give_all_public_names(package: Path) -> None:
    lazily = imported()
    assert lazily.__all__ == dir(lazily) == ["area", "tools", "volume"]
    names: dict[str, object] = {}
    exec("from lazily import *", names)
    assert {"area", "tools", "volume"} <= names.keys()


def test_other_names_do_not_exist(package: Path) -> None:
    lazily = imported()
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'weight'"):
        _ = lazily.weight
    assert not hasattr(lazily, "__wrapped__")
    with pytest.raises(ImportError):
        exec("from lazily import weight")


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("from lazily.shapes import area\n", "line 1: write `import area as area`"),
        ("from lazily.shapes import area as surface\n", "line 1: write `import area as area`"),
        ("from .shapes import area as area\n", "line 1: only `from module import name as name`"),
        ("from . import tools as tools\n", "line 1: only `from module import name as name`"),
        ("\nimport lazily.shapes\n", "line 2: only `from module import name as name`"),
        ("from lazily.shapes import area as area\n" * 2, "'area' is imported twice"),
        ("from lazily.shapes import area as area\nfrom lazily.tools import area as area\n", "'area' is imported twice"),
        ("from lazily.shapes import shapes as shapes\n", "'shapes' is also the name of a submodule of lazily"),
        ("from lazily.shapes import tools as tools\n", "'tools' is also the name of a submodule of lazily"),
    ],
)
def test_a_stub_that_would_be_misread_is_refused(package: Path, stub: str, message: str) -> None:
    (package / "__init__.pyi").write_text(stub)
    with pytest.raises(ImportError, match=message):
        imported()


def test_a_package_without_a_stub_is_refused(package: Path) -> None:
    (package / "__init__.pyi").unlink()
    with pytest.raises(FileNotFoundError, match=r"__init__\.pyi"):
        imported()


def test_importing_poise_core_imports_no_torch_and_every_public_name_exists() -> None:
    code = """
        import sys
        import poise.core
        import poise.core.functional
        import poise.core.catalog
        assert not {"torch", "numpy", "jaxtyping"} & set(sys.modules), "a heavy import"
        for package in (poise.core, poise.core.functional):
            assert package.__all__
            for name in package.__all__:
                assert getattr(package, name) is not None, name
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
