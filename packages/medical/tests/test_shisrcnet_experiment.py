"""The SHISRCNet experiment: every arm trains, BreaKHis is read as published, and a killed run resumes bit-identically."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from poise.core.data.wheels import MissingDataError, wheel_file
from poise.core.lab import Run
from poise.core.lab.errors import BadInput
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.medical import SHISRCLoss, SHISRCOutput
from poise.medical.experiments import shisrcnet as experiment
from poise.medical.experiments.shisrcnet import EXPERIMENT, SETUPS, build, warmed_up
from poise.medical.experiments.shisrcnet_data import Tiles, picture_tissue
from poise.medical.experiments.shisrcnet_measures import view_gap
from poise.medical.experiments.shisrcnet_parts import released_loss
from poise.medical.histopathology.resolution import degrade
from poise.medical.mil.tiles import WEIGHTS

QUICK = replace(EXPERIMENT.presets["quick"], hr_size=16, width=4, crops=128, warmup=1, epochs=1, batch=256)
PAPER = EXPERIMENT.presets["paper"]
train = partial(rehearse, EXPERIMENT)


@pytest.fixture(autouse=True, scope="module")
def _weights():
    try:
        wheel_file(*WEIGHTS)
    except MissingDataError as error:
        pytest.skip(str(error))


def test_every_arm_trains_and_all_are_compared(tmp_path):
    results = {arm: train(QUICK, arm, tmp_path) for arm in SETUPS}
    for claim in EXPERIMENT.claims:
        assert claim.metric in results[claim.arm].metrics
        assert claim.versus is None or claim.metric in results[claim.versus].metrics
    assert results["detached"].metrics["gradient_share"] == 0
    assert results["shisrcnet"].metrics["gradient_share"] > 0
    assert "psnr" not in results["hr"].metrics
    EXPERIMENT.compare(QUICK, results, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"arms.png", "curves.png", "images.png"}
    assert figures(results["shisrcnet"].dir) == {"curves.png", "images.png"}


def test_compare_draws_whatever_arms_ran(tmp_path):
    EXPERIMENT.compare(QUICK, {"hr": train(QUICK, "hr", tmp_path)}, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"arms.png", "curves.png"}


def test_two_stages_keep_the_super_resolution_of_the_warm_up(tmp_path):
    frozen = train(QUICK, "two_stage", tmp_path).load("shown")["restored"]
    state, _ = warmed_up(QUICK, 0, torch.device("cpu"))
    model = build(QUICK, SETUPS["two_stage"], 2).eval()
    model.upscaler.load_state_dict(state)
    shown = picture_tissue(QUICK.hr_size, QUICK.crops, 0).shown
    torch.testing.assert_close(model.upscaler(degrade(shown, 2)), frozen)


def test_the_shared_warm_up_leaves_the_random_numbers_of_a_run_alone(tmp_path):
    warmed_up.cache_clear()
    first = train(QUICK, "joint", tmp_path / "first").metrics
    second = train(QUICK, "joint", tmp_path / "second").metrics  # from the cache
    assert first == second


def test_tiles_of_the_two_parts_share_no_pixel_and_the_figure_shows_none_that_trains():
    tissue = picture_tissue(32, 4, 0)
    train_tiles = {tile.numpy().tobytes() for tile in tissue.train.read(range(len(tissue.train.labels)))}
    assert not train_tiles & {tile.numpy().tobytes() for tile in tissue.test.read(range(len(tissue.test.labels)))}
    assert all(left >= 288 for _, left in experiment_regions())
    green = tissue.textures.read([4, 6])
    assert torch.equal(green[:, 0], green[:, 2])
    assert not torch.equal(*tissue.textures.read([5])[0, :2])


def experiment_regions():
    from poise.medical.experiments.shisrcnet_data import SHOWN

    return SHOWN


def test_training_tiles_are_mirrored_and_test_tiles_are_not():
    tiles = Tiles(torch.rand(4, 3, 8, 8), torch.zeros(4).long(), ("tissue",))
    assert torch.equal(tiles.read([1, 3]), tiles.pixels[[1, 3]])
    assert not torch.equal(tiles.read(range(4), torch.Generator().manual_seed(0)), tiles.pixels)


def test_view_gap_is_the_difference_of_mean_cosines():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=2)
    others = cosines[~torch.eye(7, dtype=torch.bool)]
    assert view_gap(ours, theirs) == pytest.approx(float(cosines.diagonal().mean() - others.mean()))


def test_wiring_of_the_release_never_teaches_the_logits_the_class():
    logits, features = torch.randn(4, 2).requires_grad_(), torch.randn(4, 6).requires_grad_()
    hr = torch.rand(4, 3, 8, 8)
    output = SHISRCOutput(hr + 0.1, logits, features, torch.randn(4, 2), torch.randn(4, 6))
    labels = torch.tensor([0, 1, 1, 0])
    terms = released_loss(SHISRCLoss(), output, hr, labels)
    assert torch.autograd.grad(terms["classification"], logits, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(terms["classification"], features, retain_graph=True)[0].abs().sum() > 0
    turned = released_loss(SHISRCLoss(), output, hr, 1 - labels)
    torch.testing.assert_close(terms["contrastive"], turned["contrastive"])
    torch.testing.assert_close(terms["sr"], torch.tensor(0.1))


def test_an_interrupted_run_resumes_bit_identically(tmp_path):
    config = replace(QUICK, epochs=2, evaluate_every=1)
    check_resume(
        EXPERIMENT, config, "shisrcnet", tmp_path, kill=(experiment.Judge, "__call__", 2), restart=warmed_up.cache_clear
    )


# BreaKHis


def write_breakhis(root, magnifications=(100, 400)):
    """Tiny data set in the published layout: 700 x 460 pixels, as published."""
    rng = np.random.default_rng(0)
    for name, folder, short in (("benign", "adenosis", "A"), ("malignant", "ductal_carcinoma", "DC")):
        for index in range(4):
            slide = f"SOB_{name[0].upper()}_{short}"
            for magnification in magnifications:
                place = root / "BreaKHis_v1/histology_slides/breast" / name / "SOB" / folder
                place = place / f"{slide}_14-{10_000 + 100 * len(short) + index}" / f"{magnification}X"
                place.mkdir(parents=True)
                pixels = np.repeat(np.repeat(rng.integers(0, 256, (46, 70, 3), dtype=np.uint8), 10, 0), 10, 1)
                file = f"{slide}-14-{10_000 + 100 * len(short) + index}-{magnification}-001.png"
                Image.fromarray(pixels).save(place / file)
    return root


SLOW = pytest.mark.slow


@pytest.mark.parametrize("scale", [2, pytest.param(4, marks=SLOW), pytest.param(8, marks=SLOW)])
def test_paper_preset_trains_on_breakhis_at_the_published_sizes(scale, tmp_path):
    write_breakhis(tmp_path / "data", magnifications=(100,))
    config = replace(PAPER, scale=scale, epochs=1, workers=0, cache=tmp_path / "cache")
    result = train(config, "shisrcnet", tmp_path, data=tmp_path / "data")
    assert {"accuracy", "patient_accuracy", "accuracy_100x", "psnr", "ssim", "view_gap"} <= result.metrics.keys()
    shown = result.load("shown")
    assert shown["restored"].shape[1:] == (3, 384, 384)
    assert list((tmp_path / "cache").rglob("*.png"))


def test_other_arms_run_on_breakhis_per_magnification(tmp_path):
    write_breakhis(tmp_path / "data")
    config = replace(PAPER, hr_size=64, width=8, blocks=1, epochs=2, workers=0)
    for arm in ("baseline", "released", "hr"):
        result = train(config, arm, tmp_path, data=tmp_path / "data")
        assert {"accuracy_100x", "accuracy_400x"} <= result.metrics.keys()
    assert "two_stage" not in EXPERIMENT.arms_of("paper")


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(BadInput, match="BreaKHis_v1 as its publishers pack it"):
        train(PAPER, "shisrcnet", tmp_path)
    with pytest.raises(BadInput, match="expected BreaKHis_v1"):
        train(PAPER, "shisrcnet", tmp_path, data=tmp_path)
    write_breakhis(tmp_path / "data", magnifications=(100,))
    with pytest.raises(BadInput, match="no image of class 'benign' in a folder 40X"):
        train(replace(PAPER, magnification=40), "shisrcnet", tmp_path, data=tmp_path / "data")
