"""A toy domain, installed for a single test, and the command line to run on it. tests/toy is laid out like a site-packages folder."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from poise.core.lab import catalogs
from poise.core.lab.cli import main

TOY = Path(__file__).parent / "toy"


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests start share compiled modules, also where Python may not keep them beside the sources."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.getbasetemp() / "pycache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def compiler_keeps_its_trace() -> None:
    """Without torch.compile's structured trace, thousands of lines, in the report of a test that fails."""
    logging.getLogger("torch.__trace").propagate = False


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Installs the toy domain in this process and in the ones it starts; its only method is the value."""
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(TOY), os.environ.get("PYTHONPATH")))))
    catalogs.installed.cache_clear()
    yield "toy/blobs"
    catalogs.installed.cache_clear()


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @classmethod
    def of(cls, process: "subprocess.CompletedProcess[str]") -> "Outcome":
        return cls(process.returncode, process.stdout, process.stderr)

    def json(self) -> Any:
        """The one JSON value on stdout; anything else there is a mistake."""
        assert self.code in (0, 1), self.err
        (line,) = self.out.splitlines()
        return json.loads(line)

    def is_refused(self, code: int, *words: str) -> None:
        """Check that the command ended with ``code``, an empty stdout, and one line on stderr that holds all ``words``."""
        assert self.code == code, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("poise: ")
        assert [word for word in words if word not in line] == [], line


@pytest.fixture
def poise(
    toy: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs a command in this process, in an empty folder; the toy domain is installed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Outcome(code, *capfd.readouterr())

    return command


@pytest.fixture
def run(poise: Callable[..., Outcome], toy: str) -> Callable[..., Outcome]:
    """``poise run`` of the toy method without trackers."""
    return lambda *arguments: poise("run", toy, "--tracker", "none", *arguments)


@pytest.fixture
def mounted(tmp_path: Path, toy: str) -> Callable[..., Outcome]:
    """Runs ``poise run`` in a process that alone sees a file system mounted on the folder ``disk``, and copies that to ``kept``.

    The mount lives in a namespace of its own, so that no test can leave it behind.
    """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("this system has no unshare(1) to mount a file system for one process")
    namespace = ["unshare", "--map-root-user", "--mount"]
    able = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, text=True)
    if able.returncode != 0:
        pytest.skip(f"this system lets no test mount a file system: {able.stderr.strip()}")

    def command(options: str, *arguments: str) -> Outcome:
        script = f'mount -t tmpfs -o {options} tmpfs disk || exit 99; "$@"; code=$?; cp -a disk kept; exit $code'
        program = [sys.executable, "-m", "poise.core.lab.cli", "run", toy, "--tracker", "none", *arguments]
        done = subprocess.run(
            [*namespace, "sh", "-c", script, "sh", *program], cwd=tmp_path, capture_output=True, text=True
        )
        assert kept.is_dir(), done.stderr
        return Outcome.of(done)

    return command


@pytest.fixture
def apart(tmp_path: Path, toy: str) -> Callable[..., Outcome]:
    """``poise run`` of the toy method in a process of its own, where no type checker draws from Python's random numbers."""

    def command(*arguments: str) -> Outcome:
        program = [sys.executable, "-m", "poise.core.lab.cli", "run", toy, "--tracker", "none", *arguments]
        return Outcome.of(subprocess.run(program, cwd=tmp_path, capture_output=True, text=True))

    return command
