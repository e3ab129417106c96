"""Write what the documentation says about methods and their results, from the catalogs and docs/results.

    uv run python tools/refresh_results.py            write
    uv run python tools/refresh_results.py --check    say what is out of date and exit with 1

Written are a page per method (docs/methods/<package>/<slug>.md) and the blocks between ``<!-- begin NAME -->`` and
``<!-- end NAME -->`` in the READMEs and in docs/. Everything else in those files is written by hand.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from result_tables import (
    Results,
    arms_table,
    badge,
    cases_table,
    claims_table,
    effect,
    environment,
    number,
    peer_speed,
    peers_table,
    read,
    sentence,
    step_cost,
    table,
    tally,
)

from poise.core.catalog import Method
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

FORMS = {
    "penalty": "a term to add to the loss",
    "loss": "a loss",
    "solver": "a function to call",
    "layer": "a layer",
    "parametrization": "a parametrization of weights",
    "optimizer": "an optimizer",
    "adapter": "an adapter for a pretrained model",
    "training": "a training procedure",
    "network": "a network",
}
"""What a user holds in hand, by ``Method.kind``."""

FEATURED = "ot/monge-gap"
"""The method whose usage greets a reader."""

Block = Callable[[Sequence[Results], str], str]
"""Text of a block from all results and the way from its file to docs/, such as ``./`` or ``docs/``."""


def method_page(results: Results) -> str:
    """The whole page of one method."""
    method = results.method
    member = "shared" if method.package == "core" else f"packages/{method.package}"
    parts = [
        "<!-- Written by tools/refresh_results.py from the catalog, docs/results and the notes beside this page. -->",
        f"# {method.title}",
        f"**{_sentence(method.problem)}** {_sentence(method.summary)}",
        f"{_chips(method)}\n{{ .chips }}",
        f"$$\n{method.formula.strip()}\n$$",
        "## Use it",
        _python(method.usage),
        f"From a checkout: `pip install ./shared{'' if member == 'shared' else f' ./{member}'}`.",
        "## See it work",
        *_experiment(results),
        *_cost(results),
    ]
    if results.notes:
        parts.append(f'--8<-- "docs/methods/{method.package}/{method.slug}.notes.md"')
    parts += ["## API", *(f"::: {name}\n    options:\n      show_source: true" for name in method.api)]
    parts += ["## Paper", f"[{method.paper}]({method.url})", f"```bibtex\n{method.bibtex.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _experiment(results: Results) -> Iterator[str]:
    method = results.method
    if results.figure:
        yield f"![What the experiment of {method.title} shows](../../results/{method.package}/{method.slug}.png)"
    yield f"```sh\nuv run poise run {method.name}\n```"
    paper = (
        " `--preset paper --data DIR` runs the published settings on the published data."
        if "paper" in method.presets
        else ""
    )
    yield (
        f"The arms {_words(method.arms)} run on real data that ships with the packages.{paper} "
        f"`uv run poise info {method.name}` lists every setting."
    )
    if results.verdict is None:
        yield "No verdict is published yet."
        return
    seeds = len(results.verdict["seeds"])
    yield f"### Verdicts over {seeds} seeds"
    yield claims_table(results.claims)
    yield "### Measured, mean ± standard deviation over seeds"
    yield arms_table(results.verdict["arms"])
    yield (
        f"Reproduce with `uv run poise verify {method.name} --seeds {seeds}` "
        f"({number(results.verdict['seconds'])} s; {environment(results.verdict['environment'])})."
    )


def _cost(results: Results) -> Iterator[str]:
    yield "## What it costs"
    if results.cost is None:
        yield "No benchmark is published yet."
        return
    if results.cost["cases"]:
        yield cases_table(results.cost["cases"])
    if results.cost["peers"]:
        yield "Against other implementations of the same computation:"
        yield peers_table(results.cost["peers"])
    yield f"Calls that are compared ran in turns in one process ({environment(results.cost['environment'])})."


def choose(everything: Sequence[Results], docs: str) -> str:
    """Which method for which problem, by field."""
    return _by_field(
        everything,
        "##",
        lambda group: table(
            ("your problem", "use", "which is", "what it does"),
            [
                (_sentence(r.method.problem), _link(r, docs), FORMS[r.method.kind], _sentence(r.method.summary))
                for r in group
            ],
        ),
    )


def gallery(everything: Sequence[Results], docs: str) -> str:
    """A card with a picture for each method, by field."""
    return _by_field(everything, "##", lambda group: _cards(group, docs))


def figures(everything: Sequence[Results], docs: str) -> str:
    """Cards of the first three methods that have a figure."""
    chosen = [results for results in everything if results.figure][:3]
    return _cards(chosen, docs) if chosen else "_The first figures arrive with the first verified method._"


def usage(everything: Sequence[Results], docs: str) -> str:
    """The usage of the featured method."""
    featured = [r.method for r in everything if r.method.name == FEATURED]
    return _python(featured[0].usage) if featured else "_The first method is about to land._"


def results(everything: Sequence[Results], docs: str) -> str:
    """One row per method: its headline claim, all its verdicts, its cost."""
    if not everything:
        return "_No method has landed yet._"
    rows = [
        (
            _link(r, docs),
            f"{sentence(r.claims[0])}: {effect(r.claims[0])}" if r.claims else "–",
            tally(r.claims) or "not verified yet",
            step_cost(r.cost),
            peer_speed(r.cost),
        )
        for r in everything
    ]
    return table(("method", "headline claim and measured effect", "claims", "step time", "against peers"), rows)


def claims(everything: Sequence[Results], docs: str) -> str:
    """Every verified claim, by field."""
    verified = [results for results in everything if results.claims]
    if not verified:
        return "_No verdict is published yet._"
    total = tally(claim for results in verified for claim in results.claims)
    body = _by_field(
        verified,
        "###",
        lambda group: table(
            ("method", "kind", "claim", "effect [95 % interval]", "verdict"),
            [
                (_link(r, docs), claim["kind"], sentence(claim), effect(claim), badge(claim["verdict"]))
                for r in group
                for claim in r.claims
            ],
        ),
    )
    return f"{_count(verified)}: {total}.\n\n{body}"


def costs(everything: Sequence[Results], docs: str) -> str:
    """Every benchmarked case and every comparison with a peer."""
    timed = [results for results in everything if results.cost]
    if not timed:
        return "_No benchmark is published yet._"
    sections = []
    for r in timed:
        assert r.cost is not None
        sections.append(f"### {_link(r, docs)}")
        sections += [cases_table(r.cost["cases"])] * bool(r.cost["cases"])
        sections += [peers_table(r.cost["peers"])] * bool(r.cost["peers"])
    return "\n\n".join(sections)


def methods_of(package: str) -> Block:
    """The list of methods of one package, for its README."""

    def block(everything: Sequence[Results], docs: str) -> str:
        own = [r.method for r in everything if r.method.package == package]
        if not own:
            return "No method has landed in this package yet; it holds its place in the workspace."
        return table(
            ("method", "what it does", "paper"),
            [(f"`{m.name}` {m.title}", _sentence(m.summary), f"[{m.paper}]({m.url})") for m in own],
        )

    return block


def _member_readmes() -> dict[str, dict[str, Block]]:
    folders = {package: "shared" if package == "core" else f"packages/{package}" for package in FIELDS}
    return {f"{folder}/README.md": {"methods": methods_of(package)} for package, folder in folders.items()}


BLOCKS: Mapping[str, Mapping[str, Block]] = {
    "README.md": {"usage": usage, "results": results},
    "docs/index.md": {"usage": usage, "figures": figures, "results": results},
    "docs/choose.md": {"choose": choose},
    "docs/results.md": {"claims": claims, "costs": costs},
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
        picture = f"[![]({docs}results/{r.method.name}.png)]({_href(r, docs)})\n\n    " if r.figure else ""
        cards.append(f"-   {picture}**{_link(r, docs)}**\n\n    {_sentence(r.method.summary)}")
    return '<div class="grid cards" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"


def _href(results: Results, docs: str) -> str:
    return f"{docs}methods/{results.method.name}.md"


def _link(results: Results, docs: str) -> str:
    return f"[{results.method.title}]({_href(results, docs)})"


def _count(group: Sequence[Results]) -> str:
    return "1 method" if len(group) == 1 else f"{len(group)} methods"


def _chips(method: Method) -> str:
    return " · ".join((f"`{method.name}`", FORMS[method.kind], *method.tags))


def _words(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


if __name__ == "__main__":
    sys.exit(main())
