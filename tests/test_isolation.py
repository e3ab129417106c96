"""Each member stands alone: installed from its wheel with its declared dependencies and nothing else, it works."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMBERS = {"core": ROOT / "shared"} | {
    path.name: path for path in sorted((ROOT / "packages").iterdir()) if path.is_dir()
}

Install = Callable[..., Path]

INVENTORY = """
import json, re
from importlib.metadata import distributions
required = {d.name.lower(): [re.match(r"[\\w.-]+", each)[0].lower() for each in d.requires or ()] for d in distributions()}
brought = {each for name, needs in required.items() if not name.startswith("poise") for each in needs}
print(json.dumps([list(required), list(brought)]))
"""
"""Prints the names of all distributions, and those that others than poise's ask for."""

pytestmark = pytest.mark.xdist_group("one environment for all members, which takes its time to make")


def declared(package: str) -> set[str]:
    """The names of a member's own dependencies, without those that are members."""
    project = tomllib.loads((MEMBERS[package] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", dependency)[0].lower() for dependency in project["dependencies"]}  # type: ignore[index]
    return names - {f"poise-{member}" for member in MEMBERS}


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Makes an environment hold one member, built as a wheel, with locked versions from uv's cache; returns its scripts' folder.

    All members take turns in one environment (what the next one does not need is removed), so that torch is compiled once.
    """
    uv = shutil.which("uv")
    if uv is None:
        pytest.fail("uv is not on PATH; install it (python -m pip install uv) to check that members stand alone")
    environment = tmp_path_factory.mktemp("isolated") / "venv"

    def sync(package: str, *extras: str) -> Path:
        settings = os.environ | {"UV_PROJECT_ENVIRONMENT": str(environment)}
        options = [
            f"--package=poise-{package}",
            *(f"--extra={extra}" for extra in extras),
            f"--python={sys.executable}",
        ]
        # uv would take a wheel that it built before from its cache, because it looks for changes in pyproject.toml only
        options += ["--reinstall-package=poise-core", f"--reinstall-package=poise-{package}"]
        run(uv, "sync", "--quiet", "--frozen", "--no-editable", "--no-default-groups", *options, cwd=ROOT, env=settings)
        return environment / ("Scripts" if os.name == "nt" else "bin")

    return sync


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command; fails the test with what it wrote when it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@pytest.mark.parametrize("package", MEMBERS)
def test_a_member_works_alone(package: str, install: Install, tmp_path: Path) -> None:
    scripts = install(package)
    listed = json.loads(run(scripts / "poise", "list", "--json", cwd=tmp_path).splitlines()[-1])
    assert {method["package"] for method in listed} <= {"core", package}
    run(scripts / "python", "-c", f"from poise.core import *\nfrom poise.{package} import *", cwd=tmp_path)
    there, brought = json.loads(run(scripts / "python", "-c", INVENTORY, cwd=tmp_path))
    assert {name for name in there if name.startswith("poise")} == {"poise-core", f"poise-{package}"}
    assert declared(package) <= set(there)
    foreign = set().union(*(declared(member) for member in MEMBERS)) - declared("core") - declared(package)
    assert set(there) & foreign <= set(brought)


@pytest.mark.parametrize("package", MEMBERS)
def test_experiments_need_nothing_but_the_lab_extra(package: str, install: Install, tmp_path: Path) -> None:
    experiments = sorted((MEMBERS[package] / "src/poise" / package / "experiments").glob("[!_]*.py"))
    if not experiments:
        pytest.skip(f"poise.{package} has no experiment yet")
    scripts = install(package, "lab")
    imports = "\n".join(f"import poise.{package}.experiments.{path.stem}" for path in experiments)
    run(scripts / "python", "-c", imports, cwd=tmp_path)
