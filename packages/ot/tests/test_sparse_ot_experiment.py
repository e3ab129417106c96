"""The sparse OT experiment: every arm of both studies takes steps, and the published format is read."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from poise.core.lab import ArmResult, Run
from poise.core.lab.errors import BadInput
from poise.ot.experiments.sparse_ot import EXPERIMENT, ColourTransfer, palettes, regularizer, steps_to_optimum
from poise.ot.experiments.sparse_ot_routing import ROUTERS, PaperRouting, Routing
from poise.ot.sparse.sparse_ot import solve_semi_dual

COLOURS = ColourTransfer(colours=12, palette_pixels=300, smoothness_steps=200)
ROUTING = Routing(steps=3, batch=8, group=4, experts=4, width=16, hidden=16, heads=2)


def test_every_arm_of_the_colour_study_reports_and_the_figures_are_drawn(tmp_path):
    results = {}
    for arm in EXPERIMENT.arms_of("quick"):
        run = Run.scratch(tmp_path / arm, seed=100)
        results[arm] = ArmResult(arm, EXPERIMENT.run(COLOURS, arm, run), tmp_path / arm)
    assert results["k2"].metrics["cap_excess"] <= 0
    assert results["k1"].metrics["closed_form_gap"] < 1e-6
    assert results["l2"].metrics["distance_at_its_support"] < 1e-5
    EXPERIMENT.compare(COLOURS, results, Run.scratch(tmp_path / "compare", seed=100))
    assert (tmp_path / "compare/figures/colour_transfer.png").is_file()


def test_palettes_are_the_same_for_every_arm_of_a_seed(tmp_path):
    one, two = (palettes(COLOURS, Run.scratch(tmp_path / name, seed=7)) for name in "ab")
    assert torch.equal(one.cost, two.cost)
    assert not torch.equal(one.cost, palettes(COLOURS, Run.scratch(tmp_path / "c", seed=8)).cost)


def test_the_smoothness_measurement_stops_where_it_says(tmp_path):
    problem = palettes(COLOURS, Run.scratch(tmp_path, seed=100))
    reg = regularizer(COLOURS, "l2")
    optimum = float(solve_semi_dual(problem.a, problem.b, problem.cost, reg).value)
    steps, gaps = steps_to_optimum(COLOURS, reg, problem, optimum)
    assert len(gaps) == steps + 1
    assert gaps[-1] <= COLOURS.smoothness_gap < gaps[-2]


@pytest.mark.parametrize("arm", ROUTERS)
def test_every_router_trains(tmp_path, arm):
    metrics = EXPERIMENT.run(ROUTING, arm, Run.scratch(tmp_path, seed=100))
    assert 0 <= metrics["accuracy"] <= 1
    if arm == "sparse":
        assert metrics["max_load"] <= 1


def write_image_folders(folder, classes=2, images=4):
    for part in ("train", "val"):
        for label in range(classes):
            target = folder / part / f"n{label:08d}"
            target.mkdir(parents=True)
            for index in range(images):
                Image.new("RGB", (250, 230), (60 * label, 20 * index, 90)).save(target / f"{index}.JPEG")


def test_the_paper_preset_reads_image_folders_and_steps_at_the_published_sizes(tmp_path):
    write_image_folders(tmp_path / "imagenet")
    config = replace(PaperRouting(), steps=1, batch=4, group=4, depth=2)
    run = Run.scratch(tmp_path / "run", seed=0, data=tmp_path / "imagenet")
    metrics = EXPERIMENT.run(config, "sparse", run)
    assert metrics["max_load"] <= 1


def test_the_paper_preset_says_what_is_missing(tmp_path):
    with pytest.raises(BadInput, match="--data"):
        EXPERIMENT.run(PaperRouting(), "sparse", Run.scratch(tmp_path / "run"))
    with pytest.raises(BadInput, match="train"):
        EXPERIMENT.run(PaperRouting(), "sparse", Run.scratch(tmp_path / "other", data=tmp_path))


def test_groups_must_fit_the_batch():
    with pytest.raises(ValueError, match="multiple of group"):
        replace(Routing(), batch=10)
