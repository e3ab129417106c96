"""Run every member's fast tests as its users have it: from wheels, in an empty environment, with its own dependencies and no source.

    uv run python tools/try_wheels.py [MEMBER ...] [-- PYTEST ARGUMENTS]

Prints one line for each member: how its tests ended, and the seconds and CPU seconds that they took. Exit code 1 if one fails; its
output is shown, also if durations are asked for. Versions are the locked ones. Tests that need a library beyond the member's extra
``lab`` say so and are skipped.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = {"core": Path("shared")} | {
    folder.name: folder.relative_to(ROOT) for folder in sorted((ROOT / "packages").iterdir()) if folder.is_dir()
}
TEST_TOOLS = ("beartype", "hypothesis", "pytest", "pytest-xdist")
FIRST_STEPS = "from poise.core import *\nfrom poise.{} import *"
COUNT = re.compile(r"^\d+ (?:passed|failed|skipped|error|tests collected).* in [\d.]+s.*$", re.M)


class Outcome(NamedTuple):
    """How the tests of a member ended, and what they took."""

    code: int
    output: str
    seconds: float
    cpu_seconds: float

    def line(self, member: str) -> str:
        """One line of the report, with pytest's own count of what passed."""
        counts = COUNT.findall(self.output) or ["no test ran"]
        state = "ok    " if self.code == 0 else "FAILED"
        return f"{state}  {member:<10}  {self.seconds:5.0f} s  {self.cpu_seconds:5.0f} s CPU  {counts[-1]}"


def build(folder: Path) -> None:
    """The wheels of all members, and the locked versions of everything else."""
    subprocess.run(["uv", "build", "--quiet", "--all-packages", "--wheel", "--out-dir", folder], check=True, cwd=ROOT)
    everything = ["--all-packages", "--all-extras", "--all-groups", "--no-emit-workspace", "--no-hashes"]
    export = ["uv", "export", "--quiet", "--frozen", *everything, f"--output-file={folder / 'constraints.txt'}"]
    subprocess.run(export, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def requirements(member: str, wheels: Path) -> list[str]:
    """The wheels that a member needs, its own with the extra for experiments, and what its tests run with."""
    names = dict.fromkeys(("core", member))
    found = {name: next(wheels.glob(f"poise_{name}-*.whl")) for name in names}
    return [f"poise-{name}[lab] @ {path.as_uri()}" for name, path in found.items()] + list(TEST_TOOLS)


def lay_out(member: str, folder: Path) -> None:
    """A member's tests with the workspace's settings of pytest, but without the member's source, or anything of another member."""
    for settings in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / settings, folder)
    leave_out = shutil.ignore_patterns("src", "__pycache__")
    for part in (Path("tools"), MEMBERS[member]):
        shutil.copytree(ROOT / part, folder / part, ignore=leave_out)


def attempt(member: str, wheels: Path, folder: Path, arguments: Sequence[str]) -> Outcome:
    """Install a member into an empty environment in ``folder``, import it, list its methods, and run its tests."""
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run(["uv", "venv", "--quiet", f"--python={sys.executable}", folder / "env"], check=True)
    locked = f"--constraint={wheels / 'constraints.txt'}"
    install = ["uv", "pip", "install", "--quiet", f"--python={scripts / 'python'}", locked]
    subprocess.run([*install, *requirements(member, wheels)], check=True, cwd=folder)
    lay_out(member, folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    output = ""
    commands: tuple[tuple[str, ...], ...] = (
        ("python", "-c", FIRST_STEPS.format(member)),
        ("poise", "list", "--package", member),
        ("python", "-m", "pytest", "-q", f"{MEMBERS[member] / 'tests'}", *arguments),
    )
    for program, *options in commands:
        done = subprocess.run(
            [scripts / program, *options], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        output += done.stdout + done.stderr
        if done.returncode != 0:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(done.returncode, output, time.monotonic() - started, cpu)


def main(arguments: Sequence[str]) -> int:
    """Try the members that the arguments name, or all."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, rest = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", metavar="MEMBER", help=f"{', '.join(MEMBERS)} (default: all)")
    chosen = parser.parse_args(own).members or list(MEMBERS)
    if unknown := [member for member in chosen if member not in MEMBERS]:
        parser.error(f"there is no member {unknown[0]!r}; there are {', '.join(MEMBERS)}")
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        wheels = Path(temporary) / "wheels"
        build(wheels)
        for member in chosen:
            folder = Path(temporary) / member
            folder.mkdir()
            outcome = attempt(member, wheels, folder, rest)
            shutil.rmtree(folder / "env")
            failed += outcome.code != 0
            print(outcome.line(member), flush=True)
            if outcome.code or "--durations" in rest:
                print(outcome.output, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
