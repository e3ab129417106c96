"""Large images in overlapping tiles."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from poise.core.gpu import (
    peak_memory,
    tiled_apply,
)

BLENDS = ["linear", "hann", "gaussian", "nearest"]
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


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
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
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
