"""The drawing of the architecture shows what the code imports, and the walk through ``poise run`` names what is there."""

import re

import architecture
import drawing
import imports
import pytest


def arrows(svg: str) -> list[str]:
    return re.findall(r'<path class="arrow" d="([^"]+)"', svg)


def test_every_import_between_two_parts_is_an_arrow() -> None:
    assert len(arrows(drawing.svg())) == len(architecture.edges())


def test_domain_packages_import_the_core_alone() -> None:
    domains = imports.members().keys() - {"core"}
    assert {(source, target) for source, target in architecture.edges() if source in domains} == {
        (domain, "core") for domain in domains
    }
    assert architecture.member_edges() == {(domain, "core") for domain in domains}


def test_arrow_goes_when_the_import_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = arrows(drawing.svg())
    monkeypatch.setattr(drawing, "edges", lambda: architecture.edges() - {("experiments", "lab")})
    assert set(before) - set(arrows(drawing.svg())) == {drawing.ARROWS["experiments", "lab"]}


@pytest.mark.parametrize("edge", [("ot", "rl"), ("core", "experiments"), ("ot", "lab"), ("core", "ot")])
def test_import_that_nobody_foresaw_is_named(edge: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "edges", lambda: architecture.edges() | {edge})
    with pytest.raises(ValueError, match=re.escape(str(edge))):
        drawing.svg()


def test_import_that_pyproject_does_not_declare_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "imported", lambda module: ("poise.rl.catalog",) if "poise.ot" in module else ())
    with pytest.raises(ValueError, match=r"does not declare .*\('ot', 'rl'\)"):
        architecture.member_edges()


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("poise.core.lab.run", "lab"),
        ("poise.core.data", "data"),
        ("poise.core.catalog", "catalogs"),
        ("poise.ot.experiments.sparse_ot", "experiments"),
        ("poise.ot.sparse.sparse_ot", "ot"),
        ("poise.core.penalty", "core"),
    ],
)
def test_parts_follow_from_names(module: str, part: str) -> None:
    assert module in imports.modules()
    assert architecture.part(module) == part


def test_imports_lead_to_where_a_name_is_defined() -> None:
    assert imports.home("poise.core.lab", "Run") == "poise.core.lab.run"
    assert imports.home("poise.core", "taps") == "poise.core.taps"
    assert imports.home("poise.core.lab.run", "Run") == "poise.core.lab.run"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (("execute", "gone", ""), "execute.gone, which does not exist"),
        (("gone", "execute", ""), "gone.execute, which does not exist"),
        (("verify", "Job", ""), "verify.Job, which none of its steps uses"),
    ],
)
def test_step_that_is_not_there_is_named(
    step: tuple[str, str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "AFTERWARDS", (step,))
    with pytest.raises(ValueError, match=re.escape(message)):
        architecture.walk([], "./")
