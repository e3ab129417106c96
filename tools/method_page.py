"""The page of one method, from its catalog record, its results and its notes."""

from collections.abc import Iterator, Sequence

from result_tables import (
    Results,
    arms_table,
    cases_table,
    claims_table,
    environment,
    figure_name,
    number,
    peers_table,
)

from poise.core.catalog import Method

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


def method_page(results: Results) -> str:
    """The whole page of one method."""
    method = results.method
    member = "shared" if method.package == "core" else f"packages/{method.package}"
    parts = [
        "<!-- Written by tools/refresh_results.py from the catalog, docs/results and the notes beside this page. -->",
        f"# {method.title}",
        f"**{as_sentence(method.problem)}** {as_sentence(method.summary)}",
        f"{_chips(method)}\n{{ .chips }}",
        f"$$\n{method.formula.strip()}\n$$",
        "## Use it",
        python_block(method.usage),
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
    if "quick" in results.figures:
        yield _picture(method, "quick")
    yield f"```sh\nuv run poise run {method.name}\n```"
    verdict = results.verdicts.get("quick")
    quick = tuple(arm for arm in method.arms if verdict is None or arm in verdict["arms"])
    others = tuple(arm for arm in method.arms if arm not in quick)
    paper = ""
    if "paper" in method.presets:
        paper = (
            " `--preset paper` runs the published settings; `--data DIR` names the published data where it reads any."
        )
    yield (
        f"The arms {_words(quick)} run on real data that ships with the packages.{paper} "
        + (f"Other presets have {_words(others)} as well. " if others else "")
        + f"`uv run poise info {method.name}` lists every setting."
    )
    if not results.verdicts:
        yield "No verdict is published yet."
    for preset in results.verdicts:
        yield from _verdicts(results, preset)


def _verdicts(results: Results, preset: str) -> Iterator[str]:
    method, verdict = results.method, results.verdicts[preset]
    seeds = len(verdict["seeds"])
    of_preset = "" if preset == "quick" else f" of the preset `{preset}`"
    yield f"### Verdicts{of_preset} over {seeds} seeds"
    if of_preset and preset in results.figures:
        yield _picture(method, preset)
    yield claims_table(verdict["claims"])
    yield f"### Measured{of_preset}, mean ± standard deviation over seeds"
    yield arms_table(verdict["arms"])
    asked = "" if preset == "quick" else f" --preset {preset}"
    yield (
        f"Reproduce with `uv run poise verify {method.name}{asked} --seeds {seeds}` "
        f"({number(verdict['seconds'])} s; {environment(verdict['environment'])})."
    )


def _picture(method: Method, preset: str) -> str:
    shown = "" if preset == "quick" else f" in the preset {preset}"
    return f"![What the experiment of {method.title} shows{shown}](../../results/{figure_name(method, preset)})"


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


def python_block(code: str) -> str:
    """Code with its fence."""
    return f"```python\n{code.strip()}\n```"


def as_sentence(text: str) -> str:
    """With a capital letter in front and one full stop behind."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _chips(method: Method) -> str:
    return " · ".join((f"`{method.name}`", FORMS[method.kind], *method.tags))


def _words(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
