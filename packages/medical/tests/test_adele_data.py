"""Data sets in the formats that they are published in: SegTHOR's NIfTI volumes, PASCAL VOC with pseudo labels."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from poise.medical import LabelStore, SegTHORSlices, VOCCrops, VOCPseudoLabels
from poise.medical.segmentation.nifti import read_nifti
from poise.medical.segmentation.segthor import PATIENTS
from poise.medical.segmentation.voc import Masks


def volume(seed: int, shape: tuple[int, int, int] = (12, 10, 5)) -> tuple[np.ndarray, np.ndarray]:
    """CT numbers, and a mask of which the first and the last slice are empty."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(-1000, 1500, shape, dtype=np.int16)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[2:6, 3:8, 1:-1] = 1 + generator.integers(0, 4)
    return pixels, mask


def segthor(folder: Path, patients: tuple[str, ...], **shapes) -> Path:
    for seed, patient in enumerate(patients):
        pixels, mask = volume(seed, **shapes)
        (folder / patient).mkdir(parents=True)
        write(folder / patient / f"{patient}.nii.gz", pixels)
        write(folder / patient / "GT.nii.gz", mask)
    return folder


def voc(folder: Path, sizes: dict[str, tuple[int, int]], split: str = "trainaug", pseudo: str = "pseudo") -> Path:
    """Pictures of these names and (height, width), with masks drawn and pseudo."""
    generator = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClassAug", pseudo, "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"JPEGImages/{name}.jpg")
        for place, kind in enumerate(("SegmentationClassAug", pseudo)):
            mask = np.zeros(size, dtype=np.uint8)
            mask[2 : size[0] // 2 + place, 2 : size[1] // 2] = 15
            mask[0] = 255
            picture = Image.fromarray(mask, "P")
            picture.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
            picture.save(folder / kind / f"{name}.png")
    lines = "\n".join(sizes)
    (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{lines}\n")
    return folder


# NIfTI


def write(path: Path, voxels: np.ndarray) -> Path:
    """A volume as scanners' software writes it, with voxels of 0.9 x 0.8 x 2.5 mm."""
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.9, 0.8, 2.5, 1.0])), path)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volumes_come_back_as_they_were_written(tmp_path, dtype, suffix):
    voxels = np.arange(24).reshape(2, 3, 4).astype(dtype)
    read = read_nifti(write(tmp_path / f"v{suffix}", voxels))
    assert np.array_equal(read, voxels)
    assert read.dtype == np.dtype(dtype)


def test_volumes_of_the_other_byte_order_are_turned(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4), image.header.as_byteswapped(">")), tmp_path / "v.nii")
    read = read_nifti(tmp_path / "v.nii")
    assert np.array_equal(read, voxels)
    assert read.dtype.isnative


def test_scaled_volumes_are_in_their_unit(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = write(tmp_path / "v.nii", voxels)
    content = bytearray(path.read_bytes())
    struct.pack_into("<2f", content, 112, 2.0, -1024.0)  # slope and intercept
    path.write_bytes(content)
    assert read_nifti(path) == pytest.approx(2.0 * voxels - 1024)


def test_what_is_no_volume_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_nifti(tmp_path / "nothing.nii.gz")
    path = write(tmp_path / "v.nii.gz", np.random.default_rng(0).normal(size=(20, 30, 4)).astype(np.float32))
    whole = path.read_bytes()
    for content in (b"short", whole[: len(whole) // 2], gzip.compress(gzip.decompress(whole)[:-1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or cut off"):
            read_nifti(path)
    with pytest.raises(ValueError, match="NaN"):
        read_nifti(write(path, np.full((2, 3, 4), np.nan, dtype=np.float32)))


# SegTHOR


def test_patients_are_split_once_and_completely():
    everyone = [patient for part in PATIENTS.values() for patient in part]
    assert sorted(everyone) == [f"Patient_{number:02d}" for number in range(1, 41)]
    assert [len(PATIENTS[part]) for part in ("train", "validation", "test")] == [31, 5, 4]


def test_slices_with_organs_are_kept_in_picture_order(tmp_path):
    patients = ("Patient_01", "Patient_02")
    slices = SegTHORSlices(segthor(tmp_path, patients), patients, size=20)
    assert len(slices) == 6
    assert slices.patients == ["Patient_01"] * 3 + ["Patient_02"] * 3
    image, mask, index = slices[4]
    assert (tuple(image.shape), tuple(mask.shape), index) == ((1, 20, 20), (20, 20), 4)
    assert image.mean().item() == pytest.approx(0, abs=1e-5)
    assert image.std().item() == pytest.approx(1, abs=1e-4)
    label = int(mask.max())
    assert mask[10, 6] == label  # x 2..5 of 12 and y 3..7 of 10: rows are y
    assert mask[6, 16] == 0
    assert torch.equal(slices.image(torch.tensor([1, 4]))[1], image)


def test_slices_of_their_own_size_are_the_volume(tmp_path):
    slices = SegTHORSlices(segthor(tmp_path, ("Patient_01",), shape=(10, 10, 5)), ("Patient_01",), size=10)
    pixels, mask = volume(0, (10, 10, 5))
    assert np.array_equal(slices.labels.numpy(), mask.T[1:-1])
    expected = torch.from_numpy(pixels.T[1:-1].astype(np.float32))[0]
    assert torch.allclose(slices[0][0][0], (expected - expected.mean()) / expected.std(), atol=1e-5)


def test_bad_patients_are_refused(tmp_path):
    folder = segthor(tmp_path, ("Patient_01",))
    with pytest.raises(FileNotFoundError, match=r"Patient_03.nii.gz is missing"):
        SegTHORSlices(folder, ("Patient_01", "Patient_03"), 8)
    with pytest.raises(ValueError, match="size must be"):
        SegTHORSlices(folder, ("Patient_01",), 0)
    mask = folder / "Patient_01" / "GT.nii.gz"
    write(mask, np.zeros((12, 10, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"the volume is \(12, 10, 5\), its mask \(12, 10, 4\)"):
        SegTHORSlices(folder, ("Patient_01",), 8)
    write(mask, np.full((12, 10, 5), 9, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"classes 0..4; got \[9\]"):
        SegTHORSlices(folder, ("Patient_01",), 8)
    write(mask, np.zeros((12, 10, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match="shows an organ"):
        SegTHORSlices(folder, ("Patient_01",), 8)


# PASCAL VOC


SIZES = {"2007_000032": (20, 30), "2007_000039": (25, 18), "2008_000008": (20, 30)}


def test_pictures_and_pseudo_labels_are_read_in_their_own_size(tmp_path):
    images = VOCPseudoLabels(voc(tmp_path, SIZES), "pseudo")
    assert images.names == list(SIZES)
    store = LabelStore(images.masks, 21)
    for place, size in enumerate(SIZES.values()):
        image, index = images[place]
        assert image.shape == (3, *size)
        assert index == place
        assert store[place].shape == size == tuple(images.clean(place).shape)
        assert set(store[place].unique().tolist()) == {0, 15, 255}
        assert not torch.equal(store[place], images.clean(place))
    assert images[0][0].mean().abs() < 1  # normalised


def test_lists_may_hold_paths_and_pseudo_labels_lie_anywhere(tmp_path):
    folder = voc(tmp_path / "VOC2012", SIZES)
    lines = "\n".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in SIZES)
    (folder / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(lines)
    elsewhere = (folder / "pseudo").rename(tmp_path / "elsewhere")
    assert VOCPseudoLabels(folder, elsewhere).names == list(SIZES)


def test_crops_show_the_labels_in_use(tmp_path):
    images = VOCPseudoLabels(voc(tmp_path, SIZES), "pseudo")
    store = LabelStore(images.masks, 21)
    crops = VOCCrops(images, store, crop=24)
    image, labels, original, index = crops[0]
    assert (image.shape, labels.shape, original.shape, index) == ((3, 24, 24), (24, 24), (24, 24), 0)
    assert torch.equal(labels, original)
    store.labels.write(torch.tensor([0]), torch.full((1, 25, 30), 7))
    _, corrected, original, _ = crops[0]
    assert set(corrected.unique().tolist()) <= {7, 255}
    assert torch.equal(original, labels)


def test_crops_move_picture_and_masks_alike(tmp_path):
    folder = voc(tmp_path, SIZES)
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[4:12, 5:20] = 15
    for kind in ("JPEGImages/2007_000032.jpg", "pseudo/2007_000032.png"):
        picture = np.repeat(17 * mask[..., None], 3, 2) if "JPEG" in kind else mask
        Image.fromarray(picture).save(folder / kind, quality=100)
    images = VOCPseudoLabels(folder, "pseudo")
    crops = VOCCrops(images, LabelStore(images.masks, 21), crop=40, colour=0)
    seen = set()
    for epoch in range(8):
        crops.epoch = epoch
        image, labels, _, _ = crops[0]
        bright = image.mean(0) > 0.5
        inside = labels != 255
        assert (bright[inside] == (labels[inside] == 15)).float().mean() > 0.9
        assert not image[:, ~inside].any()
        seen.add(tuple(labels.flatten().tolist()))
    assert len(seen) == 8
    again = crops[0][1]
    assert torch.equal(again, labels)  # an epoch's draws depend on nothing but seed, epoch and image


def test_bad_folders_are_refused(tmp_path):
    folder = voc(tmp_path, SIZES)
    with pytest.raises(FileNotFoundError, match=r"train\.txt"):
        VOCPseudoLabels(folder, "pseudo", "train")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(folder / "pseudo" / "2007_000039.png")
    with pytest.raises(ValueError, match=r"2007_000039.jpg is \(18, 25\), its pseudo label .* is \(9, 9\)"):
        VOCPseudoLabels(folder, "pseudo")
    (folder / "pseudo" / "2007_000039.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2007_000039.png is missing"):
        VOCPseudoLabels(folder, "pseudo")
    (folder / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        VOCPseudoLabels(folder, "pseudo")


def test_bad_masks_are_refused_when_they_are_read(tmp_path):
    Image.fromarray(np.full((4, 4), 30, dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "b.png")
    masks = Masks([tmp_path / "a.png", tmp_path / "b.png"])
    with pytest.raises(ValueError, match=r"classes 0..20, or 255 to ignore a pixel; got \[30\]"):
        masks[0]
    with pytest.raises(ValueError, match="one class per pixel"):
        masks[1]


def test_crops_refuse_bad_settings(tmp_path):
    images = VOCPseudoLabels(voc(tmp_path, SIZES), "pseudo")
    with pytest.raises(ValueError, match="3 images, but a store of 2"):
        VOCCrops(images, LabelStore([images.masks[0], images.masks[1]], 21))
    with pytest.raises(ValueError, match="out of range"):
        VOCCrops(images, LabelStore(images.masks, 21), crop=0)
