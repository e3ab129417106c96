"""docs/assets/architecture.svg: the parts of the workspace, and an arrow for every import between two of them."""

from collections.abc import Iterator
from html import escape

from architecture import edges
from imports import members

from poise.core.lab.catalogs import installed

STYLE = """
    .box { fill: #eef4f6; stroke: #8aa3b4; stroke-width: 1.2 }
    .core { fill: #17324d }
    .data { fill: #24496e }
    .lab { fill: #0b7d5f }
    .name { font-size: 14px; font-weight: 600; fill: #17324d }
    .note { font-size: 11.5px; fill: #4b6173 }
    .on { fill: #ffffff }
    .soft { fill: #dbe8ee }
    .arrow { fill: none; stroke: #6b8496; stroke-width: 1.6; marker-end: url(#tip) }
    .found { stroke-dasharray: 4 3 }"""

LEFT, DOMAIN, GAP = 64, 94, 8
"""Where the row of domain packages begins, how wide a package is, and how far apart two are."""

ARROWS = {
    ("lab", "catalogs"): "M330 51H276",
    ("lab", "core"): "M744 80V366H655V388",
    ("experiments", "lab"): "M520 150V86",
    ("experiments", "domain"): "M{x} 208V262",
    ("experiments", "core"): "M40 208V388",
    ("experiments", "data"): "M704 208V398",
    ("domain", "core"): "M{x} 322V388",
}
"""How the arrow between two parts runs; ``domain`` stands for each domain package, ``{x}`` for its middle."""


def svg() -> str:
    """The drawing.

    Raises:
        ValueError: there is an import that the drawing has no arrow for.
    """
    if missing := overlooked():
        raise ValueError(f"the drawing knows no arrow for {sorted(missing)}; add it to ARROWS in tools/drawing.py")
    label = "Experiments import the lab, methods and the core; domain packages import the core and never each other."
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 490" role="img" '
        f"aria-label=\"{label}\" font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\">",
        "  <!-- Written by tools/refresh_results.py from imports, catalogs and pyproject.toml. -->",
        f"  <style>{STYLE}\n  </style>",
        "  <defs>",
        '    <marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '      <path d="M0 0L8 4L0 8z" fill="#6b8496"/>',
        "    </marker>",
        "  </defs>",
        '  <rect width="820" height="490" rx="8" fill="#ffffff"/>',
        '  <g text-anchor="middle">',
        *(f"    {line}" for line in (*_boxes(), *_arrows())),
        "  </g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def overlooked() -> set[tuple[str, str]]:
    """Imports between parts that there is no arrow for."""
    domains = set(_domains())
    return {
        (source, target)
        for source, target in edges()
        if ("domain" if source in domains else source, "domain" if target in domains else target) not in ARROWS
    }


def _boxes() -> Iterator[str]:
    methods = list(installed().values())
    homes = {method.package for method in methods}
    yield from _box("box", 20, 20, 250, 60, "catalogs", f"{len(methods)} methods of {len(homes)} packages")
    yield from _box(
        "lab", 330, 20, 470, 60, "poise.core.lab", "the command line, Experiment, Claim, Run, verify, report"
    )
    yield from _box("box", 20, 150, 700, 58, "experiments", "one readable file per method: data, arms, loop, claims")
    for index, package in enumerate(_domains()):
        own = sum(method.package == package for method in methods)
        yield from _box("box", LEFT + index * (DOMAIN + GAP), 264, DOMAIN, 58, package, _count(own))
    shared = _count(sum(method.package == "core" for method in methods))
    yield from _box("core", 20, 390, 780, 80, "", "")
    yield _text("name on", 340, 424, "poise.core")
    yield _text("note soft", 340, 448, f"{shared} for any network; penalties, schedules, adapters, GPU utilities")
    yield from _box("data", 680, 400, 110, 60, "poise.core.data", "")


def _arrows() -> Iterator[str]:
    drawn = edges()
    middles = {package: LEFT + index * (DOMAIN + GAP) + DOMAIN // 2 for index, package in enumerate(_domains())}
    for (source, target), path in ARROWS.items():
        if "domain" not in (source, target):
            if (source, target) in drawn:
                yield f'<path class="arrow" d="{path}"/>'
            continue
        for package, x in middles.items():
            edge = (package if source == "domain" else source, package if target == "domain" else target)
            if edge in drawn:
                yield f'<path class="arrow" d="{path.format(x=x)}"/>'
    yield '<path class="arrow found" d="M145 80V146"/>'
    yield _text("note", 218, 112, "each record names")
    yield _text("note", 218, 128, "its experiment")


def _box(kind: str, x: int, y: int, width: int, height: int, name: str, note: str) -> Iterator[str]:
    on, soft = (" on", " soft") if kind in ("core", "lab", "data") else ("", "")
    middle = x + width // 2
    yield f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
    if name:
        yield _text(f"name{on}" if note else f"note{on}", middle, y + (26 if note else height // 2 + 4), name)
    if note:
        yield _text(f"note{soft}", middle, y + 46, note)


def _text(kind: str, x: int, y: int, text: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'


def _count(number: int) -> str:
    return f"{number} method{'' if number == 1 else 's'}" if number else "no method yet"


def _domains() -> list[str]:
    return [package for package in members() if package != "core"]
