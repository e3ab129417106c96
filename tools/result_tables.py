"""Read the committed results of a method (docs/results/<package>/<slug>.*); put them into words and Markdown tables."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
        verdicts: the verdict files by preset, ``quick`` first.
        cost: the cost file, if there is one.
        figures: the presets that have a figure, ``quick`` first.
        notes: whether there are notes for its page.
    """

    method: Method
    verdicts: Mapping[str, dict[str, Any]]
    cost: dict[str, Any] | None
    figures: tuple[str, ...]
    notes: bool

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The verified claims of all presets, each in the experiment's order."""
        return [claim for verdict in self.verdicts.values() for claim in verdict["claims"]]

    @property
    def headline(self) -> dict[str, Any] | None:
        """The verified claim that the catalog names as the method's headline; None while its preset is not verified."""
        chosen = self.method.headline
        if chosen.preset not in self.verdicts:
            return None
        wanted = (chosen.metric, chosen.arm, chosen.versus)
        for claim in self.verdicts[chosen.preset]["claims"]:
            if (claim["metric"], claim["arm"], claim["versus"]) == wanted:
                return claim
        raise ValueError(
            f"{self.method.name}: the headline {wanted} is not among the verified claims of {chosen.preset}"
        )

    @property
    def step(self) -> dict[str, Any] | None:
        """The benchmarked case that the catalog names as the method's training step; None without a benchmark."""
        return self._timed("cases", {"name": self.method.headline.step})

    @property
    def peer(self) -> dict[str, Any] | None:
        """The comparison that the catalog names; None without a benchmark or when it names none."""
        chosen = self.method.headline
        return self._timed("peers", {"peer": chosen.peer, "case": chosen.peer_case}) if chosen.peer else None

    def _timed(self, kind: str, wanted: dict[str, str]) -> dict[str, Any] | None:
        if self.cost is None:
            return None
        for row in self.cost[kind]:
            if wanted.items() <= row.items():
                return row
        raise ValueError(
            f"{self.method.name}: the catalog names {wanted}, which is not among the {kind} of the benchmark"
        )


def read(method: Method, docs: Path) -> Results:
    """The results of ``method`` under the folder ``docs``."""
    base = docs / "results" / method.package / method.slug
    endings = {"quick": "", **{preset: f".{preset}" for preset in method.presets if preset != "quick"}}
    verdicts = {preset: _json(base.with_name(f"{base.name}{ending}.json")) for preset, ending in endings.items()}
    return Results(
        method,
        verdicts={preset: verdict for preset, verdict in verdicts.items() if verdict is not None},
        cost=_json(base.with_name(f"{base.name}.bench.json")),
        figures=tuple(
            preset for preset, ending in endings.items() if base.with_name(f"{base.name}{ending}.png").is_file()
        ),
        notes=(docs / "methods" / method.package / f"{method.slug}.notes.md").is_file(),
    )


def figure_name(method: Method, preset: str) -> str:
    """Where a preset's figure is below docs/results: ``ot/monge-gap.known-map.png``."""
    return f"{method.name}{'' if preset == 'quick' else f'.{preset}'}.png"


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
    if claim.get("scale") == "ratio" and claim["margin"] < 1:
        most = f"less than {_times(1 / claim['margin'])}" if claim["direction"] == "lower" else f"more than {margin}"
        return f"{metric} with {arm} is {most} that with `{claim['versus']}`"
    if claim["margin"] < 0:
        worse = "lower" if claim["direction"] == "higher" else "higher"
        return f"{metric} is not {worse} with {arm} than with `{claim['versus']}` by {number(-claim['margin'])} or more"
    least = f", by more than {margin}" if claim["margin"] else ""
    return f"{metric} is {claim['direction']} with {arm} than with `{claim['versus']}`{least}"


def effect(claim: dict[str, Any]) -> str:
    """The measured effect and its confidence interval: ``61× [40×, 92×]``."""
    return f"{_in_scale(claim['effect'], claim)} {_interval(*(_in_scale(end, claim) for end in claim['ci']))}"


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


def measured(results: Results) -> str:
    """The effect of the headline in the metric's own direction: ``+31.9 points [28.6, 35]``, or ``49× [6.6×, 376×]`` for a ratio."""
    claim, headline = results.headline, results.method.headline
    if claim is None:
        return "not verified yet"
    if claim["scale"] == "ratio":
        return f"**{_times(claim['effect'])}** {_interval(*map(_times, claim['ci']))}"
    factor = headline.factor * (-1 if claim["versus"] and claim["direction"] == "lower" else 1)
    value, *ends = (factor * value for value in (claim["effect"], *claim["ci"]))
    sign = "+" if claim["versus"] and value > 0 else ""
    unit = f"{NBSP}{headline.unit}" if headline.unit else ""
    return _minus(f"**{sign}{number(value)}**{unit} {_interval(*map(number, sorted(ends)))}")


def in_short(results: Results) -> str:
    """How many of the claims hold: ``5 of 7 hold, 1 refuted``; the rest is undecided."""
    verdicts = [claim["verdict"] for claim in results.claims]
    refuted = f", {verdicts.count('refuted')}{NBSP}refuted" if "refuted" in verdicts else ""
    return f"{verdicts.count('holds')}{NBSP}of{NBSP}{len(verdicts)}{NBSP}hold{refuted}" if verdicts else "–"


def step_cost(results: Results) -> str:
    """The time of a training step with the method over that without: ``1.84×``."""
    return _times(results.step["ratio"]) if results.step else "–"


def peer_speed(results: Results) -> str:
    """The speed against the peer that the catalog names: ``4.66× ott-jax``."""
    return f"{_times(results.peer['speedup'])} {results.peer['peer']}" if results.peer else "–"


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


def _interval(low: str, high: str) -> str:
    return f"[{low},{NBSP}{high}]"


def _minus(text: str) -> str:
    """Numbers in prose carry a minus sign and not a hyphen."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{number(fmean(values))}{NBSP}±{NBSP}{number(stdev(values))}" if len(values) > 1 else number(values[0])
