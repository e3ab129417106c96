"""A toy domain, installed for a single test: tests/toy is laid out like a site-packages folder."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from poise.core.lab import catalogs

TOY = Path(__file__).parent / "toy"


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests start share compiled modules, also where Python may not keep them beside the sources."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.getbasetemp() / "pycache"))
        yield


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Installs the toy domain in this process and in the ones it starts; its only method is the value."""
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(TOY), os.environ.get("PYTHONPATH")))))
    catalogs.installed.cache_clear()
    yield "toy/blobs"
    catalogs.installed.cache_clear()
