"""Every backend must return what brute force in float64 returns, whatever the memory, the dtype, the ties and the cancellation."""

import importlib.util
import math
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from poise.core.gpu.memory import peak_memory
from poise.core.neighbors import adaptive
from poise.core.neighbors.adaptive import AdaptiveSearch
from poise.core.neighbors.boxes import BoxSearch
from poise.core.neighbors.libraries import FaissSearch, TreeSearch
from poise.core.neighbors.matmul import MatmulSearch
from poise.core.neighbors.search import Nearest, Neighbors, nearest

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
BACKENDS = ["auto", "matmul", "boxes", "kdtree", pytest.param("faiss", marks=needs_faiss)]


def brute_force(queries: Tensor, data: Tensor, k: int, exclude: Tensor | None = None) -> Nearest:
    squared = (queries.double()[:, None] - data.double()[None]).square().sum(-1)
    if exclude is not None:
        squared[torch.arange(len(queries)), exclude] = math.inf
    squared, order = squared.sort(dim=1, stable=True)
    return Nearest(squared[:, :k].sqrt(), order[:, :k])


def assert_same(found: Nearest, expected: Nearest) -> None:
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.distances.double(), expected.distances.double(), rtol=1e-6, atol=0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 300),
    columns=st.integers(1, 5),
    count=st.integers(1, 6),
    spread=st.sampled_from([1, 3, 1000]),
    data=st.data(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_equals_brute_force_with_ties_to_the_smaller_row(
    backend: Any, seed: int, rows: int, columns: int, count: int, spread: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, rows))
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-spread, spread + 1, (rows, columns), generator=generator).float()
    queries = torch.randint(-2 * spread, 2 * spread + 1, (count, columns), generator=generator).float() / 2
    assert_same(nearest(queries, points, k, backend), brute_force(queries, points, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "columns", "k"), [(5_003, 7, 1), (5_003, 7, 40), (20_000, 24, 3), (70, 64, 70)])
def test_equals_brute_force_on_larger_data(
    backend: Any, rows: int, columns: int, k: int, generator: torch.Generator
) -> None:
    data = torch.randn(rows, columns, generator=generator)
    queries = torch.cat([data[-3:], torch.randn(13, columns, generator=generator)])
    assert_same(nearest(queries, data, k, backend), brute_force(queries, data, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cancellation_far_from_the_origin_does_not_change_the_answer(
    backend: Any, dtype: torch.dtype, generator: torch.Generator
) -> None:
    centers = 1e4 * torch.randn(20, 6, generator=generator, dtype=torch.float64)
    data = (centers.repeat(100, 1) + 0.01 * torch.randn(2_000, 6, generator=generator, dtype=torch.float64)).to(dtype)
    queries = (centers + 0.01 * torch.randn(20, 6, generator=generator, dtype=torch.float64)).to(dtype)
    assert_same(nearest(queries, data, 5, backend), brute_force(queries, data, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_closer_than_float32_resolves_are_told_apart(backend: Any, generator: torch.Generator) -> None:
    order = torch.randperm(500, generator=generator)
    data = (1 + 1e-13 * order.double())[:, None] * torch.ones(3, dtype=torch.float64)
    found = nearest(data[:1] * 0, data, 500, backend)
    assert torch.equal(order[found.indices[0]], torch.arange(500))


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_rows_come_in_their_order(backend: Any) -> None:
    found = nearest(torch.zeros(3, 2), torch.ones(1_000, 2), 7, backend)
    assert torch.equal(found.indices, torch.arange(7).expand(3, 7))
    torch.testing.assert_close(found.distances, torch.full((3, 7), math.sqrt(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_logged_row_finds_itself_at_distance_zero(backend: Any, generator: torch.Generator) -> None:
    data = 100 + torch.randn(4_000, 9, generator=generator)
    found = nearest(data[::7], data, 1, backend)
    assert torch.equal(found.indices[:, 0], torch.arange(0, 4_000, 7))
    assert found.distances.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", [False, True])
def test_excluded_rows_are_never_returned(backend: Any, duplicates: bool, generator: torch.Generator) -> None:
    data = torch.randn(300, 3, generator=generator)
    if duplicates:
        data = data[torch.arange(300) // 6]
    own = torch.arange(300)
    found = nearest(data, data, 8, backend, exclude=own)
    assert_same(found, brute_force(data, data, 8, own))
    assert not (found.indices == own[:, None]).any()


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unit_of_length_does_not_matter(backend: Any, scale: float, generator: torch.Generator) -> None:
    data = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    queries = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    found = nearest(scale * queries, scale * data, 4, backend)
    assert torch.equal(found.indices, brute_force(queries, data, 4).indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e3, 1e10, 1e25])
def test_queries_far_outside_the_data(backend: Any, distance: float, generator: torch.Generator) -> None:
    data = torch.randn(2_000, 3, generator=generator, dtype=torch.float64)
    queries = distance * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    assert_same(nearest(queries, data, 3, backend), brute_force(queries, data, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_searched_exactly_and_give_float32_distances(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    data, queries = (
        torch.randn(3_000, 4, generator=generator).to(dtype),
        torch.randn(50, 4, generator=generator).to(dtype),
    )
    found = nearest(queries, data, 5)
    assert found.distances.dtype == torch.float32
    assert_same(found, brute_force(queries, data, 5))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["matmul", "boxes"])
def test_shortened_products_and_autocast_do_not_change_the_answer(
    backend: str, precision: str, generator: torch.Generator
) -> None:
    data, queries = torch.randn(3_000, 16, generator=generator), torch.randn(20, 16, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest(queries, data, 5, backend)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(found, brute_force(queries, data, 5))


def test_the_floor_is_proven_under_autocast_too(generator: torch.Generator) -> None:
    search = MatmulSearch(torch.randn(3_000, 16, generator=generator), 2**25)
    queries = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    plain = search.candidates(queries, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = search.candidates(queries, 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, lowered, strict=True))


@pytest.mark.parametrize("search", [MatmulSearch, TreeSearch, pytest.param(FaissSearch, marks=needs_faiss)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_no_row_outside_the_candidates_lies_below_the_floor(
    search: Any, offset: float, generator: torch.Generator
) -> None:
    data = offset + torch.randn(2_000, 8, generator=generator)
    queries = offset + 3 * torch.randn(50, 8, generator=generator, dtype=torch.float64)
    index, floor = search(data, 2**25).candidates(queries, 4)
    squared = (queries[:, None] - data.double()).square().sum(-1)
    squared.scatter_(1, index.clamp(max=1_999), math.inf)
    assert (squared.amin(1) >= floor).all()
    assert (squared.amin(1) <= 1.01 * floor).any()  # and it is not a void one


@hypothesis.given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3_000),
    columns=st.integers(1, 9),
    count=st.integers(1, 40),
    spread=st.sampled_from([2, 1000]),
    offset=st.sampled_from([0, 2**20]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_row_known_to_be_near_does_not_change_the_answer(
    seed: int, rows: int, columns: int, count: int, spread: int, offset: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = offset + torch.randint(-spread, spread + 1, (rows, columns), generator=generator).float()
    near = torch.randint(rows, (count,), generator=generator)
    queries = data[near] + torch.randint(-2, 3, (count, columns), generator=generator) / 2
    expected = brute_force(queries, data, 1)
    for backend in ("boxes", "matmul"):
        assert_same(Neighbors(data, backend).query(queries, near=near), expected)


@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_boxes_find_what_brute_force_finds_in_larger_data(noise: float, generator: torch.Generator) -> None:
    data = torch.randn(40_011, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    near = torch.randint(len(data), (70,), generator=generator)
    queries = data[near] + noise * torch.randn(70, 12, generator=generator)
    found = Neighbors(data, "boxes").query(queries, near=near)
    assert_same(found, brute_force(queries, data, 1))
    assert noise or found.distances.count_nonzero() == 0


def test_boxes_rule_most_rows_out(generator: torch.Generator) -> None:
    data = torch.randn(20_000, 6, generator=generator)
    search = BoxSearch(data, 2**28)
    queries = (data[:50] + 0.05).double()
    pairs = sum(len(row) for _, row in search.within(queries, torch.full((50,), 6 * 0.05**2, dtype=torch.float64)))
    assert 50 <= pairs < 200
    _, leaf = search._reached((search.frame(queries) @ search.axes).float(), torch.full((50,), 1e-4))
    assert len(leaf) < 0.2 * 50 * search.leaves


@pytest.mark.parametrize(("pace", "chosen"), [(0.5, True), (2.0, False)])
def test_auto_takes_boxes_for_bounded_queries_if_they_measure_faster(
    pace: float, chosen: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    clock = Clock()
    clock.slow_down(monkeypatch, MatmulSearch, 1.0)
    clock.slow_down(monkeypatch, TreeSearch, 2.0)
    within = BoxSearch.within

    def timed(this: Any, queries: Tensor, squared: Tensor) -> Any:
        clock.now += pace * len(queries)
        return within(this, queries, squared)

    monkeypatch.setattr(BoxSearch, "within", timed)
    monkeypatch.setattr(adaptive.time, "perf_counter", lambda: clock.now)
    data = torch.randn(3_000, 3, generator=generator)
    index, near = Neighbors(data), torch.arange(64)
    answers = [index.query(data[:64] + 0.1, near=near) for _ in range(3)]
    assert isinstance(index._search, AdaptiveSearch)
    assert (index._search.boxes is not None) is chosen
    assert not index._search.undecided_on_balls
    for answer in answers:
        assert_same(answer, brute_force(data[:64] + 0.1, data, 1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [2**17, 2**20])
def test_working_memory_stays_within_the_budget(tied: bool, budget: int, generator: torch.Generator) -> None:
    data = torch.zeros(3_000, 5) if tied else torch.randn(3_000, 5, generator=generator)
    queries = torch.randn(20, 5, generator=generator)
    index = Neighbors(data, "matmul", memory=budget)
    found: list[Nearest] = []
    peak = 1e6 * peak_memory(lambda: found.append(index.query(queries, 2)))
    assert peak <= budget + 8 * (queries.numel() + 4 * len(queries) * 2)
    assert_same(found[0], brute_force(queries, data, 2))


def test_too_little_memory_says_how_much_suffices(generator: torch.Generator) -> None:
    data, queries = torch.randn(10_000, 5, generator=generator), torch.randn(3, 5, generator=generator)
    with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes") as error:
        nearest(queries, data, 2, "matmul", memory=10)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert_same(nearest(queries, data, 2, "matmul", memory=needed), brute_force(queries, data, 2))


class Clock:
    """Stands for the wall clock: only the searches advance it, by a set time per query."""

    now = 0.0

    def slow_down(self, monkeypatch: pytest.MonkeyPatch, search: type, pace: float) -> None:
        candidates = search.candidates

        def timed(this: Any, queries: Tensor, count: int) -> Any:
            self.now += pace * len(queries)
            return candidates(this, queries, count)

        monkeypatch.setattr(search, "candidates", timed)


@pytest.mark.parametrize(("tree_pace", "winner"), [(0.5, TreeSearch), (2.0, MatmulSearch), (99.0, MatmulSearch)])
def test_auto_settles_for_what_measures_faster_and_answers_the_same(
    tree_pace: float, winner: type, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    clock = Clock()
    clock.slow_down(monkeypatch, MatmulSearch, 1.0)
    clock.slow_down(monkeypatch, TreeSearch, tree_pace)
    monkeypatch.setattr(adaptive.time, "perf_counter", lambda: clock.now)
    data, queries = torch.randn(3_000, 3, generator=generator), torch.randn(64, 3, generator=generator)
    index = Neighbors(data)
    search = index._search
    assert isinstance(search, AdaptiveSearch)
    first = index.query(queries, 3)
    assert isinstance(search.current, MatmulSearch)
    second = index.query(queries, 3)
    assert isinstance(search.current, winner)
    assert not search.undecided
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.distances, second.distances)


def test_auto_may_change_within_one_large_call(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(adaptive, "_TREE_SECONDS_PER_ROW", 0.0)
    data, queries = torch.randn(500, 2, generator=generator), torch.randn(2_500, 2, generator=generator)
    assert_same(nearest(queries, data, 2), brute_force(queries, data, 2))


def test_no_gradient_and_no_change_of_the_inputs(generator: torch.Generator) -> None:
    data, queries = torch.randn(100, 3, generator=generator), torch.randn(4, 3, generator=generator).requires_grad_()
    copies = data.clone(), queries.detach().clone()
    distances, indices = nearest(queries, data)
    assert not distances.requires_grad
    assert torch.equal(data, copies[0])
    assert torch.equal(queries, copies[1])
    (queries[:, None] - data[indices]).norm(dim=-1).sum().backward()
    torch.testing.assert_close(queries.grad, (queries - data[indices[:, 0]]).detach() / distances)


def test_no_queries_give_an_empty_answer() -> None:
    distances, indices = nearest(torch.empty(0, 3), torch.ones(5, 3), 2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "data", "options", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(5, 3), {"k": 6}, ValueError, r"k must lie in 1\.\.5 for 5 rows, got 6"),
        (torch.ones(2, 3), torch.ones(5, 3), {"k": 5, "exclude": torch.zeros(2).long()}, ValueError, r"1\.\.4"),
        (
            torch.ones(2, 3),
            torch.ones(5, 3),
            {"exclude": torch.zeros(3).long()},
            ValueError,
            r"shape \(2,\), got \(3,\)",
        ),
        (torch.ones(2, 4), torch.ones(5, 3), {}, ValueError, "queries have 4 columns, the data 3"),
        (torch.ones(3), torch.ones(5, 3), {}, ValueError, r"queries must have shape \(rows, columns\), got \(3,\)"),
        (torch.ones(2, 3), torch.ones(0, 3), {}, ValueError, r"at least one row and one column, got shape \(0, 3\)"),
        (torch.ones(2, 3).long(), torch.ones(5, 3), {}, TypeError, "queries must be floating-point, got torch.int64"),
        (torch.ones(2, 3), torch.ones(5, 3).int(), {}, TypeError, "data must be floating-point, got torch.int32"),
        (torch.full((2, 3), math.nan), torch.ones(5, 3), {}, ValueError, "queries must be finite"),
        (torch.full((2, 3), math.nan), torch.ones(5, 3), {"backend": "boxes"}, ValueError, "queries must be finite"),
        (torch.full((2, 3), math.inf), torch.ones(5, 3), {}, ValueError, "queries must be finite"),
        (torch.ones(2, 3), torch.full((5, 3), math.nan), {}, ValueError, "data must be finite"),
        (torch.ones(2, 3).double(), torch.full((5, 3), 1e200, dtype=torch.float64), {}, ValueError, "at most 1e.150"),
    ],
)
def test_bad_input_is_refused(
    queries: Tensor, data: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nearest(queries, data, **options)


@pytest.mark.parametrize("options", [{"near": torch.zeros(3).long()}, {"near": torch.zeros(2).long(), "k": 2}])
def test_near_rows_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"near must have shape \(2,\) and goes with k = 1"):
        Neighbors(torch.ones(5, 3)).query(torch.ones(2, 3), **options)
    with pytest.raises(ValueError, match="queries must be finite"):
        Neighbors(torch.ones(5, 3), "boxes").query(torch.full((2, 3), math.nan), near=torch.zeros(2).long())


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'ball_tree'"):
        Neighbors(torch.ones(2, 2), "ball_tree")


@pytest.mark.parametrize(
    ("backend", "module", "package"), [("kdtree", "scipy.spatial", "scipy"), ("faiss", "faiss", "faiss-cpu")]
)
def test_a_missing_library_is_named(backend: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"backend '{backend}' needs .*: pip install {package}"):
        Neighbors(torch.ones(2, 2), backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["auto", "boxes"])
def test_answers_on_the_gpu_equal_those_on_the_cpu(backend: str, generator: torch.Generator) -> None:
    data, queries = torch.randn(50_000, 23, generator=generator), torch.randn(256, 23, generator=generator)
    found = Neighbors(data.cuda(), backend).query(queries.cuda(), 4)
    assert_same(Nearest(found.distances.cpu(), found.indices.cpu()), brute_force(queries, data, 4))
