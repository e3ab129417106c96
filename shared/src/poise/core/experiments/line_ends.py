"""Names of curves at their ends, in place of a legend."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def name_line_ends(axes: "Axes", names: Mapping[str, str], *, fontsize: float = 12) -> None:
    """Write the name of each line to the right of its last point, in its colour; names that would overlap move apart.

    Call it last: the limits of the axes stay as they are.

    Args:
        axes: with one line per entry of ``names``, which carries the key as its label.
        names: what to write, by label; other lines get no name.
        fontsize: in points.
    """
    lines = [line for line in axes.get_lines() if line.get_label() in names]
    axes.set_ylim(axes.get_ylim())
    to_share, to_data = axes.transScale + axes.transLimits, (axes.transScale + axes.transLimits).inverted()
    height = axes.bbox.height * 72 / axes.figure.dpi
    last = [np.asarray(line.get_xydata())[-1] for line in lines]
    ends = [float(to_share.transform(point)[1]) for point in last]
    right = axes.get_xlim()[1]
    for line, place in zip(lines, spread(ends, 1.2 * fontsize / height), strict=True):
        axes.annotate(
            names[str(line.get_label())],
            (right, float(to_data.transform((0, place))[1])),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=fontsize,
            color=line.get_color(),
            annotation_clip=False,
        )


def spread(places: Sequence[float], distance: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The places nearest to these, in squares, that keep their order and are ``distance`` apart, within the limits if all fit.

    Less ``distance`` times its rank, each place must not fall below the one before: an isotonic regression.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    pools: list[tuple[float, int]] = []  # mean and count of neighbours that move together
    for rank, index in enumerate(order):
        mean, count = places[index] - distance * rank, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    ceiling = high - distance * (len(places) - 1)
    level = [max(low, min(mean, ceiling)) for mean, count in pools for _ in range(count)]
    return [level[rank] + distance * rank for rank in map(order.index, range(len(places)))]
