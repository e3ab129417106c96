"""Lay out a new method: skeletons of everything that it consists of, failing until they are filled.

    uv run python tools/new_method.py PACKAGE SLUG [--family FOLDER]

Writes the method, its experiment, tests, benchmark and notes; enters it in the package's catalog, names and samples.
What is to be written by hand is marked FILL IN; a test finds what is left. Nothing that exists is overwritten.
"""

import argparse
import ast
import keyword
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"
PACKAGES = ("core", "generative", "medical", "ot", "rl", "science", "vision")
TAKEN_FAMILIES = ("catalog", "experiments", "lab")


class BadInput(ValueError):
    """What was asked for cannot be done; the message is one line."""


@dataclass(frozen=True)
class Plan:
    """Where everything of a new method goes.

    Attributes:
        root: of the workspace.
        package: the package's short name, ``ot``.
        slug: the method's name on the command line, ``monge-gap``.
        family: the folder of its module, below the package.
    """

    root: Path
    package: str
    slug: str
    family: str

    @property
    def name(self) -> str:
        return self.slug.replace("-", "_")

    @property
    def class_name(self) -> str:
        return "".join(part.capitalize() for part in self.slug.split("-"))

    @property
    def member(self) -> Path:
        return self.root / ("shared" if self.package == "core" else f"packages/{self.package}")

    @property
    def source(self) -> Path:
        return self.member / "src/poise" / self.package

    @property
    def new(self) -> dict[Path, str]:
        """The files to write, with their text."""
        return {
            self.source / self.family / f"{self.name}.py": self.fill("method.py.txt"),
            self.source / "experiments" / f"{self.name}.py": self.fill("experiment.py.txt"),
            self.member / "tests" / f"test_{self.name}.py": self.fill("test.py.txt"),
            self.member / "benchmarks" / f"bench_{self.name}.py": self.fill("bench.py.txt"),
            self.root / "docs/methods" / self.package / f"{self.slug}.notes.md": self.fill("notes.md.txt"),
        }

    @property
    def changed(self) -> dict[Path, str]:
        """The files to add to, with their new text."""
        module = f"poise.{self.package}.{self.family}.{self.name}"
        names = self.source / "__init__.pyi"
        catalog, samples = self.source / "catalog.py", self.member / "tests/samples.py"
        known = _read(samples) if samples.exists() else self.fill("samples.py.txt")
        listed = _read(catalog)
        if self.package != "core":  # whose catalog defines the records
            listed = add_imports(listed, "from poise.core.catalog import Headline, Method\n")
        public = [f"from {module} import {name} as {name}\n" for name in (self.class_name, self.name)]
        imports = f"from poise.core.testing import Sample, randn\nfrom poise.{self.package} import {self.class_name}\n"
        return {
            names: _read(names) + "".join(public),
            catalog: append(listed, "METHODS", self.fill("catalog_entry.py.txt"), catalog),
            samples: add_imports(append(known, "SAMPLES", self.fill("sample_entry.py.txt"), samples), imports),
        }

    @property
    def next_steps(self) -> str:
        """What to run while filling the skeletons, and after."""
        test = self.member.relative_to(self.root) / "tests" / f"test_{self.name}.py"
        laws = "tests/test_contract.py tests/test_catalogs.py tests/test_snippets.py"
        words = " or ".join(dict.fromkeys((self.name, self.slug)))
        return (
            "Everything marked FILL IN is yours to write. While you do, these say what is left of this method alone:\n"
            f'    uv run pytest -n 0 {test} {laws} -k "{words}"\n'
            f"    uv run poise run {self.package}/{self.slug}\n"
            "Then come the page and the tables, and everything that must pass:\n"
            "    uv run python tools/refresh_results.py\n"
            "    bash .ci/run"
        )

    def fill(self, template: str) -> str:
        """A template with this method's names."""
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        return Template(text).substitute(
            package=self.package, slug=self.slug, name=self.name, class_name=self.class_name, family=self.family
        )


def plan(root: Path, package: str, slug: str, family: str) -> Plan:
    """Check the names and that nothing of that name exists.

    Raises:
        BadInput: a name is not allowed, or taken.
    """
    made = Plan(root, package, slug, family)
    if package not in PACKAGES or not made.source.is_dir():
        raise BadInput(f"there is no package {package!r}; there are {', '.join(PACKAGES)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug) or keyword.iskeyword(made.name):
        raise BadInput(f"a slug is lower-case words joined by hyphens, such as monge-gap; got {slug!r}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", family) or keyword.iskeyword(family) or family in TAKEN_FAMILIES:
        raise BadInput(
            f"a family is a folder name such as penalties, and none of {', '.join(TAKEN_FAMILIES)}; got {family!r}"
        )
    if f'"{slug}"' in _read(made.source / "catalog.py"):
        raise BadInput(f"{package}/{slug} is in the catalog already")
    if existing := [path for path in made.new if path.exists()]:
        raise BadInput(f"{existing[0].relative_to(root)} exists already")
    return made


def append(source: str, variable: str, entry: str, path: Path) -> str:
    """Put an entry at the end of the tuple that ``variable`` is set to.

    Raises:
        BadInput: there is no such assignment.
    """
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name == variable:
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if name == variable:
                pass
            case _:
                continue
        statement, known = ast.get_source_segment(source, node) or "", ast.get_source_segment(source, value) or ""
        before = known.removesuffix(")").rstrip(", \n") if isinstance(value, ast.Tuple) else f"(*({known})"
        comma = "" if before == "(" else ","
        longer = f"{statement.removesuffix(known)}{before}{comma}\n{entry.rstrip()}\n)"
        return source.replace(statement, longer)
    raise BadInput(f"{path} sets no {variable}")


def add_imports(source: str, imports: str) -> str:
    """Put imports below the module's docstring; ruff sorts them."""
    body = ast.parse(source).body
    first = body[0].end_lineno if isinstance(body[0], ast.Expr) else 0
    lines = source.splitlines(keepends=True)
    return "".join(lines[:first]) + f"\n{imports}" + "".join(lines[first:])


def write(made: Plan) -> list[Path]:
    """Write everything; returns the files in the order in which to fill them."""
    files = {**made.new, **made.changed}  # all texts exist before the first file is touched
    for folder, purpose in (
        (made.family, "FILL IN: what these methods have in common."),
        ("experiments", "Experiments."),
    ):
        init = made.source / folder / "__init__.py"
        if not init.exists():
            files[init] = f'"""{purpose}"""\n'
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    python = [str(path) for path in files if path.suffix in (".py", ".pyi")]
    for tidy in (["check", "--select", "I", "--fix"], ["format"]):
        subprocess.run([sys.executable, "-m", "ruff", *tidy, "--quiet", *python], check=True)
    return list(files)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"new_method: {message}\n")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Lay out the method that the arguments name; returns the exit code."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", metavar="PACKAGE", help=", ".join(PACKAGES))
    parser.add_argument("slug", metavar="SLUG", help="the method's name, such as monge-gap")
    parser.add_argument(
        "--family",
        default="penalties",
        metavar="FOLDER",
        help="folder of its module, of relatives or new (default: penalties)",
    )
    options = parser.parse_args(arguments)
    try:
        made = plan(root, options.package, options.slug, options.family)
        files = write(made)
    except BadInput as error:
        print(f"new_method: {error}", file=sys.stderr)
        return 2
    for path in files:
        print(path.relative_to(root))
    print(f"\n{made.next_steps}")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
