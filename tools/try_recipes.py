"""Run every recipe of docs/guides/recipes.md as a new user would: in an empty environment, with what the recipe installs as wheels.

uv run python tools/try_recipes.py [words of a title]

Exit code 1 if a recipe fails; its output is shown.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/guides/recipes.md"
SECTION = re.compile(
    r"^## (?P<title>.+?)\n.*?```sh\npip install (?P<needs>[^\n]+)\n```.*?```python\n(?P<code>.*?)^```$", re.S | re.M
)


class Recipe(NamedTuple):
    """One section of the page: its title, what it installs, and its code."""

    title: str
    needs: list[str]
    code: str


def recipes(page: str) -> list[Recipe]:
    """The recipes of the page.

    Raises:
        ValueError: a section lacks the block that installs or the one that runs.
    """
    found = [Recipe(match["title"], match["needs"].split(), match["code"]) for match in SECTION.finditer(page)]
    if len(found) != page.count("\n## "):
        raise ValueError(f"{PAGE.name} has {page.count(chr(10) + '## ')} sections, but {len(found)} with both blocks")
    return found


def wheel_of(need: str, wheels: Path) -> str:
    """The wheel of a folder of the workspace; anything else is left to the package index."""
    if not need.startswith("./"):
        return need
    name = "core" if need == "./shared" else need.rpartition("/")[2]
    (wheel,) = wheels.glob(f"poise_{name}-*.whl")
    return str(wheel)


def attempt(recipe: Recipe, wheels: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Install and run one recipe in ``folder``."""
    environment, script = folder / "env", folder / "recipe.py"
    script.write_text(recipe.code, encoding="utf-8")
    python = str(environment / "bin/python")
    subprocess.run(["uv", "venv", "--quiet", environment], check=True)
    needs = [wheel_of(need, wheels) for need in recipe.needs]
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, *needs], check=True, cwd=folder)
    return subprocess.run([python, str(script)], cwd=folder, capture_output=True, text=True, check=False)


def main(words: str) -> int:
    """Try the recipes whose titles contain the words."""
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        wheels = Path(temporary) / "wheels"
        build = ["uv", "build", "--quiet", "--all-packages", "--wheel", "--out-dir", str(wheels)]
        subprocess.run(build, check=True, cwd=ROOT)
        for number, recipe in enumerate(recipes(PAGE.read_text(encoding="utf-8"))):
            if words.lower() not in recipe.title.lower():
                continue
            folder = Path(temporary) / str(number)
            folder.mkdir()
            result = attempt(recipe, wheels, folder)
            failed += result.returncode != 0
            print(f"{'ok    ' if result.returncode == 0 else 'FAILED'}  {recipe.title}", flush=True)
            if result.returncode:
                print(result.stdout + result.stderr, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
