"""The PS-KD experiment: every arm trains, and the published files are read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from poise.core.experiments import ps_kd
from poise.core.experiments.ps_kd import EXPERIMENT, Config
from poise.core.experiments.ps_kd_measures import spearman
from poise.core.lab import ArmResult
from poise.core.lab.run import Run

SMALL = Config(train=100, test=50, epochs=4, batch=25)


@pytest.mark.parametrize("arm", EXPERIMENT.arms)
def test_every_arm_trains_and_measures(arm: str, tmp_path: Path) -> None:
    metrics = EXPERIMENT.run(SMALL, arm, Run.scratch(tmp_path))
    assert all(np.isfinite(value) for value in metrics.values())
    assert ("gradient_ratio_error" in metrics) is (arm == "ps_kd")
    assert metrics["nll"] > 0
    if arm == "ps_kd":
        assert metrics["gradient_ratio_error"] < 1e-5
        assert metrics["last_target_max"] < 1
    if arm == "baseline":
        assert metrics["last_target_max"] == pytest.approx(1)
    assert EXPERIMENT.compare is not None
    EXPERIMENT.compare(SMALL, {arm: ArmResult(arm, metrics, tmp_path)}, Run.scratch(tmp_path / "compare"))
    assert (tmp_path / "compare" / "figures" / "arms.png").is_file()


def test_augmented_preset_trains(tmp_path: Path) -> None:
    config = replace(EXPERIMENT.presets["augmented"], train=60, test=50, epochs=2, batch=20)
    assert EXPERIMENT.run(config, "ps_kd", Run.scratch(tmp_path))["accuracy"] >= 0


def test_augmentation_of_nothing_is_the_image() -> None:
    images = torch.rand(3, 1, 28, 28)
    same = ps_kd.turned_and_shifted(images, 0.0, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images, rtol=1e-4, atol=1e-5)
    other = ps_kd.turned_and_shifted(images, 15.0, 0.1, torch.Generator().manual_seed(0))
    assert (other - images).abs().mean() > 0.1


def test_share_of_cutmix_is_that_of_the_pixels() -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 28, 28)
    mixed_at_all = 0
    for seed in range(40):
        mixed, mix = ps_kd.cut_and_mix(images, 0.5, torch.Generator().manual_seed(seed))
        if mix is None:
            assert torch.equal(mixed, images)
            continue
        mixed_at_all += 1
        torch.testing.assert_close(mixed.mean((1, 2, 3)), mix(torch.arange(6.0)))
    assert 10 < mixed_at_all < 30


def test_rank_correlation_is_one_for_increasing_and_minus_one_for_decreasing() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x.pow(3)) == pytest.approx(-1)


def narrow(config: Config, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))


@pytest.mark.parametrize("preset", ["paper", "imagenet"])
def test_published_presets_read_their_files(
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_cifar: Callable[[Path, int], None],
    write_image_folders: Callable[..., None],
) -> None:
    if preset == "paper":
        write_cifar(tmp_path / "cifar-100-python", images=20)
    else:
        # more classes than predictions are remembered
        write_image_folders(tmp_path, classes=20, images=1, size=(40, 48))
    monkeypatch.setattr(ps_kd, "build", narrow)
    assert EXPERIMENT.presets[preset].epochs >= 90
    config = replace(EXPERIMENT.presets[preset], size=32, batch=10, epochs=2)
    metrics = EXPERIMENT.run(config, "ps_kd", Run.scratch(tmp_path / "run", data=tmp_path))
    assert 0 <= metrics["accuracy"] <= 100


def test_published_networks_are_residual() -> None:
    small, large = (ps_kd.build(EXPERIMENT.presets[preset], 100) for preset in ("paper", "imagenet"))
    assert sum(isinstance(module, nn.Conv2d) for module in small.modules()) == 20
    assert sum(isinstance(module, nn.Conv2d) for module in large.modules()) == 53
