"""The ADELE experiment: every preset trains, reads the published formats, and resumes bit-identically."""

import importlib.util
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from poise.core.lab import Run
from poise.core.lab.errors import BadInput
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.medical.experiments import adele as experiment
from poise.medical.experiments.adele import EXPERIMENT, SETUPS
from poise.medical.experiments.adele_data import INK, badly_drawn, digit_masks
from poise.medical.experiments.adele_measures import LAST, MEASURES, early_learning
from poise.medical.experiments.adele_networks import DeepLabV1, UNet

QUICK = replace(EXPERIMENT.presets["quick"], train=8, test=6, width=4, levels=2, epochs=6, batch=4, evaluate_every=2)
FINAL = {"miou", "miou_best", "miou_drop", "label_iou", "label_iou_given", "label_gain", "inconsistency"}
TRIGGERS = {"triggered_classes", "first_trigger", "trigger_spread", "untriggered_changed"}
FOLLOWED = {"clean_peak", "noisy_rise", "clean_fall"}
train = partial(rehearse, EXPERIMENT)


@pytest.fixture(name="formats", scope="module")
def _formats():
    """Writers of the published formats, from the tests of the data sets."""
    spec = importlib.util.spec_from_file_location("adele_formats", Path(__file__).with_name("test_adele_data.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_arm_trains_and_all_are_compared(tmp_path):
    results = {arm: train(QUICK, arm, tmp_path) for arm in SETUPS}
    for result in results.values():
        assert result.metrics.keys() == FINAL | TRIGGERS | FOLLOWED
        assert figures(result.dir) == {"iou.png", "masks.png"}
    for claim in EXPERIMENT.claims:
        assert claim.metric in results[claim.arm].metrics
    EXPERIMENT.compare(QUICK, results, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"corrected.png", "early_learning.png", "miou.png"}


def test_compare_draws_whatever_arms_ran(tmp_path):
    EXPERIMENT.compare(QUICK, {"both": train(QUICK, "both", tmp_path)}, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"corrected.png", "miou.png"}


def test_arms_of_a_seed_share_images_masks_and_start(tmp_path):
    still = replace(QUICK, learning_rate=0.0, epochs=1)
    one, two = (train(still, arm, tmp_path) for arm in ("baseline", "correction"))
    assert all(torch.equal(value, two.load("masks")[name]) for name, value in one.load("masks").items())
    assert one.metrics["miou"] == two.metrics["miou"]
    other = train(still, "baseline", tmp_path / "other", seed=1).load("masks")
    assert not torch.equal(one.load("masks")["image"], other["image"])


def test_labels_are_corrected_in_the_arms_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "MEDICAL", replace(experiment.MEDICAL, tau_fg=0.2, tau_bg=0.2))

    def memorised(detector, epoch):
        detector.triggered[1:] = epoch >= 1
        detector.trigger_epochs[1:] = 1
        return detector.triggered.clone()

    monkeypatch.setattr(experiment.MemorizationDetector, "decide", memorised)
    for arm, setup in SETUPS.items():
        masks = train(QUICK, arm, tmp_path).load("masks")
        assert torch.equal(masks["noisy"], masks["corrected"]) is (setup.correction == "never")


def test_masks_of_digits_are_where_the_ink_is_and_training_masks_are_worse():
    task = digit_masks(0, (0, 1, 2, 3), 20, 10, "mixed")
    clean, given = task.clean(torch.arange(20)), task.store.read(torch.arange(20))
    assert all(len(mask.unique()) == 2 for mask in clean)
    assert not torch.equal(clean, given)
    for one, other in zip(clean, given, strict=True):
        assert set(other.unique().tolist()) <= set(one.unique().tolist())
    images, masks = next(task.test())
    assert images[masks[:, None] > 0].mean() > INK > images[masks[:, None] == 0].mean()
    assert 0.15 < (clean > 0).float().mean() < 0.35


def test_dilated_masks_are_the_true_ones_and_two_pixels_around():
    task = digit_masks(0, (0, 1, 2, 3), 10, 5, "dilated")
    clean, given = task.clean(torch.arange(10)), task.store.read(torch.arange(10))
    around = torch.nn.functional.max_pool2d(clean[:, None].float(), 5, 1, 2)[:, 0].long()
    assert torch.equal(given, around)
    with pytest.raises(ValueError, match="noise must be"):
        digit_masks(0, (0, 1, 2, 3), 10, 5, "eroded")
    with pytest.raises(ValueError, match="not 4000"):
        digit_masks(0, (0, 1, 2, 3), 2000, 2000, "mixed")


def test_mixed_noise_shrinks_grows_or_moves_a_mask():
    mask = torch.zeros(32, 32, dtype=torch.long)
    mask[10:20, 12:22] = 3
    areas = [int((badly_drawn(mask, 0, place, "mixed") == 3).sum()) for place in range(40)]
    assert set(areas) == {8 * 8, 14 * 14, 16 * 16, 10 * 10}  # eroded, dilated by 2 and by 3, shifted


def test_early_learning_is_what_comes_after_the_best_epoch():
    history = torch.zeros(20, len(MEASURES), dtype=torch.float64)
    history[:, MEASURES.index("iou_clean")] = torch.cat([torch.arange(10.0), 9 - torch.arange(1.0, 11)])
    history[:, MEASURES.index("iou_noisy")] = torch.arange(20.0)
    found = early_learning(history)
    assert found["clean_peak"] == 10
    assert found["noisy_rise"] == pytest.approx(sum(range(20 - LAST, 20)) / LAST - 9)
    assert found["clean_fall"] == pytest.approx(9 - 1)
    history[3] = torch.nan
    assert early_learning(history) == {}


@pytest.mark.parametrize("arm", ["both", "global"])
def test_an_interrupted_run_resumes_bit_identically(arm, tmp_path):
    check_resume(EXPERIMENT, QUICK, arm, tmp_path, kill=(experiment, "epoch_measures", 4))


# Published formats


@pytest.mark.parametrize("arm", ["baseline", "both"])
@pytest.mark.parametrize("inside", ["", "train"])
def test_paper_preset_trains_on_volumes(arm, inside, tmp_path, formats):
    formats.segthor(tmp_path / "data" / inside, ("Patient_01", "Patient_02", "Patient_08"), shape=(40, 36, 5))
    config = replace(EXPERIMENT.presets["paper"], size=32, width=4, epochs=4, batch=3)
    result = train(config, arm, tmp_path, data=tmp_path / "data")
    assert result.metrics.keys() == FINAL | TRIGGERS | FOLLOWED
    masks = result.load("masks")
    assert masks["noisy"].shape == (6, 32, 32)
    assert not torch.equal(masks["noisy"], masks["clean"])


def test_paper_preset_takes_a_step_at_its_published_size(tmp_path, formats):
    formats.segthor(tmp_path / "data", ("Patient_01", "Patient_08"), shape=(512, 512, 3))
    config = replace(EXPERIMENT.presets["paper"], epochs=1, batch=1, width=8)
    assert (config.size, config.learning_rate, config.momentum, config.gate) == (256, 0.01, 0.99, 0.8)
    result = train(config, "both", tmp_path, data=tmp_path / "data")
    assert result.load("masks")["image"].shape == (1, 1, 256, 256)


@pytest.mark.parametrize("arm", ["baseline", "both"])
def test_pascal_preset_trains_on_pictures_with_pseudo_labels(arm, tmp_path, formats, monkeypatch):
    folder = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    formats.voc(folder, {"2008_000021": (24, 30)}, split="val", pseudo="SegmentationClass")
    formats.voc(folder, {"2007_000032": (30, 40), "2007_000039": (33, 28)})
    monkeypatch.setattr(
        experiment, "PASCAL", replace(experiment.PASCAL, tau_fg=0.02, tau_bg=0.02, class_constraint=False)
    )

    def memorised(detector, epoch):
        detector.triggered[1:] = True
        return detector.triggered.clone()

    monkeypatch.setattr(experiment.MemorizationDetector, "decide", memorised)
    config = replace(EXPERIMENT.presets["pascal"], size=32, width=1, epochs=2, batch=2, interval=1.0)
    result = train(config, arm, tmp_path, data=tmp_path / "data")
    assert result.metrics.keys() >= FINAL | TRIGGERS
    assert (result.metrics["label_iou"] != result.metrics["label_iou_given"]) is (arm == "both")


def test_folders_without_patients_are_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no folder Patient_XX"):
        EXPERIMENT.run(EXPERIMENT.presets["paper"], "baseline", Run.scratch(tmp_path / "run", data=tmp_path))


def test_damaged_volumes_are_bad_input(tmp_path, formats):
    folder = formats.segthor(tmp_path / "data", ("Patient_01", "Patient_08"))
    (folder / "Patient_01" / "GT.nii.gz").write_bytes(struct.pack("<i", 348))
    with pytest.raises(BadInput, match="cut off"):
        EXPERIMENT.run(EXPERIMENT.presets["paper"], "baseline", Run.scratch(tmp_path / "run", data=folder))


# Networks


def test_networks_of_the_published_size_have_the_published_number_of_parameters():
    unet = sum(parameter.numel() for parameter in UNet(1, 5).parameters())
    assert unet == pytest.approx(13.4e6, rel=0.01)
    with torch.device("meta"):
        network = DeepLabV1(21)
    backbone = sum(parameter.numel() for parameter in network.backbone.parameters())
    assert backbone == pytest.approx(104e6, rel=0.03)  # ResNet38 without its classifier
    assert network(torch.empty(1, 3, 448, 448, device="meta")).shape == (1, 21, 56, 56)


def test_deeplab_keeps_the_statistics_of_its_backbone_and_trains_its_head_faster():
    network = DeepLabV1(21, width=1)
    before = {name: value.clone() for name, value in network.backbone.named_buffers()}
    network.train()
    network(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in network.backbone.named_buffers())
    groups = network.parameter_groups(5e-4)
    assert [group["factor"] for group in groups] == [1, 2, 10, 20]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0, 5e-4, 0]
    assert not network.backbone[0].weight.requires_grad


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_unet_takes_images_of_any_size(norm):
    assert UNet(1, 3, width=4, levels=3, norm=norm)(torch.randn(2, 1, 22, 33)).shape == (2, 3, 22, 33)


def test_training_starts_from_given_weights(tmp_path):
    torch.manual_seed(0)
    weights = UNet(1, 5, 4, 2, QUICK.norm).state_dict()
    torch.save(weights, tmp_path / "start.pt")
    task = digit_masks(0, (0, 1, 2, 3), 4, 4, "mixed")
    model = experiment.build(replace(QUICK, weights=str(tmp_path / "start.pt")), task)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
