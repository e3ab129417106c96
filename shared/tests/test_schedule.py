"""Laws of poise.core.schedule."""

import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.schedule import Constant, Cosine, Exponential, GaussianRamp, Linear, Piecewise, Schedule

law = settings(deadline=None, max_examples=50)
weights = st.floats(0, 1e6)
steps = st.integers(0, 10_000)
ramps = st.sampled_from([Linear, Cosine])
SCHEDULES: list[Schedule] = [
    Constant(0.3),
    Linear(0.0, 2.0, steps=10, delay=3),
    Cosine(1.0, 0.0, steps=10),
    GaussianRamp(2.0, steps=10),
    Exponential(1.0, 0.9, floor=0.1),
    Piecewise((3, 7), (0.0, 1.0, 0.5)),
]


@law
@given(ramp=ramps, start=weights, end=weights, length=st.integers(1, 500), delay=st.integers(0, 50), step=steps)
def test_ramps_go_from_start_to_end_without_leaving_the_interval(
    ramp: type[Linear] | type[Cosine], start: float, end: float, length: int, delay: int, step: int
) -> None:
    schedule = ramp(start, end, length, delay)
    assert schedule(0) == schedule(delay) == start
    assert schedule(delay + length) == schedule(delay + length + step) == end
    low, high = sorted((start, end))
    assert low * (1 - 1e-12) <= schedule(step) <= high * (1 + 1e-12)
    earlier, later = schedule(step), schedule(step + 1)
    assert (later - earlier) * (end - start) >= -1e-9 * (start + end) ** 2  # monotone up to rounding


def test_values_half_way_are_the_closed_forms() -> None:
    assert Linear(1.0, 3.0, steps=4)(1) == 1.5
    assert Cosine(1.0, 3.0, steps=4)(2) == pytest.approx(2.0)
    assert Cosine(1.0, 3.0, steps=4)(1) == pytest.approx(1 + (1 - math.cos(math.pi / 4)))
    assert GaussianRamp(2.0, steps=4)(2) == pytest.approx(2 * math.exp(-5 / 4))


def test_cosine_to_zero_is_the_usual_annealing() -> None:
    schedule = Cosine(0.1, 0.0, steps=50)
    for step in range(51):
        assert schedule(step) == pytest.approx(0.05 * (1 + math.cos(math.pi * step / 50)))


def test_the_gaussian_ramp_starts_just_above_zero_and_ends_at_its_end() -> None:
    schedule = GaussianRamp(3.0, steps=80)
    assert schedule(0) == pytest.approx(3 * math.exp(-5))
    assert schedule(80) == schedule(1_000) == 3.0


@law
@given(step=steps)
def test_exponential_decay_is_its_power_above_the_floor(step: int) -> None:
    assert Exponential(2.0, 0.99, floor=0.5)(step) == max(0.5, 2.0 * 0.99**step)


def test_pieces_begin_at_their_boundaries() -> None:
    schedule = Piecewise((3, 7), (0.0, 1.0, 0.5))
    assert [schedule(step) for step in (0, 2, 3, 6, 7, 100)] == [0.0, 0.0, 1.0, 1.0, 0.5, 0.5]
    assert Piecewise((), (0.4,))(9) == 0.4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_values(schedule: Schedule) -> None:
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    assert [twin(step) for step in range(20)] == [schedule(step) for step in range(20)]
    with pytest.raises(FrozenInstanceError):
        schedule.value = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0.0, 1.0, steps=0), "steps must be at least 1, got 0"),
        (lambda: Cosine(0.0, 1.0, steps=-1), "steps must be at least 1, got -1"),
        (lambda: GaussianRamp(1.0, steps=0), "steps must be at least 1"),
        (lambda: Linear(0.0, 1.0, steps=5, delay=-1), "delay must not be negative, got -1"),
        (lambda: Exponential(1.0, 0.0), r"decay must lie in \(0, 1\], got 0.0"),
        (lambda: Exponential(1.0, 1.5), "decay must lie in"),
        (lambda: Exponential(1.0, 0.5, floor=2.0), "floor must not be above start"),
        (lambda: Piecewise((1,), (1.0,)), "one entry more than boundaries, got 1 and 1"),
        (lambda: Piecewise((3, 3), (1.0, 2.0, 3.0)), "boundaries must increase"),
        (lambda: Piecewise((5, 3), (1.0, 2.0, 3.0)), "boundaries must increase"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
