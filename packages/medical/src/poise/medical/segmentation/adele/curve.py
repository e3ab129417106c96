r"""The curve of a class's training IoU, and the epoch from which the class is being memorised.

>>> import numpy as np
>>> t = np.linspace(0, 30, 30)
>>> iou = 0.8 * (1 - np.exp(-(t**0.7) / 3))
>>> [round(value, 3) for value in fit_iou_curve(iou)]
[0.8, 0.7, 3.0]
>>> memorization_epoch(iou, total_epochs=100, skip_flat=False), memorization_epoch(iou[:3], total_epochs=100)
(12, None)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Curve = Sequence[float] | npt.NDArray[np.floating] | Tensor
Bounds = tuple[tuple[float, float, float], tuple[float, float, float]]

BOUNDS: Bounds = ((0.0, 0.0, 0.0), (1.0, 1.0, np.inf))
"""Least and largest a, b and c."""

FEWEST = 4
"""Values that a decision needs: one more than the curve has parameters."""

FLAT = 0.1
"""A rise from one value to the next that ends a flat start."""

_SMALL_TIME = 1e-6  # keeps t^(b-1) finite at t = 0
_TINY = float(np.finfo(np.float64).tiny)  # c may be fitted as 0


class IoUCurve(NamedTuple):
    """Parameters of :math:`f(t) = a (1 - \\exp(-t^b / c))`."""

    a: float
    b: float
    c: float

    def __call__(self, t: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """IoU at time ``t``."""
        return _curve(np.asarray(t, dtype=np.float64), *self)

    def slope(self, t: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Its derivative at time ``t`` (in epochs)."""
        a, b, c = self.a, self.b, max(self.c, _TINY)
        s = np.asarray(t, dtype=np.float64) + _SMALL_TIME
        return np.asarray(
            a * b * s ** (b - 1) * np.exp(-(s**b) / c) / c
        )  # where a step makes c tiny, the exponential is 0


def fit_iou_curve(iou: Curve, epochs: Curve | None = None, bounds: Bounds = BOUNDS) -> IoUCurve:
    r"""Least squares fit of :math:`f(t) = a (1 - \exp(-t^b / c))` to the training IoU of one class.

    .. math:: \min_{a, b, c} \sum_k \left( \frac{f(t_k) - y_k}{\sigma_k} \right)^2, \qquad \sigma_k \text{ geometric from 1 to } 0.1

    so that the last value weighs 100 times the first. By trust-region reflective steps from (1, 1, 1).

    Args:
        iou: y, one value per evaluation, from 0 to 1.
        epochs: t, when each was measured. By default n values spread evenly over 0..n, the first at time 0.
        bounds: least and largest (a, b, c).

    Returns:
        (a, b, c).

    Raises:
        ValueError: fewer than three values, a value that is not finite or not in [0, 1], or ``epochs`` do not fit.
        RuntimeError: the fit does not converge.

    Source:
        Liu et al. 2022, section 3 (adaptive label correction); the weights and where time begins from the authors' code.
    """
    from scipy.optimize import curve_fit

    y = _values(iou, "iou")
    if len(y) < 3:
        raise ValueError(f"iou must hold at least 3 values, as many as the curve has parameters, got {len(y)}")
    t = np.linspace(0, len(y), len(y)) if epochs is None else _values(epochs, "epochs", largest=np.inf)
    if t.shape != y.shape:
        raise ValueError(f"epochs must have one value for each of iou, got {len(t)} and {len(y)}")
    start = np.clip(np.ones(3), bounds[0], bounds[1])
    weights = np.geomspace(1, 0.1, len(y))
    with np.errstate(all="ignore"):  # steps towards c = 0
        found, _ = curve_fit(_curve, t, y, p0=start, sigma=weights, absolute_sigma=True, bounds=bounds, method="trf")
    return IoUCurve(*(float(value) for value in found))


def memorization_epoch(
    iou: Curve, total_epochs: int, r: float = 0.9, skip_flat: bool = True, interval: float = 1.0
) -> int | None:
    r"""First epoch t* from which a class counts as memorised.

    With :math:`\rho_t = | |f'(t)| - |f'(1)| | / |f'(1)|`, values above 1 set to 0,

    .. math:: t^* = 1 + \#\{t \in 1..T-1 : \rho_t \le r\}

    Args:
        iou: training IoU of the class, one value per ``interval``.
        total_epochs: T, the length of the training.
        r: how much of its slope the curve has to lose.
        skip_flat: leave out leading values up to the first rise by 0.1, and add their time to t*.
        interval: epochs between two values; below 1 when the IoU is measured within epochs.

    Returns:
        t*, or None where it cannot be told: fewer than four values (after the flat start), values that are all the same, or a
        curve that has no slope at epoch 1.

    Raises:
        ValueError: a value is not finite or not in [0, 1], ``total_epochs`` is below 1, ``r`` is not in [0, 1], or ``interval`` is
            not positive.

    Source:
        Liu et al. 2022, section 3 (adaptive label correction); the flat start from the authors' code for SegTHOR.
    """
    if total_epochs < 1:
        raise ValueError(f"total_epochs must be at least 1, got {total_epochs}")
    if not 0 <= r <= 1:
        raise ValueError(f"r must lie in [0, 1], got {r}")
    if not interval > 0:
        raise ValueError(f"interval must be positive, got {interval}")
    y = _values(iou, "iou")
    dropped = flat_start(y) if skip_flat else 0
    y = y[dropped:]
    if len(y) < FEWEST or np.ptp(y) == 0:
        return None
    try:
        curve = fit_iou_curve(y, np.linspace(0, len(y) * interval, len(y)))
    except RuntimeError:  # no convergence: nothing can be told yet, the next value may settle it
        return None
    first = float(curve.slope(1))
    if not (np.isfinite(first) and first > 0):
        return None
    change = np.abs(curve.slope(np.arange(1, total_epochs)) - first) / first
    change[change > 1] = 0
    return 1 + int((change <= r).sum()) + int(np.ceil(dropped * interval))


def flat_start(iou: npt.NDArray[np.floating]) -> int:
    """How many leading values come before the first rise by ``FLAT``."""
    rises = np.flatnonzero(np.diff(iou) >= FLAT)
    return int(rises[0]) if len(rises) else max(len(iou) - 1, 0)


def _curve(t: npt.NDArray[np.float64], a: float, b: float, c: float) -> npt.NDArray[np.float64]:
    return np.asarray(a * (1 - np.exp(-(t**b) / max(c, _TINY))))


def _values(given: Curve, name: str, largest: float = 1.0) -> npt.NDArray[np.float64]:
    values = np.asarray(given.detach().double().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must be one value after the other, got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any() or (values > largest).any():
        raise ValueError(f"{name} must be finite and lie in [0, {largest:g}], got {values.tolist()}")
    return values
