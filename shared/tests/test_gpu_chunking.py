"""Work in chunks of bounded memory, which shrink when memory runs out."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from poise.core.gpu import (
    chunked_map,
    is_out_of_memory,
    peak_memory,
)

on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def out_of_memory(kind: str) -> None:
    """Run out of memory, as PyTorch says it on CUDA, really on the host, or as NumPy says it."""
    if kind == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind == "cublas":
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    if kind == "numpy":
        raise MemoryError("Unable to allocate 1.00 EiB")
    torch.empty(2**58)


class TestChunks:
    @given(
        st.integers(1, 23),
        st.integers(1, 30),
        st.integers(0, 2),
        st.booleans(),
        st.sampled_from([torch.float32, torch.float64]),
    )
    @settings(deadline=None)
    def test_result_and_gradient_equal_those_of_one_call(
        self, length: int, chunk: int, dim: int, recompute: bool, dtype: torch.dtype
    ) -> None:
        shape = [3, 3, 3]
        shape[dim] = length
        x = rand(*shape).to(dtype).requires_grad_()
        y = rand(*shape, seed=1).to(dtype).requires_grad_()

        def fn(x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sin()

        whole = fn(x, y)
        chunked = chunked_map(fn, x, y, chunk=chunk, dim=dim, recompute=recompute)
        assert torch.equal(chunked, whole)
        expected = torch.autograd.grad(whole.square().sum(), (x, y))
        actual = torch.autograd.grad(chunked.square().sum(), (x, y))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_several_results_are_joined_each(self) -> None:
        x = rand(10, 4)
        values, places = chunked_map(lambda rows: rows.topk(2, dim=1), x, chunk=3)
        expected = x.topk(2, dim=1)
        assert torch.equal(values, expected.values)
        assert torch.equal(places, expected.indices)

    def test_nothing_in_nothing_out(self) -> None:
        assert chunked_map(lambda rows: rows @ rand(4, 2), torch.zeros(0, 4), chunk=3).shape == (0, 2)

    @pytest.mark.parametrize("kind", ["cuda", "cublas", "numpy", "host"])
    def test_chunks_are_halved_until_they_fit_and_finished_ones_are_kept(self, kind: str) -> None:
        lengths: list[int] = []

        def fn(rows: Tensor) -> Tensor:
            lengths.append(len(rows))
            if len(rows) > 4:
                out_of_memory(kind)
            return rows * 2

        x = rand(21)
        assert torch.equal(chunked_map(fn, x), x * 2)
        assert lengths == [21, 11, 6, 3, 3, 3, 3, 3, 3, 3]

    def test_memory_that_runs_out_later_does_not_repeat_what_is_done(self) -> None:
        seen: list[float] = []

        def fn(rows: Tensor) -> Tensor:
            if rows[-1] >= 8 and len(rows) > 2:
                out_of_memory("cuda")
            seen.extend(rows.tolist())
            return rows

        x = torch.arange(12.0)
        assert torch.equal(chunked_map(fn, x, chunk=4), x)
        assert seen == x.tolist()

    def test_a_single_row_that_does_not_fit_is_an_error(self) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            chunked_map(lambda rows: out_of_memory("cuda") or rows, rand(4))

    def test_other_errors_come_through_at_once(self) -> None:
        calls = []

        def fn(rows: Tensor) -> Tensor:
            calls.append(len(rows))
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            chunked_map(fn, rand(8))
        assert calls == [8]
        assert not is_out_of_memory(RuntimeError("mat1 and mat2"))
        assert not is_out_of_memory(ValueError("out of memory"))

    def test_what_a_failed_call_held_is_free_before_the_next(self) -> None:
        held: list[weakref.ref[Tensor]] = []

        def fn(rows: Tensor) -> Tensor:
            assert all(reference() is None for reference in held)
            temporary = rows * 3
            held.append(weakref.ref(temporary))
            if len(rows) > 2:
                out_of_memory("cuda")
            return temporary + 0

        x = rand(8)
        gc.disable()
        try:
            assert torch.equal(chunked_map(fn, x), x * 3)
        finally:
            gc.enable()

    def test_memory_is_bounded_by_the_chunk(self) -> None:
        x, centres = rand(2_000, 8), rand(500, 8)

        def nearest(rows: Tensor) -> Tensor:
            return (rows[:, None] - centres).square().sum(2).min(1).values

        whole = peak_memory(lambda: nearest(x))
        chunked = peak_memory(lambda: chunked_map(nearest, x, chunk=100))
        assert chunked < whole / 15

    def test_recomputing_bounds_memory_under_autograd_too(self) -> None:
        x, centres = rand(2_000, 8), rand(500, 8).requires_grad_()

        def backward(**options: Any) -> None:
            def nearest(rows: Tensor) -> Tensor:
                return (rows[:, None] - centres).square().sum(2).min(1).values

            torch.autograd.grad(chunked_map(nearest, x, **options).sum(), centres)

        backward(chunk=100, recompute=True)
        kept = peak_memory(lambda: backward(chunk=100))
        recomputed = peak_memory(lambda: backward(chunk=100, recompute=True))
        assert recomputed < kept / 5

    def test_lengths_that_differ_and_empty_chunks_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"common length along dim 0, got shapes \[\(3,\), \(4,\)\]"):
            chunked_map(torch.add, torch.zeros(3), torch.zeros(4))
        with pytest.raises(ValueError, match="common length"):
            chunked_map(lambda: torch.zeros(1))
        with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
            chunked_map(torch.sin, torch.zeros(3), chunk=0)

    @pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)])
    def test_a_real_gpu_that_runs_out_is_served_in_halves(self, device: str) -> None:
        x = torch.rand(64, device=device)
        free, _ = torch.cuda.mem_get_info()

        def fn(rows: Tensor) -> Tensor:
            torch.empty(len(rows) * free // 16, dtype=torch.uint8, device=device)
            return rows * 2

        assert torch.equal(chunked_map(fn, x), x * 2)

    def test_no_device_is_hard_coded(self) -> None:
        with FakeTensorMode():
            x = torch.empty(10, 3, device="cuda")
            assert chunked_map(torch.sin, x, chunk=4).device.type == "cuda"
