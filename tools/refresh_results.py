"""Write what the documentation says about methods and their results, from the catalogs and docs/results.

    uv run python tools/refresh_results.py            write
    uv run python tools/refresh_results.py --check    say what is out of date and exit with 1

Written are a page per method (docs/methods/<package>/<slug>.md), the drawing of the architecture, and the blocks between
``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in the READMEs and in docs/. Everything else in those files is written by hand.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import architecture
from drawing import svg
from method_page import FORMS, as_sentence, method_page, python_block
from result_tables import (
    NBSP,
    Results,
    badge,
    cases_table,
    claims_table,
    effect,
    figure_name,
    in_short,
    measured,
    peer_speed,
    peers_table,
    read,
    sentence,
    step_cost,
    table,
    tally,
)

from poise.core.lab.catalogs import installed

ROOT = Path(__file__).resolve().parent.parent

FIELDS = {
    "core": "Any network",
    "generative": "Generative models",
    "medical": "Medical imaging",
    "ot": "Optimal transport",
    "rl": "Reinforcement learning",
    "science": "Science",
    "vision": "Vision",
}
"""What each member is about, in the order in which the documentation lists them."""

FEATURED = "ot/monge-gap"
"""The method whose usage greets a reader."""

SHOWN = {
    "ot/monge-gap": (
        "The colours of the flower go to the temple. A map that only has to fit (middle left) mixes up which colour belongs where; "
        "with the Monge gap (middle right) warm tones go to warm ones and cool tones to cool ones. Below: where single colours go."
    ),
    "core/elr": (
        "Half of the training labels are redrawn at random. Plain training (black) learns the wrong ones by heart and forgets what "
        "it knew; ELR (blue) and ELR+ (orange) do not."
    ),
    "core/grokking-stability": (
        "Each square is a table of all sums modulo a prime as a network answers them; right answers make smooth stripes. Without "
        "perpGrad it knows what it was trained on and little else; with perpGrad it fills the table."
    ),
}
"""The methods whose pictures greet a reader, and what to see in them."""

Block = Callable[[Sequence[Results], str], str]
"""Text of a block from all results and the way from its file to docs/, such as ``./`` or ``docs/``."""


def choose(everything: Sequence[Results], docs: str) -> str:
    """Which method for which problem, by field."""
    return _by_field(
        everything,
        "##",
        lambda group: table(
            ("your problem", "use", "which is", "what it does"),
            [
                (as_sentence(r.method.problem), _link(r, docs), FORMS[r.method.kind], as_sentence(r.method.summary))
                for r in group
            ],
        ),
    )


def gallery(everything: Sequence[Results], docs: str) -> str:
    """A card with a picture for each method, by field."""
    return _by_field(everything, "##", lambda group: _cards(group, docs))


def figures(everything: Sequence[Results], docs: str) -> str:
    """The pictures that greet a reader, each with what to see in it and the method's headline."""
    found = {r.method.name: r for r in everything if r.figures}
    shown = [_showcase(found[name], caption, docs) for name, caption in SHOWN.items() if name in found]
    return "\n\n".join(shown) or "_The first figures arrive with the first verified method._"


def usage(everything: Sequence[Results], docs: str) -> str:
    """The usage of the featured method."""
    featured = [r.method for r in everything if r.method.name == FEATURED]
    return python_block(featured[0].usage) if featured else "_The first method is about to land._"


def summary(everything: Sequence[Results], docs: str) -> str:
    """One row per method: its headline and what was measured, how many of its claims hold, its cost."""
    if not everything:
        return "_No method has landed yet._"
    rows = [
        (
            _link(r, docs),
            r.method.headline.promise,
            measured(r),
            badge(r.headline["verdict"]) if r.headline else "–",
            in_short(r),
            step_cost(r),
            peer_speed(r),
        )
        for r in everything
    ]
    header = ("method", "the paper promises", "measured", "verdict", "all claims", "step", "speed against")
    return f'{_total(everything)}\n\n<div class="glance" markdown>\n\n{table(header, rows)}\n\n</div>'


def unproven(everything: Sequence[Results], docs: str) -> str:
    """Every claim that is refuted or undecided, refuted ones first."""
    rows = [
        (_link(r, docs), sentence(claim), effect(claim), badge(claim["verdict"]))
        for verdict in ("refuted", "undecided")
        for r in everything
        for claim in r.claims
        if claim["verdict"] == verdict
    ]
    return table(("method", "claim", "effect [95 % interval]", "verdict"), rows) if rows else "_Every claim holds._"


def details(everything: Sequence[Results], docs: str) -> str:
    """Every claim and every cost of every method, folded, by field."""
    found = [r for r in everything if r.claims or r.cost]
    return _by_field(found, "###", lambda group: "\n\n".join(_details(r, docs) for r in group))


def _details(r: Results, docs: str) -> str:
    parts = [f"#### {_link(r, docs)}"]
    for preset, verdict in r.verdicts.items():
        where = "" if preset == "quick" else f" of the preset {preset}"
        parts.append(_folded(f"Claims{where}: {tally(verdict['claims'])}", claims_table(verdict["claims"])))
    if r.cost and r.cost["cases"]:
        parts.append(_folded(f"Time and memory: {_count(r.cost['cases'], 'case')}", cases_table(r.cost["cases"])))
    if r.cost and r.cost["peers"]:
        parts.append(
            _folded(f"Other implementations: {_count(r.cost['peers'], 'comparison')}", peers_table(r.cost["peers"]))
        )
    return "\n\n".join(parts)


def _folded(title: str, content: str) -> str:
    """Unfolds on the site and on GitHub alike."""
    return f"<details markdown>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def _total(everything: Sequence[Results]) -> str:
    verified = [r for r in everything if r.claims]
    claims = [claim for r in verified for claim in r.claims]
    if not claims:
        return f"{_count(everything, 'method')}; no verdict is published yet."
    return (
        f"{_count(everything, 'method')}, {len(verified)} of them verified so far; "
        f"{_count(claims, 'claim')}: {tally(claims)}."
    )


def methods_of(package: str) -> Block:
    """The list of methods of one package, for its README."""

    def block(everything: Sequence[Results], docs: str) -> str:
        own = [r.method for r in everything if r.method.package == package]
        if not own:
            return "No method has landed in this package yet; it holds its place in the workspace."
        return table(
            ("method", "what it does", "paper"),
            [(f"`{m.name}` {m.title}", as_sentence(m.summary), f"[{m.paper}]({m.url})") for m in own],
        )

    return block


def _member_readmes() -> dict[str, dict[str, Block]]:
    folders = {package: "shared" if package == "core" else f"packages/{package}" for package in FIELDS}
    return {f"{folder}/README.md": {"methods": methods_of(package)} for package, folder in folders.items()}


BLOCKS: Mapping[str, Mapping[str, Block]] = {
    "README.md": {"usage": usage, "figures": figures, "results": summary},
    "docs/index.md": {"usage": usage, "figures": figures, "results": summary},
    "docs/architecture.md": {"packages": architecture.packages, "walk": architecture.walk},
    "docs/choose.md": {"choose": choose},
    "docs/results.md": {"summary": summary, "unproven": unproven, "details": details},
    "docs/methods/index.md": {"gallery": gallery},
    **_member_readmes(),
}
"""Blocks by file and name."""


def render(root: Path, everything: Sequence[Results]) -> dict[Path, str]:
    """What every written file should hold, by path.

    Raises:
        ValueError: a file lacks the markers of a block.
    """
    pages = {_page(root, r): method_page(r) for r in everything}
    pages[root / "docs/assets/architecture.svg"] = svg()
    for name, blocks in BLOCKS.items():
        path = root / name
        docs = os.path.relpath(root / "docs", path.parent) + "/"
        text = path.read_text(encoding="utf-8")
        for block, write in blocks.items():
            text = _fill(text, block, write(everything, docs), path)
        pages[path] = text
    return pages


def stale(root: Path, pages: Mapping[Path, str]) -> tuple[list[Path], list[Path]]:
    """The files that differ from ``pages``, and the method pages whose method is gone."""
    differ = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    existing = (path for path in (root / "docs/methods").glob("*/*.md") if not path.name.endswith(".notes.md"))
    return differ, sorted(path for path in existing if path not in pages)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write, or with ``--check`` compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is out of date")
    check = parser.parse_args(arguments).check

    everything = [read(method, root / "docs") for method in installed().values()]
    pages = render(root, everything)
    differ, gone = stale(root, pages)
    for path in (*differ, *gone):
        print(f"{'out of date' if check else 'removed' if path in gone else 'written'}: {path.relative_to(root)}")
    if check:
        return 1 if differ or gone else 0
    for path in differ:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
    for path in gone:
        path.unlink()
    return 0


def _page(root: Path, results: Results) -> Path:
    return root / "docs/methods" / results.method.package / f"{results.method.slug}.md"


def _fill(text: str, block: str, content: str, path: Path) -> str:
    begin, end = f"<!-- begin {block} -->", f"<!-- end {block} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path} must hold one block between {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n\n{end}", text)


def _by_field(everything: Sequence[Results], heading: str, write: Callable[[Sequence[Results]], str]) -> str:
    groups = {field: [r for r in everything if r.method.package == package] for package, field in FIELDS.items()}
    sections = [f"{heading} {field}\n\n{write(group)}" for field, group in groups.items() if group]
    return "\n\n".join(sections) or "_No method has landed yet._"


def _cards(group: Sequence[Results], docs: str) -> str:
    cards = []
    for r in group:
        picture = f"{_picture(r, docs)}\n\n    " if r.figures else ""
        cards.append(f"-   {picture}**{_link(r, docs)}**\n\n    {as_sentence(r.method.summary)}")
    return '<div class="grid cards" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"


def _showcase(r: Results, caption: str, docs: str) -> str:
    verdict = " " + badge(r.headline["verdict"]).replace(" ", NBSP) if r.headline else ""
    text = [
        f"**{_link(r, docs)}**",
        caption,
        f"*The paper promises:* {r.method.headline.promise}. *Measured:* {measured(r)}{verdict}",
        f"```sh\nuv run poise run {r.method.name}\n```",
    ]
    parts = ['<div class="showcase" markdown>', "<div markdown>", _picture(r, docs), "</div>", "<div markdown>", *text]
    return "\n\n".join([*parts, "</div>", "</div>"]).replace("markdown>\n\n<div", "markdown>\n<div")


def _picture(r: Results, docs: str) -> str:
    name = figure_name(r.method, r.figures[0])
    return f"[![What the experiment of {r.method.title} shows]({docs}results/{name})]({_href(r, docs)})"


def _href(results: Results, docs: str) -> str:
    return f"{docs}methods/{results.method.name}.md"


def _link(results: Results, docs: str) -> str:
    return f"[{results.method.title}]({_href(results, docs)})"


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
