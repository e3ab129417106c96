"""The generated part of the documentation says what the catalogs and the result files say, and is up to date."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import refresh_results
import result_tables

from poise.core.catalog import Headline, Method
from poise.core.lab.catalogs import installed

ROOT = Path(refresh_results.ROOT)

GAP = Method(
    slug="gap",
    package="ot",
    title="Gap",
    kind="penalty",
    problem="learn a map for a cost of my choice",
    summary="adds the distance to the best map.",
    formula=r"\mathcal{M}(T) \ge 0",
    usage="import torch\nprint(torch.ones(2))",
    api=("poise.ot.gap", "poise.ot.Gap"),
    presets=("quick", "paper"),
    arms=("baseline", "gap"),
    headline=Headline(
        promise="the map is nearer to the best one",
        metric="exact_gap",
        arm="gap",
        step="n = 1,024",
        peer="ott-jax",
        peer_case="n = 1,024",
    ),
    paper="A. Author, Gaps, ICML 2023",
    url="https://example.org/gaps",
    bibtex="@inproceedings{gaps,\n  title = {Gaps},\n}",
    tags=("transport", "maps"),
)

CLAIM: dict[str, Any] = {
    "kind": "mechanism",
    "metric": "exact_gap",
    "arm": "gap",
    "versus": "baseline",
    "direction": "lower",
    "scale": "ratio",
    "margin": 10.0,
    "effect": 61.24,
    "ci": [40.0, 92.5],
    "verdict": "holds",
    "source": "section 4",
    "note": "holds on every seed",
}

VERDICT = {
    "method": "ot/gap",
    "preset": "quick",
    "seeds": [0, 1, 2, 3, 4],
    "claims": [
        CLAIM,
        CLAIM | {"metric": "error", "kind": "outcome", "scale": "difference", "margin": 0.0, "verdict": "undecided"},
    ],
    "arms": {
        "baseline": {"exact_gap": [1.0, 2.0, 3.0, 2.0, 2.0]},
        "gap": {"exact_gap": [0.01, 0.03, 0.02, 0.02, 0.02]},
    },
    "environment": {"python": "3.11.9", "torch": "2.15.0", "accelerator": None},
    "seconds": 123.4,
}

COST = {
    "method": "ot/gap",
    "cases": [
        {"name": "n = 256", "plain_ms": 2.0, "method_ms": 3.0, "ratio": 1.5, "plain_mb": 1.25, "method_mb": None},
        {"name": "n = 1,024", "plain_ms": 20.0, "method_ms": 46.0, "ratio": 2.3, "plain_mb": 4.0, "method_mb": 9.0},
    ],
    "peers": [
        {
            "peer": "ott-jax",
            "version": "0.6.0",
            "case": "n = 1,024",
            "ours_ms": 10.0,
            "peer_ms": 34.0,
            "speedup": 3.4,
            "agreement": 2.5e-7,
        }
    ],
    "environment": {"python": "3.11.9"},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Every file that holds a block, without content, and the results of one method."""
    for name, blocks in refresh_results.BLOCKS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "by hand\n" + "".join(f"<!-- begin {block} -->\n<!-- end {block} -->\n" for block in blocks) + "by hand\n"
        )
    for name, content in {
        "results/ot/gap.json": json.dumps(VERDICT),
        "results/ot/gap.bench.json": json.dumps(COST),
        "results/ot/gap.png": "picture",
        "methods/ot/gap.notes.md": "## Where paper and released code differ\n\nNowhere.\n",
    }.items():
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def rendered(root: Path, *methods: Method) -> dict[str, str]:
    pages = refresh_results.render(root, [result_tables.read(method, root / "docs") for method in methods])
    return {path.relative_to(root).as_posix(): text for path, text in pages.items()}


def test_committed_pages_and_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    code = refresh_results.main(["--check"])
    assert code == 0, f"run `uv run python tools/refresh_results.py`:\n{capsys.readouterr().out}"


def test_method_page_holds_everything_about_the_method(workspace: Path) -> None:
    page = rendered(workspace, GAP)["docs/methods/ot/gap.md"]
    for part in (
        "# Gap\n",
        "**Learn a map for a cost of my choice.** Adds the distance to the best map.",
        "`ot/gap` · a term to add to the loss · transport · maps",
        "$$\n\\mathcal{M}(T) \\ge 0\n$$",
        "```python\nimport torch\nprint(torch.ones(2))\n```",
        "pip install ./shared ./packages/ot",
        "](../../results/ot/gap.png)",
        "uv run poise run ot/gap",
        "`baseline` and `gap`",
        "--preset paper",
        "Verdicts over 5 seeds",
        "| mechanism | `exact_gap` is lower with `gap` than with `baseline`, by more than 10× | 61.2× [40×, 92.5×] |",
        "- `exact_gap` of `gap`: holds on every seed",
        "| `exact_gap` | 2\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.707 | 0.02\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.00707 |",
        "(123 s; python 3.11.9, torch 2.15.0)",
        "| n = 256 | 2 ms | 3 ms | 1.5× | 1.25 MB | – |",
        "| ott-jax 0.6.0 | n = 1,024 | 10 ms | 34 ms | 3.4× | 2.5e-07 |",
        '--8<-- "docs/methods/ot/gap.notes.md"',
        "::: poise.ot.gap\n",
        "::: poise.ot.Gap\n",
        "[A. Author, Gaps, ICML 2023](https://example.org/gaps)",
        "```bibtex\n@inproceedings{gaps,",
    ):
        assert part in page, part


def test_page_and_counts_hold_the_claims_of_every_preset(workspace: Path) -> None:
    refuted = CLAIM | {"verdict": "refuted", "metric": "long_run"}
    for name, content in {"paper.json": json.dumps(VERDICT | {"claims": [refuted]}), "paper.png": "picture"}.items():
        (workspace / f"docs/results/ot/gap.{name}").write_text(content)
    pages = rendered(workspace, GAP)
    page = pages["docs/methods/ot/gap.md"]
    assert "### Verdicts of the preset `paper` over 5 seeds" in page
    assert "](../../results/ot/gap.paper.png)" in page
    assert "`uv run poise verify ot/gap --preset paper --seeds 5`" in page
    assert "| `long_run` is lower with `gap`" in page
    assert "3 claims: 1 holds, 1 undecided, 1 refuted." in pages["README.md"]
    assert "| 1 of 3 hold, 1 refuted |" in pages["docs/index.md"].replace("\N{NO-BREAK SPACE}", " ")


def test_method_without_results_says_so(workspace: Path) -> None:
    page = rendered(workspace, replace(GAP, slug="bare", presets=("quick",)))["docs/methods/ot/bare.md"]
    assert "No verdict is published yet." in page
    assert "No benchmark is published yet." in page
    assert "--8<--" not in page
    assert ".png" not in page
    assert "--preset paper" not in page


def test_method_of_the_core_installs_the_core_alone(workspace: Path) -> None:
    page = rendered(workspace, replace(GAP, package="core"))["docs/methods/core/gap.md"]
    assert "`pip install ./shared`" in page


def test_tables_link_to_the_method_from_where_they_stand(workspace: Path) -> None:
    pages = rendered(workspace, GAP)
    row = "the map is nearer to the best one | **61.2×** [40×, 92.5×] | ✓ holds | 1 of 2 hold | 2.3× | 3.4× ott-jax |"
    for page, docs in (("README.md", "docs"), ("docs/index.md", "."), ("docs/results.md", ".")):
        assert f"| [Gap]({docs}/methods/ot/gap.md) | {row}" in pages[page].replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "[![What the experiment of Gap shows](../results/ot/gap.png)](../methods/ot/gap.md)"
        in pages["docs/methods/index.md"]
    )
    assert (
        "| Learn a map for a cost of my choice. | [Gap](./methods/ot/gap.md) | a term to add to the loss |"
        in pages["docs/choose.md"]
    )
    assert "1 method, 1 of them verified so far; 2 claims: 1 holds, 1 undecided." in pages["docs/results.md"]
    assert "`ot/gap` Gap" in pages["packages/ot/README.md"]
    assert "No method has landed" in pages["packages/rl/README.md"]


def test_usage_of_the_featured_method_greets_the_reader(workspace: Path) -> None:
    package, slug = refresh_results.FEATURED.split("/")
    pages = rendered(workspace, GAP, replace(GAP, package=package, slug=slug, usage="import featured"))
    assert "```python\nimport featured\n```" in pages["README.md"]
    assert "```python\nimport featured\n```" in pages["docs/index.md"]


def test_pictures_that_greet_the_reader_are_there_and_say_what_to_see(workspace: Path) -> None:
    name = next(iter(refresh_results.SHOWN))
    package, slug = name.split("/")
    (workspace / "docs/results" / package).mkdir(exist_ok=True)
    (workspace / f"docs/results/{name}.png").write_text("picture")
    pages = rendered(workspace, GAP, replace(GAP, package=package, slug=slug))
    for page, docs in (("README.md", "docs"), ("docs/index.md", ".")):
        assert f"({docs}/results/{name}.png)]({docs}/methods/{name}.md)" in pages[page]
        assert refresh_results.SHOWN[name] in pages[page]
        assert f"uv run poise run {name}\n" in pages[page]
        assert f"{docs}/results/ot/gap.png" not in pages[page]
    assert all((ROOT / f"docs/results/{name}.png").is_file() for name in refresh_results.SHOWN)


def test_results_list_what_did_not_hold_and_fold_the_rest(workspace: Path) -> None:
    page = rendered(workspace, GAP)["docs/results.md"]
    open_ones = page.partition("<!-- begin unproven -->")[2].partition("<!-- end unproven -->")[0]
    row = "`error` is lower with `gap` than with `baseline` | 61.2 [40,\N{NO-BREAK SPACE}92.5] | · undecided |"
    assert f"| [Gap](./methods/ot/gap.md) | {row}" in open_ones
    assert "✓ holds" not in open_ones
    for summary in ("Claims: 1 holds, 1 undecided", "Time and memory: 2 cases", "Other implementations: 1 comparison"):
        assert f"<details markdown>\n<summary>{summary}</summary>\n\n|" in page


@pytest.mark.parametrize("method", installed().values(), ids=lambda method: method.name)
def test_headline_names_what_was_verified_and_timed(method: Method) -> None:
    results = result_tables.read(method, ROOT / "docs")
    assert (results.headline is None) == (method.headline.preset not in results.verdicts)
    assert (results.step is None) == (results.cost is None)
    assert (results.peer is None) == (results.cost is None or not results.cost["peers"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "nothing"}, r"ot/gap: the headline \('nothing', 'gap', 'baseline'\) is not among"),
        ({"step": "n = 3"}, r"ot/gap: the catalog names \{'name': 'n = 3'\}, which is not among the cases"),
        ({"peer_case": "n = 3"}, "which is not among the peers of the benchmark"),
    ],
)
def test_headline_that_is_not_there_is_named(workspace: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(workspace, replace(GAP, headline=replace(GAP.headline, **wrong)))


@pytest.mark.parametrize(
    ("headline", "claim", "text"),
    [
        ({}, {}, "**61.2×** [40×, 92.5×]"),
        (
            {"unit": "points", "factor": 100.0},
            {"scale": "difference", "direction": "higher", "effect": 0.0123, "ci": [-1e-7, 0.5]},
            "**+1.23** points [−1e-05, 50]",
        ),
        ({}, {"scale": "difference", "effect": 2.0, "ci": [1.0, 4.0]}, "**−2** [−4, −1]"),
        ({}, {"scale": "difference", "effect": -2.0, "ci": [-4.0, -1.0], "verdict": "refuted"}, "**+2** [1, 4]"),
        ({"versus": None}, {"scale": "difference", "versus": None, "effect": 2.0, "ci": [1.0, 4.0]}, "**2** [1, 4]"),
    ],
)
def test_headline_is_measured_in_the_direction_of_the_metric(
    headline: dict[str, Any], claim: dict[str, Any], text: str
) -> None:
    method = replace(GAP, headline=replace(GAP.headline, **headline))
    verdicts = {"quick": VERDICT | {"claims": [CLAIM | claim]}}
    results = result_tables.Results(method, verdicts, cost=None, figures=(), notes=False)
    assert result_tables.measured(results).replace("\N{NO-BREAK SPACE}", " ") == text


def test_hand_written_text_around_blocks_is_kept(workspace: Path) -> None:
    for name, text in rendered(workspace, GAP).items():
        if name in refresh_results.BLOCKS:
            assert text.startswith("by hand\n"), name
            assert text.endswith("by hand\n"), name


def test_missing_marker_is_named(workspace: Path) -> None:
    (workspace / "docs/choose.md").write_text("# Choose\n")
    with pytest.raises(ValueError, match=r"choose\.md must hold one block between <!-- begin choose -->"):
        rendered(workspace, GAP)


def test_check_finds_changed_and_orphaned_pages_and_writing_mends_them(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh_results, "installed", lambda: {GAP.name: GAP})
    assert refresh_results.main(["--check"], root=workspace) == 1
    assert refresh_results.main([], root=workspace) == 0
    assert refresh_results.main(["--check"], root=workspace) == 0
    page = workspace / "docs/methods/ot/gap.md"
    orphan = workspace / "docs/methods/rl/gone.md"
    page.write_text(page.read_text().replace("Gap", "Cap"))
    orphan.parent.mkdir()
    orphan.write_text("# Gone\n")
    capsys.readouterr()
    assert refresh_results.main(["--check"], root=workspace) == 1
    assert capsys.readouterr().out.splitlines() == [
        "out of date: docs/methods/ot/gap.md",
        "out of date: docs/methods/rl/gone.md",
    ]
    assert refresh_results.main([], root=workspace) == 0
    assert refresh_results.main(["--check"], root=workspace) == 0
    assert not orphan.exists()


@pytest.mark.parametrize(
    ("claim", "sentence", "effect"),
    [
        ({}, "`exact_gap` is lower with `gap` than with `baseline`, by more than 10×", "61.2× [40×, 92.5×]"),
        (
            {"scale": "difference", "direction": "higher", "margin": 0.0, "effect": 0.0123, "ci": [-1e-5, 0.5]},
            "`exact_gap` is higher with `gap` than with `baseline`",
            "0.0123 [-1e-05, 0.5]",
        ),
        ({"margin": 0.5}, "`exact_gap` with `gap` is less than 2× that with `baseline`", "61.2× [40×, 92.5×]"),
        (
            {"margin": 0.5, "direction": "higher"},
            "`exact_gap` with `gap` is more than 0.5× that with `baseline`",
            "61.2× [40×, 92.5×]",
        ),
        (
            {"scale": "difference", "direction": "higher", "margin": -0.01},
            "`exact_gap` is not lower with `gap` than with `baseline` by 0.01 or more",
            "61.2 [40, 92.5]",
        ),
        (
            {"scale": "difference", "margin": -0.01},
            "`exact_gap` is not higher with `gap` than with `baseline` by 0.01 or more",
            "61.2 [40, 92.5]",
        ),
        (
            {"scale": "difference", "versus": None, "margin": 1234.5, "effect": 1000.0, "ci": [999.0, 1001.0]},
            "`exact_gap` of `gap` is at most 1,234",
            "1,000 [999, 1,001]",
        ),
        (
            {"scale": "difference", "versus": None, "direction": "higher", "margin": 0.9},
            "`exact_gap` of `gap` is at least 0.9",
            "61.2 [40, 92.5]",
        ),
    ],
)
def test_claims_are_put_into_words(claim: dict[str, Any], sentence: str, effect: str) -> None:
    assert result_tables.sentence(CLAIM | claim) == sentence
    assert result_tables.effect(CLAIM | claim) == effect


def test_bar_in_a_cell_does_not_end_the_cell() -> None:
    assert result_tables.table(("a",), [("|x|",)]).splitlines()[-1] == "| \\|x\\| |"
