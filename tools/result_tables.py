"""Read the committed results of a method (docs/results/<package>/<slug>.*); put them into words and Markdown tables."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from poise.core.catalog import Method

VERDICTS = {"holds": "✓", "undecided": "·", "refuted": "✗"}
NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Results:
    """What the tree holds about one method.

    Attributes:
        method: its catalog record.
        verdict: the verdict file, if there is one.
        cost: the cost file, if there is one.
        figure: whether there is a figure.
        notes: whether there are notes for its page.
    """

    method: Method
    verdict: dict[str, Any] | None
    cost: dict[str, Any] | None
    figure: bool
    notes: bool

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The verified claims, in the experiment's order; the first is the headline."""
        return self.verdict["claims"] if self.verdict else []


def read(method: Method, docs: Path) -> Results:
    """The results of ``method`` under the folder ``docs``."""
    base = docs / "results" / method.package / method.slug
    return Results(
        method,
        verdict=_json(base.with_suffix(".json")),
        cost=_json(base.with_suffix(".bench.json")),
        figure=base.with_suffix(".png").is_file(),
        notes=(docs / "methods" / method.package / f"{method.slug}.notes.md").is_file(),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, ``12,300`` for large numbers and ``4.5e-06`` for tiny ones."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def badge(verdict: str) -> str:
    """A verdict with its sign, ``✓ holds``."""
    return f"{VERDICTS[verdict]} {verdict}"


def tally(claims: Iterable[dict[str, Any]]) -> str:
    """How many claims got which verdict: ``3 hold, 1 undecided``."""
    counts = dict.fromkeys(VERDICTS, 0)
    for claim in claims:
        counts[claim["verdict"]] += 1
    words = {"holds": "holds" if counts["holds"] == 1 else "hold", "undecided": "undecided", "refuted": "refuted"}
    return ", ".join(f"{count} {words[verdict]}" for verdict, count in counts.items() if count)


def sentence(claim: dict[str, Any]) -> str:
    """The claim in words: ``exact_gap is lower with gap than with baseline, by at least 10×``."""
    metric, arm = f"`{claim['metric']}`", f"`{claim['arm']}`"
    margin = _in_scale(claim["margin"], claim)
    if claim["versus"] is None:
        return f"{metric} of {arm} is at {'least' if claim['direction'] == 'higher' else 'most'} {margin}"
    least = f", by more than {margin}" if claim["margin"] else ""
    return f"{metric} is {claim['direction']} with {arm} than with `{claim['versus']}`{least}"


def effect(claim: dict[str, Any]) -> str:
    """The measured effect and its confidence interval: ``61× [40×, 92×]``."""
    low, high = claim["ci"]
    return f"{_in_scale(claim['effect'], claim)} [{_in_scale(low, claim)},{NBSP}{_in_scale(high, claim)}]"


def claims_table(claims: Sequence[dict[str, Any]]) -> str:
    """One row per claim: kind, sentence, effect, verdict, where the paper says so; the notes follow as a list."""
    rows = [
        (claim["kind"], sentence(claim), effect(claim), badge(claim["verdict"]), claim["source"]) for claim in claims
    ]
    notes = [f"- `{claim['metric']}` of `{claim['arm']}`: {claim['note']}" for claim in claims if claim.get("note")]
    return "\n\n".join(
        [
            table(("kind", "claim", "effect [95 % interval]", "verdict", "source"), rows),
            *["\n".join(notes)] * bool(notes),
        ]
    )


def arms_table(arms: dict[str, dict[str, list[float]]]) -> str:
    """Mean and standard deviation over seeds, one row per metric and one column per arm."""
    metrics = dict.fromkeys(metric for measured in arms.values() for metric in measured)
    rows = [(f"`{metric}`", *(_spread(measured.get(metric, [])) for measured in arms.values())) for metric in metrics]
    return table(("metric", *(f"`{arm}`" for arm in arms)), rows)


def cases_table(cases: Sequence[dict[str, Any]]) -> str:
    """Time and memory with and without the method, one row per case."""
    rows = [
        (
            case["name"],
            _milliseconds(case["plain_ms"]),
            _milliseconds(case["method_ms"]),
            _times(case["ratio"]),
            _megabytes(case["plain_mb"]),
            _megabytes(case["method_mb"]),
        )
        for case in cases
    ]
    return table(("case", "without", "with", "ratio", "memory without", "memory with"), rows)


def peers_table(peers: Sequence[dict[str, Any]]) -> str:
    """Time against other implementations of the same computation, one row per peer and case."""
    rows = [
        (
            f"{peer['peer']} {peer['version']}",
            peer["case"],
            _milliseconds(peer["ours_ms"]),
            _milliseconds(peer["peer_ms"]),
            _times(peer["speedup"]),
            number(peer["agreement"]),
        )
        for peer in peers
    ]
    return table(("peer", "case", "poise", "peer", "speed-up", "relative difference"), rows)


def step_cost(cost: dict[str, Any] | None) -> str:
    """The range of step-time ratios over the cases: ``1.1–1.9×``."""
    return _range([case["ratio"] for case in cost["cases"]]) if cost and cost["cases"] else "–"


def peer_speed(cost: dict[str, Any] | None) -> str:
    """The range of speed-ups against each peer: ``3.1–5.2× ott-jax 0.6.0``."""
    speedups: dict[str, list[float]] = {}
    for peer in cost["peers"] if cost else []:
        speedups.setdefault(f"{peer['peer']} {peer['version']}", []).append(peer["speedup"])
    return ", ".join(f"{_range(values)} {peer}" for peer, values in speedups.items()) or "–"


def environment(values: dict[str, Any]) -> str:
    """Where the numbers come from, in one line: ``python 3.11.9, torch 2.15.0``."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if isinstance(value, str | int | float))


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _in_scale(value: float, claim: dict[str, Any]) -> str:
    return _times(value) if claim.get("scale") == "ratio" else number(value)


def _times(ratio: float) -> str:
    return f"{number(ratio)}×"


def _milliseconds(value: float) -> str:
    return f"{number(value)}{NBSP}ms"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}{NBSP}MB"


def _range(ratios: Sequence[float]) -> str:
    low, high = number(min(ratios)), number(max(ratios))
    return f"{low}×" if low == high else f"{low}–{high}×"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{number(fmean(values))} ± {number(stdev(values))}" if len(values) > 1 else number(values[0])
