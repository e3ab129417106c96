import sys
from importlib.util import find_spec

import h5py
import numpy as np
import pytest
import tifffile
import torch
from skimage.data import immunohistochemistry

from poise.medical import FeatureBagDataset, Slide, Slides, SlideTiles, extract_features

needs_openslide = pytest.mark.skipif(
    find_spec("openslide") is None, reason="the extra poise-medical[slides] is not installed"
)

SIDE = 1_024
GLASS = 256
"""Width of the strip of empty glass at the left."""


@pytest.fixture(scope="module")
def pixels():
    """Stained tissue, twice as large as it comes, with a strip of glass beside it."""
    tissue = np.kron(immunohistochemistry(), np.ones((2, 2, 1), dtype=np.uint8))
    tissue[:, :GLASS] = 245
    return tissue


@pytest.fixture(scope="module")
def slide(tmp_path_factory, pixels):
    """A tiled TIFF of two levels at a quarter of a micrometre per pixel, as scanners write them."""
    path = tmp_path_factory.mktemp("slides") / "case.tif"
    options = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, resolution=(40_000, 40_000), **options)
        file.write(pixels[::2, ::2], resolution=(20_000, 20_000), subfiletype=1, **options)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory, pixels):
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "case.png"
    Image.fromarray(pixels).save(path)
    return path


@needs_openslide
def test_a_tile_is_the_region_of_the_slide_at_its_coordinates(slide, pixels):
    tiles = SlideTiles(slide, size=128, tissue=0)
    assert len(tiles) == (SIDE // 128) ** 2
    for index in (0, 9, len(tiles) - 1):
        tile = tiles[index]
        x, y = tile.coords.tolist()
        truth = torch.from_numpy(pixels[y : y + 128, x : x + 128]).permute(2, 0, 1) / 255
        torch.testing.assert_close(tile.pixels, truth)


@needs_openslide
def test_a_picture_gives_the_tiles_that_a_slide_does(slide, picture):
    scanned, ordinary = SlideTiles(slide, size=128), SlideTiles(picture, size=128)
    assert torch.equal(scanned.coords, ordinary.coords)
    torch.testing.assert_close(scanned[3].pixels, ordinary[3].pixels)


@needs_openslide
def test_glass_is_left_out(slide):
    tiles = SlideTiles(slide, size=128)
    assert 0 < len(tiles) <= (SIDE - GLASS) * SIDE // 128**2
    assert (tiles.coords[:, 0] >= GLASS).all()


@needs_openslide
def test_a_coarser_resolution_covers_more_with_a_tile_and_comes_from_the_coarser_level(slide, pixels):
    tiles = SlideTiles(slide, size=64, mpp=0.5, tissue=0)
    assert tiles.side == 128
    assert tiles.coords[1].tolist() == [128, 0]
    tile = tiles[20]
    x, y = tile.coords.tolist()
    torch.testing.assert_close(
        tile.pixels, torch.from_numpy(pixels[y : y + 128 : 2, x : x + 128 : 2].copy()).permute(2, 0, 1) / 255
    )


@needs_openslide
def test_resolutions_between_levels_are_scaled_from_the_finer_one(slide):
    tile = SlideTiles(slide, size=64, mpp=0.75, tissue=0)[5]
    assert tile.pixels.shape == (3, 64, 64)
    assert 0 <= tile.pixels.min() < tile.pixels.max() <= 1


@needs_openslide
def test_tiles_may_overlap(slide):
    tiles = SlideTiles(slide, size=128, stride=64, tissue=0)
    assert len(tiles) == ((SIDE - 128) // 64 + 1) ** 2


@needs_openslide
def test_features_are_read_back_as_a_bag(slide, tmp_path):
    tiles = SlideTiles(slide, size=64)
    root = tmp_path / "features"
    extract_features(tiles, lambda pixels: pixels.mean((2, 3)), root / "h5_files" / "case.h5", batch=7, workers=1)
    bag = FeatureBagDataset(root, "clam_h5", Slides.of([Slide("case", 0, "ann")]))[0]
    assert torch.equal(bag.coords, tiles.coords)
    torch.testing.assert_close(bag.features[11], tiles[11].pixels.mean((1, 2)), atol=1e-3, rtol=0)


@needs_openslide
def test_a_finished_file_is_kept_and_a_failed_one_leaves_none(slide, tmp_path):
    tiles, target = SlideTiles(slide, size=256), tmp_path / "case.h5"
    with pytest.raises(ValueError, match="row of finite features"):
        extract_features(tiles, lambda pixels: pixels.mean((1, 2, 3)), target)
    assert not target.exists()
    extract_features(tiles, lambda pixels: pixels.mean((2, 3)), target)
    extract_features(tiles, lambda pixels: pixels.amax((2, 3)), target)
    with h5py.File(target) as file:
        torch.testing.assert_close(
            torch.from_numpy(file["features"][0]).float(), tiles[0].pixels.mean((1, 2)), atol=1e-3, rtol=0
        )


def test_without_openslide_a_slide_says_what_to_install(slide, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r"poise-medical\[slides\]"):
        SlideTiles(slide)
    assert len(SlideTiles(picture)) > 0


@needs_openslide
def test_bad_input_is_refused(slide, picture, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.svs"):
        SlideTiles(tmp_path / "nothing.svs")
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    with pytest.raises(ValueError, match="not a slide"):
        SlideTiles(text)
    text.rename(tmp_path / "text.png")
    with pytest.raises(ValueError, match="not a picture"):
        SlideTiles(tmp_path / "text.png")
    with pytest.raises(ValueError, match="size and stride"):
        SlideTiles(slide, size=0)
    with pytest.raises(ValueError, match="tissue"):
        SlideTiles(slide, tissue=1.5)
    with pytest.raises(ValueError, match="covers 4096 pixels"):
        SlideTiles(slide, size=4_096)
    with pytest.raises(ValueError, match="mpp must be positive"):
        SlideTiles(slide, mpp=-1)
    with pytest.raises(ValueError, match=r"at least that of case\.tif"):
        SlideTiles(slide, mpp=0.1)
    with pytest.raises(ValueError, match="leave mpp out"):
        SlideTiles(picture, mpp=0.5)


def test_a_slide_of_glass_has_no_tile(tmp_path):
    from PIL import Image

    Image.new("RGB", (600, 600), (240, 240, 240)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match="shows tissue"):
        SlideTiles(tmp_path / "glass.png")
