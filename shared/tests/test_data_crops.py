"""Labelled crops and tiles of pictures."""

import socket
import urllib.request

import numpy as np
import pytest
import torch

from poise.core import data

pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may open a connection."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("data must not be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


class TestCrops:
    def test_crops_are_balanced_and_named_after_their_photograph(self) -> None:
        train, test = data.photograph_crops(size=16, train=5, test=3)
        assert train.inputs.shape == (5 * len(data.PHOTOGRAPHS), 3, 16, 16)
        assert test.targets.tolist() == [label for label in range(len(data.PHOTOGRAPHS)) for _ in range(3)]
        assert train.classes == data.PHOTOGRAPHS
        assert "china: CC-BY-2.0" in train.licence
        assert "Mikael" not in train.source

    def test_training_crops_come_from_the_left_and_test_crops_from_the_right(self, gradient: None) -> None:
        train, test = data.photograph_crops(16, train=200, test=200, names=["moon"], gray=True, left=0.5, gap=0.1)
        assert 0 <= train.inputs.min() < 0.02
        assert 0.48 < train.inputs.max() < 0.5
        assert 0.6 <= test.inputs.min() < 0.62
        assert 0.98 < test.inputs.max() < 1

    def test_scaled_crops_show_a_wider_stretch(self, gradient: None) -> None:
        plain, _ = data.photograph_crops(16, train=50, names=["moon"], gray=True)
        wide, _ = data.photograph_crops(16, train=50, names=["moon"], gray=True, scale=(0.5, 0.5))
        extent = [float((part.inputs[..., -1] - part.inputs[..., 0]).mean()) for part in (plain, wide)]
        assert extent[1] == pytest.approx(2 * extent[0], rel=0.05)
        assert wide.inputs.shape == plain.inputs.shape

    @pytest.fixture
    def gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Photographs whose brightness is the horizontal position, 0 at the left edge and 1 at the right."""
        pixels = ((torch.arange(400) + 0.5) / 400).expand(1, 300, 400)
        picture = data.Picture("moon", pixels, "CC0-1.0", "made up")
        monkeypatch.setattr("poise.core.data.crops.photographs", lambda names: dict.fromkeys(names, picture))

    def test_a_seed_fixes_the_crops(self) -> None:
        first, second, other = (data.photograph_crops(train=2, test=1, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.train.inputs, second.train.inputs)
        assert not torch.equal(first.train.inputs, other.train.inputs)

    def test_crops_stay_in_range_after_resizing(self) -> None:
        train, _ = data.photograph_crops(train=20, test=1, scale=(0.5, 1.0), gray=True)
        assert train.inputs.shape[1:] == (1, 32, 32)
        assert 0 <= train.inputs.min() < train.inputs.max() <= 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 300}, "crops of side 300 to 300 do not fit"),
            ({"size": 0}, "crops of side 0 to 0 do not fit"),
            ({"size": 1, "scale": (1.0, 3.0)}, "crops of side 0 to 1 do not fit"),
            ({"left": 1.0}, "left and gap"),
            ({"left": 0.6, "gap": 0.4}, "left and gap"),
            ({"scale": (1.0, 0.5)}, "scale must be"),
            ({"scale": (0.0, 0.5)}, "scale must be"),
            ({"names": ["mona lisa"]}, "no picture"),
        ],
    )
    def test_impossible_crops_are_refused(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            data.photograph_crops(**{"names": ["coins"], **arguments})

    @pytest.mark.parametrize("label", ["stain", "texture"])
    def test_histology_classes_are_halves_of_the_training_tiles(self, label: str) -> None:
        train, test = data.histology_tiles(label=label)
        assert train.inputs.shape == (465, 3, 32, 32)
        assert test.inputs.shape == (465, 3, 32, 32)
        assert int(train.targets.sum()) == 232
        assert 0.2 < test.targets.float().mean() < 0.8

    def test_histology_tiles_are_cut_row_by_row_from_their_side(self) -> None:
        train, test = data.histology_tiles(size=64, stride=64)
        pixels = data.histology().pixels
        assert torch.equal(train.inputs[5], pixels[:, 64:128, 64:128])
        assert torch.equal(test.inputs[0], pixels[:, :64, 256:320])

    def test_no_tile_lies_across_the_border(self) -> None:
        train, test = data.histology_tiles(left=0.656)
        assert (len(train), len(test)) == (31 * 20, 31 * 10)

    def test_histology_parts_may_lie_apart(self) -> None:
        train, test = data.histology_tiles(gap=32 / 512)
        assert torch.equal(train.inputs, data.histology_tiles().train.inputs)
        assert len(test) == 31 * 13
        assert torch.equal(test.inputs[0], data.histology().pixels[:, :32, 288:320])
        with pytest.raises(ValueError, match="left and gap must be shares"):
            data.histology_tiles(gap=0.5)

    def test_stain_follows_scikit_images_colour_deconvolution(self) -> None:
        from skimage.color import rgb2hed

        train, _ = data.histology_tiles()
        brown = rgb2hed(train.inputs.permute(0, 2, 3, 1).double().numpy())[..., 2].mean(axis=(1, 2))
        assert np.array_equal(train.targets.bool().numpy(), brown > np.sort(brown)[(len(brown) - 1) // 2])

    def test_texture_is_unmoved_by_a_change_of_brightness(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before, _ = data.histology_tiles(label="texture")
        picture = data.histology()
        darker = data.Picture("darker", picture.pixels - 0.1, "CC0-1.0", "made up")
        monkeypatch.setattr("poise.core.data.crops.histology", lambda: darker)
        after, _ = data.histology_tiles(label="texture")
        assert (before.targets == after.targets).float().mean() > 0.995

    def test_impossible_tiles_are_refused(self) -> None:
        with pytest.raises(ValueError, match="give no tile"):
            data.histology_tiles(size=300)
        with pytest.raises(ValueError, match="give no tile"):
            data.histology_tiles(stride=0)
        with pytest.raises(ValueError, match="label must be one of stain, texture, got 'colour'"):
            data.histology_tiles(label="colour")
