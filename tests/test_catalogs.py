"""What the catalogs promise is there: every entry point loads, every record is true, and reading them costs no torch."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import get_args

import pytest

from poise.core.catalog import Kind, Method
from poise.core.lab import catalogs
from poise.core.lab.experiment import Experiment

ROOT = Path(__file__).parents[1]
MEMBERS = {"core": ROOT / "shared"} | {
    path.name: path for path in sorted((ROOT / "packages").iterdir()) if path.is_dir()
}
METHODS = [method for point in entry_points(group="poise.domains") if point.name in MEMBERS for method in point.load()]

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_member = pytest.mark.parametrize("package", MEMBERS)


def experiment(method: Method) -> Experiment:
    return importlib.import_module(method.experiment).EXPERIMENT


@every_member
def test_a_member_registers_its_own_methods(package: str) -> None:
    points = [point for point in entry_points(group="poise.domains") if point.name == package]
    assert [point.value for point in points] == [f"poise.{package}.catalog:METHODS"]
    assert all(isinstance(method, Method) and method.package == package for method in points[0].load())


@every_member
def test_a_member_is_named_like_its_package(package: str) -> None:
    project = tomllib.loads((MEMBERS[package] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == f"poise-{package}"


@every_member
def test_importing_a_member_and_its_catalog_imports_no_torch(package: str) -> None:
    assert "torch" not in imported_by(f"import poise.{package}, poise.{package}.catalog")


def test_importing_the_command_line_imports_no_torch() -> None:
    assert "torch" not in imported_by("import poise.core.lab.cli, poise.core.lab.commands")


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after ``code``."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(shown.stdout.split())


def test_slugs_are_unique_and_spelled_alike() -> None:
    slugs = [method.slug for method in METHODS]
    assert len(slugs) == len(set(slugs))
    assert [slug for slug in slugs if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)] == []


@every_method
def test_a_record_is_filled_in(method: Method) -> None:
    assert [name for name, value in vars(method).items() if not value and name != "tags"] == []
    assert method.kind in get_args(Kind)
    assert method.url.startswith("https://")
    assert not method.formula.startswith("$")


@every_method
def test_the_headline_is_an_outcome_claim_of_the_experiment(method: Method) -> None:
    headline = method.headline
    wanted = (headline.metric, headline.arm, headline.versus)
    found = [
        claim
        for claim in experiment(method).claims
        if (claim.metric, claim.arm, claim.versus) == wanted and headline.preset in claim.presets
    ]
    assert [claim.kind for claim in found] == ["outcome"]
    assert not (headline.unit and found[0].scale == "ratio"), "a ratio has no unit"


@every_method
def test_the_api_names_public_objects_that_say_what_they_are(method: Method) -> None:
    for name in method.api:
        module, _, attribute = name.rpartition(".")
        public = importlib.import_module(module)
        assert attribute in public.__all__, f"{name} is not exported by {module}"
        assert getattr(public, attribute).__doc__, f"{name} has no docstring"


@every_method
def test_the_usage_parses_and_uses_the_api(method: Method) -> None:
    ast.parse(method.usage)
    assert any(name.rpartition(".")[2] in method.usage for name in method.api)


@every_method
def test_bibtex_is_one_complete_entry(method: Method) -> None:
    entry = method.bibtex.strip()
    assert re.match(r"@(article|inproceedings|misc|phdthesis|book|incollection|techreport)\{[^\s,{}]+,", entry)
    assert closes_at_the_end(entry)
    assert {"title", "author", "year"} <= set(re.findall(r"(\w+)\s*=\s*[{\"\d]", entry.lower()))


def closes_at_the_end(entry: str) -> bool:
    """Whether the first brace of ``entry`` closes at its last character."""
    depth, closed = 0, []
    for index, character in enumerate(entry):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "}" and depth == 0:
            closed.append(index)
    return closed == [len(entry) - 1]


def test_bibtex_keys_are_unique_to_an_entry() -> None:
    entries: dict[str, str] = {}
    for method in METHODS:
        key = method.bibtex.partition("{")[2].partition(",")[0]
        assert entries.setdefault(key, method.bibtex.strip()) == method.bibtex.strip(), f"two entries are called {key}"


@every_method
def test_presets_and_arms_are_those_of_the_experiment(method: Method) -> None:
    found = experiment(method)
    assert found.method == method.name
    assert tuple(found.presets) == method.presets
    assert tuple(found.arms) == method.arms
    assert method.presets[0] == "quick"
    assert method.arms[0] == "baseline"


@every_method
def test_a_claim_of_each_method_is_about_its_mechanism(method: Method) -> None:
    claims = [claim for claim in experiment(method).claims if "quick" in claim.presets]
    assert any(claim.kind == "mechanism" for claim in claims)
    assert all(claim.source for claim in claims)


@every_method
def test_a_method_has_all_its_proofs(method: Method) -> None:
    member, name = MEMBERS[method.package], method.slug.replace("-", "_")
    source = member / "src" / "poise" / method.package
    samples = (member / "tests" / "samples.py").read_text(encoding="utf-8")
    missing = {
        "sample": f'"{name}/' in samples or f'"{name}"' in samples,
        "tests": any((member / "tests").glob(f"test_{name}*.py")),
        "benchmark": (member / "benchmarks" / f"bench_{name}.py").is_file(),
        "experiment": (source / "experiments" / f"{name}.py").is_file(),
        "method": any(path.stem == name for path in source.rglob(f"{name}*") if "experiments" not in path.parts),
    }
    assert [proof for proof, there in missing.items() if not there] == []


def test_the_command_line_lists_every_method() -> None:
    assert {method.name for method in METHODS} <= set(catalogs.installed())
