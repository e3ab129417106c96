"""The record that describes a method, and what poise.core itself offers. Imports no torch, so that ``poise list`` is instant."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["penalty", "loss", "solver", "layer", "parametrization", "optimizer", "adapter", "training", "network"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a reader needs to choose a method, and what the command line and the docs need to find it.

    Attributes:
        slug: the method's name on the command line, ``monge-gap`` in ``ot/monge-gap``.
        package: the member that holds it, ``ot``; ``core`` for poise.core.
        title: its name in the literature.
        kind: what a user holds in hand.
        problem: the problem it solves, as its user would say it ("learn a transport map for a cost of my choice").
        summary: one sentence, what it does about that.
        formula: LaTeX without delimiters.
        usage: a few lines of Python that run as they are.
        api: dotted names of the public objects, most important first.
        presets: names of the experiment's presets, ``quick`` first.
        arms: names of the experiment's arms, ``baseline`` first.
        paper: authors, title, venue, year, in one line.
        url: where the paper is.
        bibtex: the BibTeX entry.
        tags: words people search for.
    """

    slug: str
    package: str
    title: str
    kind: Kind
    problem: str
    summary: str
    formula: str
    usage: str
    api: tuple[str, ...]
    presets: tuple[str, ...]
    arms: tuple[str, ...]
    paper: str
    url: str
    bibtex: str
    tags: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The full name, ``ot/monge-gap``."""
        return f"{self.package}/{self.slug}"

    @property
    def experiment(self) -> str:
        """The module whose ``EXPERIMENT`` shows the method at work."""
        return f"poise.{self.package}.experiments.{self.slug.replace('-', '_')}"


METHODS: tuple[Method, ...] = ()
