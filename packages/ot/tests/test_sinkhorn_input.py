"""Sinkhorn refuses bad input and says what it expected."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poise.ot import (
    RelativeEpsilon,
    SinkhornResult,
    SqEuclidean,
    sinkhorn,
    sinkhorn_points,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(-1)


def problem(n: int = 30, m: int = 40, d: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return masses(n), masses(m, seed=1), torch.cdist(normal(n, d, seed=2), normal(m, d, seed=3) + 0.5).square()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.tensor([1.0, 0.5, -0.5]).double()}, "non-negative masses, got -0.5"),
        ({"a": torch.zeros(3).double()}, "a must have a positive total"),
        ({"a": torch.tensor([1.0, 1.0, 0.0]).double()}, "same total mass, got 2 and 1"),
        ({"a": torch.full((4,), 0.25).double()}, r"needs a of shape \(3,\)"),
        ({"M": torch.tensor([[1.0, math.nan], [1, 1], [1, 1]]).double()}, "1 entries that are NaN or infinite"),
        ({"M": torch.ones(3).double()}, r"M must be \(n, m\)"),
        ({"reg": 0.0}, "reg must be positive"),
        ({"reg": -1.0}, "reg must be positive"),
        ({"reg": torch.ones(2)}, "reg must be one number"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_iter": 0}, "max_iter at least 1"),
        ({"init": (torch.zeros(2).double(), torch.zeros(2).double())}, "init must hold potentials"),
        ({"reg": RelativeEpsilon(0.1, cost=SqEuclidean())}, "needs the points"),
    ],
)
def test_bad_problems_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "a": torch.full((3,), 1 / 3).double(),
        "b": torch.full((2,), 1 / 2).double(),
        "M": torch.ones(3, 2).double(),
        "reg": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        sinkhorn(**(arguments | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(2) / 2, torch.ones(2) / 2, torch.ones(2, 2)), "NumPy arrays only"),
        ((torch.ones(2).double() / 2, torch.ones(2) / 2, torch.ones(2, 2)), "one dtype"),
        ((torch.ones(2), torch.ones(2), torch.ones(2, 2, dtype=torch.int64)), "floating-point"),
        (([0.5, 0.5], torch.ones(2) / 2, torch.ones(2, 2)), r"got list|\[0.5, 0.5\]"),
    ],
)
def test_mixed_kinds_are_refused(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        sinkhorn(*arguments, 0.1)


def test_unknown_methods_are_refused() -> None:
    unknown: Any = "newton"
    for solve in (
        partial(sinkhorn, None, None, torch.ones(2, 2), 0.1),
        partial(sinkhorn_points, normal(2, 2), None, 0.1),
    ):
        with pytest.raises(Exception, match="newton"):
            solve(method=unknown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": normal(5, 3)}, "expected x of shape"),
        ({"x": normal(5), "y": normal(5)}, "expected x of shape"),
        ({"x": normal(4, 2) * math.inf}, "NaN or infinite"),
        ({"a": masses(5)}, "masses must have shape"),
        ({"a": masses(4) * 2}, "same total mass"),
        ({"y": None, "b": masses(4)}, "b must be left out"),
        ({"reg": 0.0}, "reg must be positive"),
    ],
)
def test_bad_points_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": normal(4, 2), "y": normal(5, 2), "reg": 0.1}
    with pytest.raises(ValueError, match=message):
        sinkhorn_points(**(arguments | change))


@pytest.mark.parametrize(("factor", "statistic"), [(0.0, "mean"), (math.inf, "mean"), (0.1, "median")])
def test_bad_relative_epsilon_is_refused(factor: float, statistic: Any) -> None:
    with pytest.raises(Exception, match=r"relative epsilon|statistic"):
        RelativeEpsilon(factor, statistic)


def test_a_cost_of_zero_has_no_relative_epsilon() -> None:
    with pytest.raises(ValueError, match="reg must be positive"):
        sinkhorn(None, None, torch.zeros(3, 3), RelativeEpsilon(0.1))


def test_result_is_readable() -> None:
    result = sinkhorn(*problem(2, 2), 0.5)
    assert isinstance(result, SinkhornResult)
    assert "marginal_error" in repr(result)
