"""The drawing and the tables of docs/architecture.md, derived from pyproject.toml, from imports and from the catalogs."""

import re
from collections.abc import Iterator, Sequence

from imports import defines, imported, members, mentions, modules, project
from result_tables import Results, table

from poise.core.lab.catalogs import installed

WALKED = "ot/sparse-ot"
"""The method whose run is followed step by step."""

WALK = (
    ("cli", "main", "Reads the command line; no torch yet."),
    ("commands", "run_command", "Turns it into a request."),
    ("execute", "plan", "Checks the request, before anything runs:"),
    ("catalogs", "find", "looks the method up in the catalogs that installed packages announce under `poise.domains`;"),
    ("catalogs", "load_experiment", "imports the experiment that the catalog record names;"),
    ("settings", "override", "puts `--set` into the settings of the preset;"),
    (
        "fingerprint",
        "fingerprint",
        "hashes the code that the experiment reaches, so that a run resumes with its own code.",
    ),
    ("execute", "execute", "Goes through the arms; a finished one is kept."),
    ("run", "Run", "Gives an arm its seed, device, log, figures and checkpoints."),
)
"""Steps of ``poise run`` inside the lab before the experiment has its turn: module of the lab, name in it, what it does."""

AFTERWARDS = (("report", "write_report", "Writes `report.html` from what lies in the folder of the run."),)
"""Steps after the last arm."""


def part(module: str) -> str:
    """The part of the drawing that a module belongs to: a domain, or ``core``, ``data``, ``lab``, ``catalogs``, ``experiments``."""
    _, package, *inner = module.split(".")
    if package == "core" and inner[:1] in (["lab"], ["data"]):
        return inner[0]
    if inner[:1] in (["catalog"], ["experiments"]):
        return inner[0].rstrip("s") + "s"
    return package


def edges() -> set[tuple[str, str]]:
    """Which part imports which. A method that imports poise.core.data counts as importing the core."""
    found = set()
    for module in modules():
        for other in imported(module):
            source, target = part(module), part(other)
            if target == "data" and source != "experiments":
                target = "core"
            if source == "data":
                source = "core"
            if source != target and (source, target) != ("core", "data"):
                found.add((source, target))
    return found


def member_edges() -> set[tuple[str, str]]:
    """Which member depends on which, by pyproject.toml.

    Raises:
        ValueError: a member imports another one that it does not declare.
    """
    names = {f"poise-{package}": package for package in members()}
    declared = {(one, names[other]) for one in members() for other in _requires(one) if other in names}
    used = {(one.split(".")[1], other.split(".")[1]) for one in modules() for other in imported(one)}
    if undeclared := {edge for edge in used - declared if edge[0] != edge[1]}:
        raise ValueError(f"pyproject.toml does not declare what the code imports: {sorted(undeclared)}")
    return declared


def _requires(package: str) -> list[str]:
    """The names of what a member depends on, without extras and versions."""
    return [re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in project(package)["dependencies"]]


def packages(everything: Sequence[Results], docs: str) -> str:
    """What every member depends on, and what it holds."""
    between = member_edges()
    rows = []
    for package in members():
        own = [f"poise-{other}" for one, other in sorted(between) if one == package]
        libraries = [name for name in _requires(package) if name not in own]
        titles = [f"[{m.title}]({docs}methods/{m.name}.md)" for m in installed().values() if m.package == package]
        rows.append((f"`poise-{package}`", "; ".join(titles) or "–", ", ".join(own) or "–", ", ".join(libraries)))
    return table(("package", "methods", "depends on", "and on"), rows)


def walk(everything: Sequence[Results], docs: str) -> str:
    """What happens in ``poise run``, step by step, from the script's entry point to the report."""
    rows = [(str(number), f"`{where}`", what) for number, (where, what) in enumerate(_steps(), start=1)]
    return table(("", "where", "what happens"), rows)


def _steps() -> Iterator[tuple[str, str]]:
    method = installed()[WALKED]
    yield "shared/pyproject.toml", f"The script `poise` is `{project('core')['scripts']['poise']}`."
    for module, name, what in WALK:
        yield _checked(f"poise.core.lab.{module}", name), what
        if name == "find":
            yield (
                _checked(f"poise.{method.package}.catalog", "METHODS"),
                f"here it finds the record of `{method.name}`;",
            )
        if name == "load_experiment":
            yield _checked(method.experiment, "EXPERIMENT"), "here the presets, arms, claims and functions are;"
    yield f"{_checked(method.experiment, 'EXPERIMENT')}.run", "The loop of one arm, in the open. It uses"
    beside = _reach([method.experiment], "experiments")
    direct = {name for module in beside for name in imported(module)}
    below = {name for module in _reach([*direct], method.package) for name in imported(module)}
    for names, what in (
        ({name for name in direct if part(name) == "data"}, "real data that ships with packages,"),
        (beside - {method.experiment}, "what lies beside the experiment: other presets, measures, figures,"),
        ({name for name in direct if part(name) == method.package}, "the method,"),
        ({name for name in direct | below if part(name) == "core"}, "and blocks of the core."),
    ):
        if names:
            yield "`<br>`".join(sorted(names)), what
    yield f"{_checked(method.experiment, 'EXPERIMENT')}.compare", "Draws the figures that need several arms."
    for module, name, what in AFTERWARDS:
        yield _checked(f"poise.core.lab.{module}", name), what


def _reach(start: Sequence[str], kind: str) -> set[str]:
    """The modules ``start``, and those of one part that they reach within it."""
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        if (module := waiting.pop()) not in seen:
            seen.add(module)
            waiting += [name for name in imported(module) if part(name) == kind]
    return seen


def _checked(module: str, name: str) -> str:
    """``module.name``, which must exist and, in the lab, be used by a step of the walk.

    Raises:
        ValueError: it is not so.
    """
    if module not in modules() or not defines(module, name):
        raise ValueError(f"the walk through `poise run` names {module}.{name}, which does not exist")
    callers = [f"poise.core.lab.{step}" for step, *_ in WALK]
    called = name == "main" or name.endswith("_command") or any(mentions(caller, name) for caller in callers)
    if part(module) == "lab" and not called:
        raise ValueError(f"the walk through `poise run` names {module}.{name}, which none of its steps uses")
    return f"{module}.{name}"
