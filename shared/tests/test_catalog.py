"""Laws of poise.core.catalog."""

from dataclasses import FrozenInstanceError, replace

import pytest

from poise.core.catalog import Headline, Method

METHOD = Method(
    slug="monge-gap",
    package="ot",
    title="Monge gap",
    kind="penalty",
    problem="learn a transport map for a cost of my choice",
    summary="Penalises the excess cost of a map over optimal transport.",
    formula=r"\frac 1 n \sum_i c(x_i, T(x_i)) - W_\epsilon",
    usage="gap = 1",
    api=("poise.ot.monge_gap",),
    presets=("quick", "paper"),
    arms=("baseline", "monge-gap"),
    headline=Headline(promise="the gap falls", metric="gap", arm="monge-gap", step="a step"),
    paper="Uscidda and Cuturi, The Monge Gap, ICML 2023",
    url="https://arxiv.org/abs/2302.04953",
    bibtex="@inproceedings{uscidda2023monge}",
)


def test_a_method_knows_its_full_name_and_where_its_experiment_is() -> None:
    assert METHOD.name == "ot/monge-gap"
    assert METHOD.experiment == "poise.ot.experiments.monge_gap"
    assert METHOD.tags == ()


def test_a_method_is_a_value() -> None:
    assert replace(METHOD) == METHOD
    assert hash(replace(METHOD)) == hash(METHOD)
    assert replace(METHOD, slug="other") != METHOD
    with pytest.raises(FrozenInstanceError):
        METHOD.slug = "other"


def test_every_field_is_named_when_a_method_is_made() -> None:
    with pytest.raises(TypeError, match="positional"):
        Method("monge-gap")
    with pytest.raises(TypeError, match="missing"):
        Method(slug="monge-gap")
