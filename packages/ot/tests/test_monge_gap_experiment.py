"""The Monge gap experiment: every preset trains at its published sizes, measures exactly, and resumes bit-identically."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from poise.core.lab import Run
from poise.core.lab.errors import BadInput
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.ot import Euclidean, SqEuclidean
from poise.ot.experiments import monge_gap as experiment
from poise.ot.experiments.monge_gap import ARMS, EXPERIMENT, exact_costs

TINY = {"steps": 4, "batch": 16, "widths": (8,), "dual_steps": 2, "dual_inner_steps": 1, "dual_widths": (8,)}
TINY |= {"test_samples": 32, "curve_samples": 16, "curve_points": 2}
COLOURS = replace(EXPERIMENT.presets["quick"], **TINY)
KNOWN = replace(EXPERIMENT.presets["known-map"], **TINY, warm_steps=3, tail_steps=2)
FEW = {"steps": 2, "dual_steps": 1, "dual_inner_steps": 1, "test_samples": 64, "curve_samples": 32, "curve_points": 1}
GAPS = {f"{cost}_{part}" for cost in ("squared", "euclidean") for part in ("displacement", "cost", "gap")}
train = partial(rehearse, EXPERIMENT)


@pytest.mark.parametrize("config", [COLOURS, KNOWN], ids=["quick", "known-map"])
def test_every_arm_trains_and_all_are_compared(config, tmp_path):
    results = {arm: train(config, arm, tmp_path) for arm in ARMS}
    known = {"uvp"} if config is KNOWN else set()
    assert all(result.metrics.keys() == {"divergence", "mean_error"} | GAPS | known for result in results.values())
    for claim in EXPERIMENT.claims:
        preset = "known-map" if config is KNOWN else "quick"
        assert preset not in claim.presets or claim.metric in results[claim.arm].metrics
    EXPERIMENT.compare(config, results, Run.scratch(tmp_path / "compare"))
    pages = figures(tmp_path / "compare")
    assert pages == {"metrics.png"} | ({"maps.png"} if config is KNOWN else {"pictures.png", "recoloured.png"})
    for result in results.values():
        assert figures(result.dir) == {"curves.png", "displacements.png"}


def test_compare_draws_whatever_arms_ran(tmp_path):
    results = {"monge_gap": train(COLOURS, "monge_gap", tmp_path)}
    EXPERIMENT.compare(COLOURS, results, Run.scratch(tmp_path / "compare"))
    assert (tmp_path / "compare" / "figures" / "pictures.png").is_file()


def test_arms_of_a_seed_share_data_and_start(tmp_path):
    still = replace(COLOURS, steps=1, learning_rate=0.0, curve_points=1)
    baseline, gap = (train(still, arm, tmp_path).load("clouds") for arm in ("baseline", "monge_gap"))
    assert all(torch.equal(baseline[name], gap[name]) for name in ("x", "y", "t"))
    other = train(still, "baseline", tmp_path / "other", seed=1).load("clouds")
    assert not torch.equal(baseline["x"], other["x"])


def test_baseline_never_computes_the_gap(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("Sinkhorn was paid for at lambda = 0")

    monkeypatch.setattr(experiment.MongeGapLoss, "penalty", refuse)
    train(COLOURS, "baseline", tmp_path)
    with pytest.raises(AssertionError, match="paid for"):
        train(COLOURS, "monge_gap", tmp_path)


@pytest.mark.parametrize("cost", [SqEuclidean(), Euclidean()])
def test_exact_costs_are_those_of_linear_programming(cost):
    import ot

    x, t = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    displacement, least = exact_costs(cost, x, t)
    matrix = cost.pairwise(x, t).numpy()
    assert least == pytest.approx(ot.emd2(np.full(40, 1 / 40), np.full(40, 1 / 40), matrix), rel=1e-12)
    assert displacement == pytest.approx(cost.elementwise(x, t).mean().item(), rel=1e-9)
    moved = exact_costs(SqEuclidean(), x, x + 1)
    assert moved[0] == pytest.approx(moved[1], rel=1e-12)


def test_known_map_is_optimal_and_the_start_has_the_moments_of_the_target(tmp_path):
    config = replace(KNOWN, test_samples=2_000)
    (task,) = config.tasks(Run.scratch(tmp_path))
    displacement, least = exact_costs(SqEuclidean(), task.test_x[:500], task.optimal(task.test_x[:500]))
    assert displacement == pytest.approx(least, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    x, y = task.source(20_000, generator), task.target(20_000, generator)
    start = task.start(x)
    torch.testing.assert_close(start.mean(0), y.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(start.T.cov(), y.T.cov(), atol=0.1, rtol=0.05)
    assert (start - task.optimal(x)).square().sum(-1).mean() > 0.1 * y.var(0).sum(), "turned"


def test_held_out_samples_are_not_trained_on(tmp_path):
    (task,) = replace(COLOURS, test_samples=1_000).tasks(Run.scratch(tmp_path))
    rows = experiment.pixels("china")
    assert len(task.test_x) == 1_000
    drawn = task.source(len(rows) * 3, torch.Generator().manual_seed(0))
    assert abs(drawn.mean() - rows.mean()) < 0.01


@pytest.mark.parametrize("dim", [2, 256])
@pytest.mark.parametrize("arm", ["monge_gap", "icnn_dual"])
def test_mixtures_take_steps_at_the_published_sizes(dim, arm, tmp_path):
    config = replace(EXPERIMENT.presets["mixtures"], dim=dim, **FEW)
    assert (config.batch, config.widths, config.dual_widths) == (1_024, (128, 64, 64), (64, 64, 64, 64))
    assert train(config, arm, tmp_path).metrics["uvp"] > 0


@pytest.mark.parametrize("arm", ["monge_gap", "icnn_dual"])
def test_paper_preset_reads_the_published_pairs(arm, tmp_path, write_published_pair):
    config = replace(EXPERIMENT.presets["paper"], dim=64, **FEW)
    data = write_published_pair(tmp_path / "clone", 64)
    assert train(config, arm, tmp_path, data=data).metrics["uvp"] > 0
    with pytest.raises(BadInput, match=r"32_v1\.pt"):
        train(replace(config, dim=32), arm, tmp_path / "other", data=data)
    with pytest.raises(BadInput, match="--data"):
        train(config, arm, tmp_path / "none")


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("arm", ["baseline", "euclidean", "icnn_dual"])
def test_cells_preset_learns_all_drugs_from_an_anndata_file(layout, arm, tmp_path, write_h5ad):
    drugs = ["control", "givinostat", "givinostat", "trametinib"] * 25
    doses = [0.0, 10.0, 1_000.0, 10.0] * 25
    write_h5ad(tmp_path / "sciplex.h5ad", drugs, doses, layout, features=1_000)
    config = replace(EXPERIMENT.presets["cells"], **FEW, contexts_per_step=2)
    assert config.batch == 512
    assert train(config, arm, tmp_path, data=tmp_path).metrics.keys() == {"divergence", "mean_error"} | GAPS


def test_cells_preset_can_learn_one_drug_without_doses(tmp_path, write_h5ad):
    write_h5ad(tmp_path / "4i.h5ad", ["dmso", "cisplatin", "olaparib"] * 20, [0.0] * 60, features=48)
    config = replace(EXPERIMENT.presets["cells"], **FEW, drugs=("olaparib",), dose_column=None, control_column="dmso")
    (task,) = config.tasks(Run.scratch(tmp_path / "tasks", data=tmp_path))
    assert task.test_x.shape == (4, 48)
    train(config, "monge_gap", tmp_path, data=tmp_path)
    with pytest.raises(BadInput, match="aspirin"):
        replace(config, drugs=("aspirin",)).tasks(Run.scratch(tmp_path / "unknown", data=tmp_path))


@pytest.mark.parametrize("arm", ["monge_gap", "icnn_dual"])
def test_an_interrupted_run_resumes_bit_identically(arm, tmp_path):
    config = replace(KNOWN, steps=8, dual_steps=8, curve_points=8)
    check_resume(EXPERIMENT, config, arm, tmp_path, kill=(experiment, "measure", 5))
