"""poise.core.gpu: device, seeds, precision, memory, tiles, transfer and timing, on a CPU; on CUDA where there is one."""

import gc
import itertools
import random
import time
import weakref
from collections import UserDict, namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from poise.core.gpu import (
    StepTimer,
    chunked_map,
    derive_generator,
    deterministic,
    is_out_of_memory,
    peak_memory,
    pick_device,
    pick_precision,
    prefetch,
    seed_everything,
    seed_worker,
    tiled_apply,
)

BLENDS = ["linear", "hann", "gaussian", "nearest"]
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestDevice:
    @pytest.fixture
    def two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")

    @pytest.fixture
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu_auto_is_the_cpu(self) -> None:
        assert pick_device() == torch.device("cpu")
        assert pick_device(torch.device("cpu")) == torch.device("cpu")

    @pytest.mark.usefixtures("two_gpus")
    def test_with_gpus_auto_is_the_first_and_cuda_the_current_one(self) -> None:
        assert pick_device("auto") == torch.device("cuda", 0)
        assert pick_device("cuda") == torch.device("cuda", 1)
        assert pick_device("cuda:1") == torch.device("cuda", 1)
        assert pick_device("cpu") == torch.device("cpu")

    @pytest.mark.usefixtures("two_gpus")
    def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(self) -> None:
        with pytest.raises(ValueError, match=r"'cuda:2' was asked for, but there is cpu, cuda:0 \(Card 0\), cuda:1"):
            pick_device("cuda:2")

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize(
        ("built_with", "reason"), [("13.2", "sees no CUDA device"), (None, "is built without CUDA")]
    )
    def test_cuda_without_a_gpu_is_refused_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch, built_with: str | None, reason: str
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", built_with)
        with pytest.raises(ValueError, match=f"{reason}; there is cpu"):
            pick_device("cuda")

    @pytest.mark.usefixtures("no_gpu")
    def test_other_devices_must_be_there_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="'mps' was asked for"):
            pick_device("mps")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        assert pick_device("mps") == torch.device("mps")

    @pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
    def test_nonsense_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="device must be 'auto'"):
            pick_device(name)


class Draws(Dataset[tuple[float, float, float]]):
    """Four rows of random numbers, one from each global generator (NumPy caches every second normal number)."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[float, float, float]:
        return random.random(), float(np.random.mtrand.standard_normal()), torch.rand(()).item()


class TestSeeds:
    @staticmethod
    def draws() -> tuple[float, float, float]:
        return Draws()[0]

    def test_a_seed_fixes_all_global_generators(self) -> None:
        seed_everything(3)
        first = self.draws()
        seed_everything(3)
        assert self.draws() == first
        seed_everything(4)
        assert all(a != b for a, b in zip(self.draws(), first, strict=True))

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_out_of_range_is_refused(self, seed: int) -> None:
        with pytest.raises(ValueError, match=r"seed must lie in 0\.\.2\*\*63 - 1"):
            seed_everything(seed)

    def test_derived_generators_depend_on_the_path_and_on_nothing_else(self) -> None:
        def draw(*path: int | str) -> Tensor:
            return torch.rand(4, generator=derive_generator(0, *path))

        state = torch.get_rng_state()
        assert torch.equal(draw("augment", 1), draw("augment", 1))
        assert torch.equal(torch.get_rng_state(), state)
        paths = [(), ("augment",), ("augment", 1), ("augment", 2), ("noise", 1), ("augment", "1")]
        assert len({tuple(draw(*path).tolist()) for path in paths}) == len(paths)
        assert derive_generator(1).initial_seed() != derive_generator(2).initial_seed()

    def test_workers_differ_from_each_other_between_epochs_and_between_processes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def epochs(rank: int) -> list[tuple[float, float, float]]:
            monkeypatch.setenv("RANK", str(rank))
            generator = torch.Generator().manual_seed(0)
            loader = DataLoader(
                Draws(), batch_size=None, num_workers=2, worker_init_fn=seed_worker, generator=generator
            )
            return [tuple(row) for _ in range(2) for row in loader]

        first, again, other = epochs(0), epochs(0), epochs(1)
        assert first == again
        for of_one_library in zip(*first, *other, strict=True):
            assert len(set(of_one_library)) == 16

    def test_deterministic_restores_what_was_set_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        with deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark


class TestPrecision:
    def test_auto_is_float32_on_a_cpu(self) -> None:
        precision = pick_precision("cpu")
        assert precision.dtype is torch.float32
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
        assert not precision.scaler().is_enabled()

    @pytest.mark.parametrize(
        ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
    )
    def test_auto_on_cuda_follows_the_generation(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert pick_precision("cuda:0").dtype is dtype

    def test_bfloat16_computes_products_in_it_and_keeps_parameters(self) -> None:
        layer = nn.Linear(2, 2)
        precision = pick_precision("cpu", "bfloat16")
        with precision.autocast():
            assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
        assert layer.weight.dtype is torch.float32
        assert not precision.scaler().is_enabled()

    def test_float16_scales_gradients(self) -> None:
        assert pick_precision("cpu", "float16").scaler().is_enabled()

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="one of auto, float32, bfloat16, float16, got 'half'"):
            pick_precision("cpu", "half")


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


class TestTiles:
    @given(
        st.lists(st.integers(1, 19), min_size=2, max_size=3),
        st.integers(1, 12),
        st.integers(0, 11),
        st.sampled_from(BLENDS),
        st.integers(1, 5),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]),
    )
    @settings(deadline=None)
    def test_identity_gives_the_image_bit_for_bit(
        self, shape: list[int], tile: int, overlap: int, blend: Any, tiles_per_call: int, dtype: torch.dtype
    ) -> None:
        image = (rand(2, 3, *shape) * 255).to(dtype)
        overlap = min(overlap, tile - 1)
        result = tiled_apply(lambda tiles: tiles, image, tile, overlap, blend=blend, tiles_per_call=tiles_per_call)
        assert result.dtype == dtype
        assert torch.equal(result, image)

    @pytest.mark.parametrize("blend", BLENDS)
    @pytest.mark.parametrize("shape", [(37, 50), (13, 20, 17)])
    def test_super_resolution_tiles_land_where_they_belong(self, shape: tuple[int, ...], blend: Any) -> None:
        image = rand(1, 2, *shape)
        enlarge = nn.Upsample(scale_factor=3, mode="nearest")
        assert torch.equal(tiled_apply(enlarge, image, 9, 4, blend=blend), enlarge(image))

    @pytest.mark.parametrize("shape", [(40, 57), (14, 21, 19)])
    def test_nearest_equals_the_full_frame_when_the_overlap_covers_the_receptive_field(
        self, shape: tuple[int, ...]
    ) -> None:
        torch.manual_seed(0)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(shape)]
        network = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), conv(4, 2, 3, padding=1)).double()
        image = rand(1, 1, *shape).double()
        with torch.no_grad():
            tiled = tiled_apply(network, image, tile=11, overlap=4, blend="nearest")  # radius 2
            assert torch.allclose(tiled, network(image), atol=1e-12)
            seams = tiled_apply(network, image, tile=11, overlap=2, blend="nearest")
            assert not torch.allclose(seams, network(image), atol=1e-6)

    def test_an_image_smaller_than_the_tile_is_one_call(self) -> None:
        image = rand(2, 1, 5, 30)
        shapes = []

        def fn(tiles: Tensor) -> Tensor:
            shapes.append(tuple(tiles.shape))
            return tiles.cumsum(-1)

        assert torch.equal(tiled_apply(fn, image, 64, 16), fn(image))
        assert shapes[0] == (2, 1, 5, 30)

    @pytest.mark.parametrize("blend", ["linear", "hann", "gaussian"])
    def test_disagreeing_tiles_are_blended_gradually_and_symmetrically(self, blend: Any) -> None:
        values = iter([0.0, 1.0])
        image = torch.zeros(1, 1, 1, 24, dtype=torch.float64)
        row = tiled_apply(lambda tiles: tiles + next(values), image, (1, 16), (0, 8), blend=blend).flatten()
        assert (row[:8] == 0).all()
        assert (row[16:] == 1).all()
        assert (row[7:17].diff() > 0).all()
        assert torch.allclose(row + row.flip(0), torch.ones(24, dtype=torch.float64))

    def test_tiles_lie_inside_the_image_have_one_size_and_overlap_enough(self) -> None:
        image = torch.arange(100.0).reshape(1, 1, 1, 100)
        spans = []

        def fn(tiles: Tensor) -> Tensor:
            spans.append((int(tiles.min()), int(tiles.max()) + 1))
            return tiles

        tiled_apply(fn, image, (1, 32), (0, 8))
        assert {stop - start for start, stop in spans} == {32}
        assert (spans[0][0], spans[-1][1]) == (0, 100)
        gaps = [before[1] - after[0] for before, after in itertools.pairwise(spans)]
        assert min(gaps) >= 8
        assert max(gaps) - min(gaps) <= 1

    def test_more_tiles_per_call_change_nothing(self) -> None:
        image = rand(2, 3, 40, 40)
        conv = nn.Conv2d(3, 4, 3, padding=1)
        with torch.no_grad():
            one, seven = (tiled_apply(conv, image, 16, 4, tiles_per_call=count) for count in (1, 7))
        assert torch.allclose(one, seven, atol=1e-6)

    def test_gradients_flow_through_the_blend(self) -> None:
        image = rand(1, 1, 12, 12).double().requires_grad_()
        result = tiled_apply(lambda tiles: tiles * 2, image, 8, 4)
        (gradient,) = torch.autograd.grad(result.sum(), image)
        assert torch.allclose(gradient, torch.full_like(image, 2.0))

    def test_memory_that_runs_out_makes_fewer_tiles_per_call(self) -> None:
        sizes = []

        def fn(tiles: Tensor) -> Tensor:
            sizes.append(len(tiles))
            if len(tiles) > 2:
                out_of_memory("cuda")
            return tiles

        image = rand(1, 1, 32, 32)
        assert torch.equal(tiled_apply(fn, image, 8, 0, tiles_per_call=8), image)
        assert sizes == [8, 4, *[2] * 8]

    def test_memory_does_not_depend_on_the_size_of_the_image(self) -> None:
        def extra(side: int) -> float:
            image = rand(1, 1, side, side)
            network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 3, padding=1))
            with torch.no_grad():
                peak = peak_memory(lambda: tiled_apply(network, image, 64, 16))
            return peak - 2 * image.nbytes / 1e6  # the result, and the sum of the weights

        assert extra(640) == pytest.approx(extra(160), rel=0.1)

    def test_tiles_may_be_computed_elsewhere(self) -> None:
        with FakeTensorMode():
            image = torch.empty(1, 3, 40, 40)
            result = tiled_apply(lambda tiles: tiles.to("cuda") * 2, image, 16, 4)
            assert result.device.type == "cpu"
            assert tiled_apply(torch.sin, image.to("cuda"), 16, 4).device.type == "cuda"

    @pytest.mark.parametrize("device", DEVICES)
    def test_half_precision_is_blended_in_float32(self, device: str) -> None:
        image = torch.full((1, 1, 64, 64), 0.1, dtype=torch.bfloat16, device=device)
        assert torch.equal(tiled_apply(lambda tiles: tiles, image, 16, 8), image)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image": torch.zeros(1, 1, 8)}, "2 or 3 space dimensions"),
            ({"tile": 0}, "tile must be one number or 2, each at least 1"),
            ({"tile": (4, 4, 4)}, "tile must be one number or 2"),
            ({"overlap": -1}, "overlap must be one number or 2, each at least 0"),
            ({"overlap": 4}, "overlap must be smaller than the tile, got 4 and 4"),
            ({"tiles_per_call": 0}, "tiles_per_call must be at least 1"),
            ({"fn": lambda tiles: tiles[..., 1:]}, "a whole number of times as large"),
            ({"fn": lambda tiles: tiles.repeat_interleave(2, dim=3)}, "a whole number of times as large"),
            ({"fn": lambda tiles: tiles[:0]}, "as many tiles as it gets"),
            ({"blend": "cosine"}, "blend must be one of linear, hann, gaussian, nearest"),
            ({"fn": lambda tiles: tiles.mean(1)}, "as many tiles as it gets"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options: dict[str, Any], message: str) -> None:
        arguments = {"fn": torch.sin, "image": torch.zeros(1, 1, 8, 8), "tile": 4, "overlap": 0, **options}
        with pytest.raises(ValueError, match=message):
            tiled_apply(**arguments)


Pair = namedtuple("Pair", ["x", "y"])


class TestPrefetch:
    @pytest.mark.parametrize("device", DEVICES)
    def test_batches_come_in_order_with_their_containers(self, device: str) -> None:
        batches = [
            torch.arange(3.0),
            [torch.zeros(1), "name", 3],
            {"a": torch.ones(2), "b": (torch.zeros(1), None)},
            Pair(torch.ones(1), torch.zeros(1)),
            UserDict(ids=torch.ones(2)),
        ]
        moved = list(prefetch(batches, device))
        assert [type(batch) for batch in moved] == [type(batch) for batch in batches]
        assert moved[0].tolist() == [0, 1, 2]
        assert moved[1][1:] == ["name", 3]
        assert moved[2]["b"][1] is None
        assert moved[3].y.device.type == device
        assert moved[4]["ids"].device.type == device
        assert batches[4]["ids"].device.type == "cpu"  # the loader's own batch is left alone

    def test_nothing_is_read_ahead_of_time_on_a_cpu(self) -> None:
        read = []

        def loader() -> Any:
            for number in range(3):
                read.append(number)
                yield torch.tensor(number)

        batches = prefetch(loader(), "cpu")
        next(batches)
        assert read == [0]

    def test_on_cuda_the_next_copy_starts_before_a_batch_is_handed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []
        current = FakeStream("main", log)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("side", log))
        monkeypatch.setattr(torch.cuda, "stream", fake_stream_context)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(Tensor, "pin_memory", lambda self: log.append(f"pin {self.item()}") or self)
        monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: log.append(f"copy {self.item()}") or self)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda self, stream: log.append(f"used {self.item()} {stream.name}")
        )
        for batch in prefetch([torch.tensor(0), torch.tensor(1)], "cuda"):
            log.append(f"compute {batch.item()}")
        assert log == [
            *("pin 0", "copy 0", "side records 0"),
            *("pin 1", "copy 1", "side records 1"),
            *("main waits for 0", "used 0 main", "compute 0"),
            *("main waits for 1", "used 1 main", "compute 1"),
        ]


class FakeStream:
    """Writes down what a CUDA stream would be asked to do."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> SimpleNamespace:
        event = SimpleNamespace(number=self.events)
        self.log.append(f"{self.name} records {event.number}")
        self.events += 1
        return event

    def wait_event(self, event: SimpleNamespace) -> None:
        self.log.append(f"{self.name} waits for {event.number}")


@contextmanager
def fake_stream_context(stream: FakeStream) -> Any:
    yield


class TestTiming:
    @pytest.mark.parametrize("device", DEVICES)
    def test_parts_are_timed_in_milliseconds(self, device: str) -> None:
        timer = StepTimer(device, warmup=1)
        for _ in range(3):
            with timer("step"):
                torch.ones(10, device=device).sum()
                if device == "cpu":
                    time.sleep(0.01)
        assert len(timer.milliseconds()["step"]) == 2
        assert timer.median()["step"] > (10 if device == "cpu" else 0)

    def test_parts_may_nest(self) -> None:
        timer = StepTimer("cpu")
        with timer("outer"), timer("inner"):
            time.sleep(0.001)
        assert timer.median()["outer"] >= timer.median()["inner"] >= 1

    def test_a_part_that_failed_is_not_counted(self) -> None:
        timer = StepTimer("cpu")
        with pytest.raises(KeyError), timer("step"):
            raise KeyError("inside")
        assert timer.milliseconds() == {}

    def test_parts_with_nothing_but_warmup_have_no_median(self) -> None:
        timer = StepTimer("cpu", warmup=1)
        with timer("step"):
            pass
        assert timer.median() == {}
        with pytest.raises(ValueError, match="warmup must not be negative"):
            StepTimer("cpu", warmup=-1)

    def test_on_cuda_nothing_waits_until_the_times_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: str) -> None:
                log.append(f"record on {stream}")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, last: "Event") -> float:
                return 1.5

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
        timer = StepTimer("cuda")
        with timer("step"):
            log.append("work")
        assert log == ["record on main", "work", "record on main"]
        assert timer.median() == {"step": 1.5}
        assert log[-1] == "wait"


class TestPeakMemory:
    def test_temporaries_count_and_what_was_there_before_does_not(self) -> None:
        before = torch.zeros(1_000_000)
        assert peak_memory(lambda: (before + 1).sum()) == pytest.approx(4.0, abs=0.001)
        assert peak_memory(lambda: None) == 0

    def test_released_memory_is_counted_once(self) -> None:
        def call() -> None:
            for _ in range(5):
                torch.zeros(1_000_000)

        assert peak_memory(call) == pytest.approx(4.0)

    def test_releasing_what_was_there_before_is_not_negative(self) -> None:
        kept = [torch.zeros(1_000_000)]
        assert peak_memory(kept.clear) == 0

    def test_the_backward_pass_counts(self) -> None:
        x = torch.zeros(1_000_000, requires_grad=True)
        assert peak_memory(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 8.0

    def test_it_is_the_same_every_time(self) -> None:
        x = rand(300, 300)
        calls: list[Callable[[], Tensor]] = [lambda: torch.linalg.eigvalsh(x @ x.T)] * 3
        assert len({peak_memory(call, "cpu") for call in calls}) == 1

    def test_other_devices_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must be a CPU or CUDA device, got meta"):
            peak_memory(lambda: None, "meta")

    @pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)])
    def test_cuda_is_measured_where_the_call_allocates(self, device: str) -> None:
        torch.zeros(1, device=device)
        assert peak_memory(lambda: torch.zeros(1_000_000, device=device)) == pytest.approx(4.0, abs=0.2)
        assert peak_memory(lambda: torch.zeros(1_000_000)) == pytest.approx(4.0)
