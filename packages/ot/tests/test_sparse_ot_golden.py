"""Sparse OT against POT 0.9.7 and the released JAX router, whose numbers are in golden/sparse-ot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from poise.ot import (
    NegEntropy,
    SparseOTRouter,
    SparsityConstrained,
    SquaredL2,
    solve_dual,
    solve_semi_dual,
    sparse_simplex_projection,
)
from poise.ot.sparse.duals import Dual, SemiDual

FOLDER = Path(__file__).parent / "golden" / "sparse-ot"
CASES = {name: dict(np.load(FOLDER / f"{name}.npz")) for name in ("case_a", "case_b_uniform_moe")}
TAGS = [(case, tag) for case in CASES for tag in ("l2", "kl", *(f"k{k}" for k in CASES[case]["ks"]))]
SPARSE_TAGS = [(case, tag) for case, tag in TAGS if tag[1:].isdigit() and tag[0] == "k"]
SMOOTH_TAGS = [(case, tag) for case, tag in TAGS if tag in ("l2", "kl")]


def regularizer(case, tag):
    gamma = float(CASES[case]["gamma"])
    if tag == "kl":
        return NegEntropy(float(CASES[case]["kl_gamma"]))
    return SquaredL2(gamma) if tag == "l2" else SparsityConstrained(int(tag[1:]), gamma)


def problem(case):
    return tuple(CASES[case][name] for name in ("a", "b", "C"))


def tensors(case):
    a, b, cost = (torch.from_numpy(each).unsqueeze(0) for each in problem(case))
    return a, b, cost.mT


@pytest.mark.parametrize(("case", "tag"), TAGS)
def test_objectives_and_gradients_at_a_point_are_those_of_pot(case, tag):
    golden, reg = CASES[case], regularizer(case, tag)
    alpha, beta = (torch.from_numpy(golden[name]).unsqueeze(0) for name in ("pt_alpha", "pt_beta"))
    value, gradient = SemiDual(*tensors(case), reg)(alpha)
    np.testing.assert_allclose(-value[0], golden[f"{tag}_pt_semi_obj"], atol=1e-12)
    np.testing.assert_allclose(-gradient[0], golden[f"{tag}_pt_semi_g"], atol=1e-12)
    value, gradient = Dual(*tensors(case), reg)(torch.cat([alpha, beta], dim=-1))
    expected = np.concatenate([golden[f"{tag}_pt_dual_ga"], golden[f"{tag}_pt_dual_gb"]])
    np.testing.assert_allclose(-value[0], golden[f"{tag}_pt_dual_obj"], atol=1e-12)
    np.testing.assert_allclose(-gradient[0], expected, atol=1e-12)


@pytest.mark.parametrize("form", ["semi", "dual"])
@pytest.mark.parametrize(("case", "tag"), SMOOTH_TAGS)
def test_smooth_problems_end_where_pot_ends(case, tag, form):
    golden = CASES[case]
    solve = solve_semi_dual if form == "semi" else solve_dual
    result = solve(*problem(case), regularizer(case, tag))
    assert result.converged
    np.testing.assert_allclose(result.value, golden[f"{tag}_{form}_value"], atol=1e-6)
    np.testing.assert_allclose(result.plan, golden[f"{tag}_{form}_plan"], atol=1e-5)


@pytest.mark.parametrize("form", ["semi", "dual"])
@pytest.mark.parametrize(("case", "tag"), SPARSE_TAGS)
def test_capped_problems_reach_at_least_the_value_of_pot_and_never_exceed_the_bound(case, tag, form):
    golden, (_, b, _) = CASES[case], problem(case)
    solve = solve_semi_dual if form == "semi" else solve_dual
    value = float(solve(*problem(case), regularizer(case, tag)).value)
    bound = float(golden["emd_cost"]) + float(golden["gamma"]) / 2 * float((b**2).sum())
    assert value >= float(golden[f"{tag}_{form}_value"]) - 1e-6
    assert value <= bound + 1e-9


def test_the_value_at_one_nonzero_per_column_is_the_closed_form():
    golden, (_, b, _) = CASES["case_a"], problem("case_a")
    value = float(solve_semi_dual(*problem("case_a"), SparsityConstrained(1, float(golden["gamma"]))).value)
    assert value == pytest.approx(
        float(golden["emd_cost"]) + float(golden["gamma"]) / 2 * float((b**2).sum()), abs=1e-6
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "k", "z"),
    [("k1", 1, 1.0), ("k2", 2, 1.0), ("k4", 4, 1.0), ("k7", 7, 1.0), ("k2_z", 2, None), ("full_z", 7, None)],
)
def test_projections_are_those_of_pot(case, name, k, z):
    golden = CASES[case]
    mass = torch.from_numpy(golden["proj_z"]) if z is None else z
    projected = sparse_simplex_projection(torch.from_numpy(golden["proj_V"]), k, mass, dim=0)
    np.testing.assert_allclose(projected, golden[f"proj_{name}"], atol=1e-12)


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize(("choose", "axis"), [("tokens", "col"), ("experts", "row")])
def test_router_plans_are_those_of_the_released_router(choose, axis, steps):
    golden = np.load(FOLDER / "moe_router.npz")
    tokens, experts = golden["sim"].shape
    router = SparseOTRouter(
        4,
        experts,
        choose=choose,
        capacity_factor=float(golden["k_tokens_per_expert"]) * experts / tokens,
        selected=int(golden["k_experts_per_token"]),
        gamma=float(golden["gamma"]),
        learning_rate=float(golden["adam_lr"]),
        steps=steps,
    )
    if choose == "tokens":
        assert router.capacity(tokens) == golden["k_tokens_per_expert"]
    plan = router.plan(torch.from_numpy(golden["sim"]).unsqueeze(0))[0]
    np.testing.assert_allclose(plan, golden[f"plan_{axis}_it{steps}"], atol=1e-8)


def test_gates_are_the_softmax_of_the_scores():
    golden = np.load(FOLDER / "moe_router.npz")
    np.testing.assert_allclose(torch.from_numpy(golden["logits"]).softmax(-1), golden["sim"], atol=1e-8)
