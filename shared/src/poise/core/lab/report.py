"""A self-contained HTML page about one run or several: settings, metrics, curves, figures, claims."""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from poise.core.lab import catalogs
from poise.core.lab.atomic import write_text
from poise.core.lab.errors import BadInput
from poise.core.lab.experiment import Claim
from poise.core.lab.metrics import read

PALETTE = ("#6b7280", "#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
"""One colour per arm, the baseline in grey."""


def default_page(folders: Sequence[Path]) -> Path:
    """Where a report goes when nobody says: in the run's folder, or beside the folders when there are several."""
    return (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Write the page.

    Args:
        folders: folders that ``poise run`` made.
        page: the HTML file.

    Raises:
        BadInput: a folder holds no run, or the page cannot be written.
    """
    from jinja2 import Environment

    source = files("poise.core.lab").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    html = template.render(runs=[_run(folder) for folder in folders])
    try:
        write_text(page, html)
    except OSError as error:
        raise BadInput(f"cannot write {page}: {error.strerror or error}") from error


def _run(folder: Path) -> dict[str, Any]:
    if not (folder / "run.json").is_file():
        raise BadInput(f"{folder} holds no run: expected a folder that `poise run` made")
    asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    method = catalogs.find(asked["method"])
    experiment = catalogs.load_experiment(method)
    arms = [_arm(folder / name, text) for name, text in experiment.arms.items() if (folder / name).is_dir()]
    results = {arm["name"]: arm["metrics"] for arm in arms if arm["metrics"]}
    return {
        "asked": asked,
        "method": method,
        "folder": folder.name,
        "arms": arms,
        "metrics": sorted({metric for metrics in results.values() for metric in metrics}),
        "comparisons": _figures(folder / "compare"),
        "curves": _curves(folder, [arm["name"] for arm in arms]),
        "claims": [_claim(claim, results) for claim in experiment.claims if asked["preset"] in claim.presets],
    }


def _arm(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "result.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"metrics": {}, "seconds": None}
    return {
        "name": folder.name,
        "text": text,
        "metrics": record["metrics"],
        "seconds": record["seconds"],
        "figures": _figures(folder),
    }


def _figures(folder: Path) -> list[dict[str, str]]:
    return [
        {
            "name": path.stem.replace("_", " "),
            "uri": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        }
        for path in in_order(folder / "figures")
    ]


def in_order(figures: Path) -> list[Path]:
    """The figures of a folder in the order in which they were drawn."""
    return sorted(figures.glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _claim(claim: Claim, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What one seed says about a claim; the verdict is a matter of several."""
    ours = results.get(claim.arm, {}).get(claim.metric)
    theirs = results.get(claim.versus, {}).get(claim.metric) if claim.versus else None
    if claim.versus is None:
        wanted = f"at {'least' if claim.direction == 'higher' else 'most'} {claim.margin:g}"
    elif claim.scale == "ratio":
        wanted = f"{claim.direction} than {claim.versus} by a factor above {claim.margin:g}"
    else:
        wanted = f"{claim.direction} than {claim.versus}" + (f" by more than {claim.margin:g}" if claim.margin else "")
    return {"claim": claim, "wanted": wanted, "ours": ours, "theirs": theirs}


def _curves(folder: Path, arms: Sequence[str]) -> list[str]:
    """One SVG per logged metric, all arms in it."""
    series: dict[str, dict[str, tuple[list[int], list[float]]]] = defaultdict(dict)
    for arm in arms:
        for line in read(folder / arm / "metrics.jsonl"):
            for key, value in line.items():
                if key not in ("loop", "step", "total") and value is not None:
                    steps, values = series[f"{line['loop']}: {key}" if line["loop"] else key].setdefault(arm, ([], []))
                    steps.append(line["step"])
                    values.append(value)
    return [_svg(name, by_arm, arms) for name, by_arm in series.items()]


def _svg(name: str, by_arm: dict[str, tuple[list[int], list[float]]], arms: Sequence[str]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": name}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for arm, (steps, values) in by_arm.items():
            axes.plot(steps, values, label=arm, color=PALETTE[arms.index(arm) % len(PALETTE)], linewidth=1.6)
        if all(value > 0 for _, values in by_arm.values() for value in values) and _spread(by_arm) > 50:
            axes.set_yscale("log")
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if len(by_arm) > 1:
            axes.legend(frameon=False, fontsize=8)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=False, metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def _spread(by_arm: dict[str, tuple[list[int], list[float]]]) -> float:
    values = [value for _, of_arm in by_arm.values() for value in of_arm]
    return max(values) / min(values)
