"""How every public name of poise.ot is called under changed arguments, or why it is not."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from poise.core.testing import Exempt, Fuzz, randn, sampled, valid
from poise.ot import (
    L1,
    STVS,
    ColumnRegularizer,
    Cosine,
    DoseContext,
    ElasticCost,
    EmbeddingContext,
    Euclidean,
    EuclideanP,
    JoinedContext,
    KOverlap,
    MongeGapLoss,
    NegEntropy,
    OneHotContext,
    PNormP,
    RelativeEpsilon,
    RidgePotential,
    SinkhornLoss,
    SparsityConstrained,
    SphereGeodesic,
    SqEuclidean,
    SqPNorm,
    SquaredL2,
    color_transfer,
    conjugate_point,
    gaussian_map,
    l2_uvp,
    mixture_pair,
    monge_gap,
    monge_gap_from_samples,
    potential_gradient,
    recover_plan,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_points,
    solve_dual,
    solve_semi_dual,
    sparse_simplex_projection,
    sparsity_constrained_ot,
)

RECORD = Exempt("a record of what was found; it computes nothing")
FILE = Exempt("reads a file")
BASE = Exempt("a base class or protocol; what implements it is called")
STEEP = "at a zero vector the slope is one over the ridge, more than float16 can hold"
CHOSEN = "experts are chosen by comparisons, which are false for what is not a number"
INTEGERS = "PyTorch has no networks of integers"
LOOP = Exempt("drives the training of models; the losses in it are called by themselves")


def _points(generator: torch.Generator) -> tuple[Tensor, ...]:
    return randn(generator, 6, 3), randn(generator, 5, 3)


def _cost(build: Any) -> Fuzz:
    """A cost, between all pairs and between partners, whose numbers are changed as well."""
    return valid(lambda: lambda x, y: (build().pairwise(x, y), build().elementwise(x[:1], y[:1])), _points, (0, 1))


def _regularizer(build: Any) -> Fuzz:
    def solve(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        return build(gamma).conjugate(x)

    return valid(lambda: solve, lambda g: (randn(g, 6, 4), 0.5), (0,))


def _elastic(build: Any) -> Fuzz:
    def prox(z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        return build().prox(z, tau), build()(z)

    return valid(lambda: prox, lambda g: (randn(g, 6, 4), 0.5), (0,))


def _masses(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (
        torch.full((4,), 0.25, dtype=torch.float64),
        torch.full((5,), 0.2, dtype=torch.float64),
        randn(generator, 4, 5).square(),
    )


def _sinkhorn(a: Tensor, b: Tensor, cost: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    result = sinkhorn(a, b, cost, reg)
    return result.value, result.plan()


def _sinkhorn_points(x: Tensor, y: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    result = sinkhorn_points(x, y, reg)
    return result.value, result.plan()


def _solved(solve: Any, reg: ColumnRegularizer, a: Tensor, b: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    result = solve(a, b, cost, reg, max_iter=200)
    return result.value, result.plan


def _sparse(a: Tensor, b: Tensor, cost: Tensor, k: int, gamma: float) -> tuple[Tensor, Tensor]:
    result = sparsity_constrained_ot(a, b, cost, k, gamma, max_iter=200)
    return result.value, result.plan


def _recovered(a: Tensor, b: Tensor, cost: Tensor, slack: float) -> Tensor:
    return recover_plan(solve_semi_dual(a, b, cost, SquaredL2(0.5), max_iter=200), slack)


def _bowl(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(-1) + x.sin().sum(-1) / 2


def _conjugate(y: Tensor, start: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    found = conjugate_point(_bowl, y, start, tol=tol, max_iter=max_iter)
    return found.point, found.value


def _two_clouds(generator: torch.Generator) -> tuple[Tensor, ...]:
    return randn(generator, 6, 3), randn(generator, 6, 3)


def _images(generator: torch.Generator) -> tuple[Any, ...]:
    return randn(generator, 6, 5, 3).sigmoid(), randn(generator, 4, 5, 3).sigmoid(), 4, 2, 1.0


FUZZ: dict[str, Fuzz | Exempt] = {
    "BenchmarkPair": Exempt("made by mixture_pair and read_mixture_pair"),
    "RidgePotential": valid(
        lambda: lambda dim, ridges, g, x: RidgePotential(dim, ridges, generator=g).to(x.dtype)(x),
        lambda g: (3, 4, g, randn(g, 6, 3)),
        retyped=INTEGERS,
    ),
    "l2_uvp": valid(lambda: l2_uvp, _two_clouds, (0,)),
    "mixture_pair": valid(lambda: lambda dim, g: mixture_pair(dim, generator=g).dim, lambda g: (2, g)),
    "read_mixture_pair": FILE,
    "Cells": RECORD,
    "read_cells": FILE,
    "Cosine": Fuzz(_cost(Cosine).sample, {"zeros": STEEP, "tiny": STEEP}),
    "SphereGeodesic": _cost(SphereGeodesic),
    "Cost": BASE,
    "TranslationCost": BASE,
    "L1": _elastic(L1),
    "STVS": _elastic(STVS),
    "ElasticCost": _cost(ElasticCost),
    "KOverlap": _elastic(partial(KOverlap, 2)),
    "Euclidean": _cost(Euclidean),
    "EuclideanP": _cost(partial(EuclideanP, 1.5)),
    "PNormP": _cost(partial(PNormP, 1.5)),
    "SqEuclidean": _cost(SqEuclidean),
    "SqPNorm": _cost(partial(SqPNorm, 1.5)),
    "sinkhorn_divergence": valid(lambda: sinkhorn_divergence, lambda g: (*_points(g), 0.5), (0, 1)),
    "RelativeEpsilon": valid(
        lambda: lambda x, y, factor: sinkhorn_divergence(x, y, RelativeEpsilon(factor)),
        lambda g: (*_points(g), 0.5),
        (0, 1),
    ),
    "PointSolver": BASE,
    "sinkhorn_points": valid(lambda: _sinkhorn_points, lambda g: (*_points(g), 1.0), (0, 1)),
    "ConvergenceWarning": RECORD,
    "SinkhornResult": RECORD,
    "sinkhorn": valid(lambda: _sinkhorn, lambda g: (*_masses(g), 1.0), (2,)),
    "ConditionalMongeMap": sampled("monge_gap/conditional_map"),
    "ConditionalMongeMapEstimator": LOOP,
    "ContextEncoder": BASE,
    "DoseContext": valid(lambda: lambda dose, largest: DoseContext(largest)(dose), lambda g: (randn(g, 4).abs(), 2.0)),
    "EmbeddingContext": valid(lambda: EmbeddingContext(3, 4).double(), lambda g: (randn(g, 6, 3),), (0,)),
    "JoinedContext": valid(
        lambda: JoinedContext([EmbeddingContext(3, 4), DoseContext()], [3, 1]).double(),
        lambda g: (randn(g, 6, 4).abs(),),
        (0,),
    ),
    "OneHotContext": valid(
        lambda: lambda classes, chosen: OneHotContext(classes)(chosen), lambda g: (3, torch.tensor([0, 2]))
    ),
    "Conjugate": RECORD,
    "conjugate_point": valid(lambda: _conjugate, lambda g: (*_two_clouds(g), 1e-3, 20)),
    "MongeMapEstimator": LOOP,
    "MongeMapObjective": LOOP,
    "SinkhornLoss": valid(lambda: lambda t, y, eps: SinkhornLoss(eps)(t, y), lambda g: (*_points(g), 0.5), (0, 1)),
    "ICNN": sampled("monge_gap/icnn"),
    "gaussian_map": valid(lambda: gaussian_map, lambda g: (randn(g, 9, 3), randn(g, 8, 3))),
    "potential_gradient": valid(lambda: partial(potential_gradient, _bowl), lambda g: (randn(g, 6, 3),), (0,)),
    "MongeGapLoss": valid(
        lambda: lambda x, t, epsilon: MongeGapLoss(epsilon=epsilon)(x, t), lambda g: (*_two_clouds(g), 1.0), (0, 1)
    ),
    "monge_gap": valid(
        lambda: lambda x, epsilon: monge_gap(torch.tanh, x, epsilon=epsilon), lambda g: (randn(g, 6, 3), 1.0), (0,)
    ),
    "monge_gap_from_samples": valid(
        lambda: lambda x, t, epsilon: monge_gap_from_samples(x, t, epsilon=epsilon)[0],
        lambda g: (*_two_clouds(g), 1.0),
        (0, 1),
    ),
    "NeuralDualSolver": LOOP,
    "ConservativePenalty": sampled("monge_gap/conservative_penalty"),
    "SphereMap": sampled("monge_gap/sphere_map"),
    "StructuredMap": sampled("monge_gap/structured_map"),
    "color_transfer": valid(lambda: color_transfer, _images),
    "sparse_simplex_projection": valid(lambda: sparse_simplex_projection, lambda g: (randn(g, 4, 7), 3, 1.0), (0,)),
    "recover_plan": valid(lambda: _recovered, lambda g: (*_masses(g), 1e-3)),
    "ColumnRegularizer": BASE,
    "NegEntropy": _regularizer(NegEntropy),
    "SparsityConstrained": _regularizer(partial(SparsityConstrained, 2)),
    "SquaredL2": _regularizer(SquaredL2),
    "SparseOTRouter": sampled("sparse_ot/router", nan=CHOSEN),
    "OTResult": RECORD,
    "solve_dual": valid(lambda: partial(_solved, solve_dual, SquaredL2(0.5)), _masses),
    "solve_semi_dual": valid(lambda: partial(_solved, solve_semi_dual, SquaredL2(0.5)), _masses, (2,)),
    "sparsity_constrained_ot": valid(lambda: _sparse, lambda g: (*_masses(g), 2, 1.0)),
}
