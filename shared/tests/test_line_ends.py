import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from poise.core.experiments.line_ends import name_line_ends, spread


def test_places_that_are_far_apart_stay() -> None:
    assert spread([0.9, 0.1, 0.5], 0.2) == pytest.approx([0.9, 0.1, 0.5])


def test_close_places_move_apart_around_their_mean() -> None:
    assert spread([0.5, 0.52, 0.48], 0.1) == pytest.approx([0.5, 0.6, 0.4])


def test_places_at_the_limits_stay_within_them_in_the_same_order() -> None:
    moved = spread([0.99, 0.01, 1.0, 0.0], 0.1)
    assert moved == pytest.approx([0.9, 0.1, 1.0, 0.0])


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_stand_at_the_ends_of_their_lines_in_their_colours(scale: str) -> None:
    axes = Figure().subplots()
    axes.plot([0, 1], [1.0, 100.0], label="up", color="C3")
    axes.plot([0, 1], [100.0, 1.0], label="down", color="C4")
    axes.plot([0, 1], [10.0, 10.0], label="other")
    axes.set_yscale(scale)
    name_line_ends(axes, {"up": "rises", "down": "falls"})
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    assert [name.get_text() for name in names] == ["rises", "falls"]
    assert [name.xy[1] for name in names] == pytest.approx([100.0, 1.0])
    assert [name.get_color() for name in names] == ["C3", "C4"]
