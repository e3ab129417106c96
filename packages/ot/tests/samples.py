"""Sample inputs that put every method of poise.ot under the workspace contract."""

from functools import partial

import torch
from torch import nn

from poise.core.testing import Sample, randn
from poise.ot import (
    ICNN,
    STVS,
    ColumnRegularizer,
    ConditionalMongeMap,
    ConservativePenalty,
    ElasticCost,
    EmbeddingContext,
    Euclidean,
    KOverlap,
    MongeGapLoss,
    PNormP,
    SparseOTRouter,
    SparsityConstrained,
    SphereMap,
    SquaredL2,
    StructuredMap,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_points,
    solve_semi_dual,
    sparse_simplex_projection,
)


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.GELU(), nn.Linear(8, outputs)).double()


def signs(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return randn(generator, *shape).sign()


MAPS = (
    Sample(
        name="monge_gap/icnn",
        build=lambda: ICNN(3, (8, 8)).double(),
        inputs=lambda generator: (randn(generator, 6, 3),),
        parameters=True,
    ),
    Sample(
        name="monge_gap/icnn_softplus",
        build=lambda: ICNN(3, (8, 8), positivity="softplus", rank=2).double(),
        inputs=lambda generator: (randn(generator, 2, 4, 3),),
        parameters=True,
    ),
    Sample(
        name="monge_gap/structured_map",
        build=lambda: StructuredMap(PNormP(1.5), perceptron(3, 3)),
        inputs=lambda generator: (randn(generator, 6, 3),),
        parameters=True,
    ),
    Sample(
        name="monge_gap/sphere_map",
        build=lambda: SphereMap(perceptron(3, 3)),
        inputs=lambda generator: (randn(generator, 6, 3),),
        parameters=True,
    ),
    Sample(
        name="monge_gap/conservative_penalty",
        build=lambda: ConservativePenalty(perceptron(3, 3), weight=0.7),
        inputs=lambda generator: (randn(generator, 6, 3), signs(generator, 2, 6, 3)),
        parameters=True,
        compile=False,
        fake_cuda=False,
        reason="Jacobian products go through autograd's engine: no double backward when compiled, and a real device is asked for",
    ),
    Sample(
        name="monge_gap/conditional_map",
        build=lambda: ConditionalMongeMap(perceptron(3 + 4, 3), EmbeddingContext(2, width=4).double(), residual=True),
        inputs=lambda generator: (randn(generator, 2, 6, 3), randn(generator, 2, 2)),
        differentiable=(0, 1),
        parameters=True,
    ),
)

UNTIL_CONVERGED = "iterates until the marginals are right: the control flow depends on the data"

MONGE_GAP = (
    Sample(
        name="monge_gap/sqeuclidean",
        build=lambda: MongeGapLoss(weight=0.7, epsilon=2.0, tol=1e-10),
        inputs=lambda generator: (randn(generator, 8, 3), randn(generator, 8, 3)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="monge_gap/euclidean_batch",
        build=lambda: MongeGapLoss(Euclidean(), weight=0.7, epsilon=2.0, tol=1e-10),
        inputs=lambda generator: (randn(generator, 2, 6, 3), randn(generator, 2, 6, 3)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="monge_gap/elastic_k_overlap",
        build=lambda: MongeGapLoss(ElasticCost(KOverlap(2)), epsilon=2.0, tol=1e-10),
        inputs=lambda generator: (randn(generator, 6, 3), randn(generator, 6, 3)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="monge_gap/streaming",
        build=lambda: MongeGapLoss(
            ElasticCost(STVS()), epsilon=2.0, solver=partial(sinkhorn_points, method="streaming"), tol=1e-10
        ),
        inputs=lambda generator: (randn(generator, 6, 3), randn(generator, 6, 3)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="monge_gap/sinkhorn_divergence",
        build=lambda: partial(sinkhorn_divergence, eps=2.0, tol=1e-10),
        inputs=lambda generator: (randn(generator, 6, 3), randn(generator, 8, 3)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="monge_gap/sinkhorn",
        build=lambda: lambda M: sinkhorn(None, None, M, 1.0, tol=1e-10).value,
        inputs=lambda generator: (randn(generator, 6, 8).square(),),
        compile=False,
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
)


def simplex(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Positive masses that sum to 1."""
    return torch.softmax(0.3 * randn(generator, *shape), -1)


def combine_weights(router: SparseOTRouter, tokens: torch.Tensor) -> torch.Tensor:
    """The weights of the experts' answers."""
    return router(tokens).combine


def transport_value(reg: ColumnRegularizer, cost: torch.Tensor) -> torch.Tensor:
    """The value of transport between uniform masses."""
    a, b = (cost.new_full((size,), 1 / size) for size in cost.shape)
    return solve_semi_dual(a, b, cost, reg).value


SPARSE_OT = (
    Sample(
        name="sparse_ot/projection",
        build=lambda: partial(sparse_simplex_projection, k=3),
        inputs=lambda generator: (randn(generator, 4, 7),),
    ),
    Sample(
        name="sparse_ot/quadratic_max",
        build=lambda: lambda x, b: SquaredL2(0.5).max_op(x, b)[1],
        inputs=lambda generator: (randn(generator, 6, 4), simplex(generator, 4)),
    ),
    Sample(
        name="sparse_ot/capped_conjugate",
        build=lambda: lambda x: SparsityConstrained(2, 0.5).conjugate(x)[0],
        inputs=lambda generator: (randn(generator, 6, 4),),
    ),
    Sample(
        name="sparse_ot/value_quadratic",
        build=lambda: partial(transport_value, SquaredL2(0.5)),
        inputs=lambda generator: (randn(generator, 6, 4).square(),),
        compile=False,
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="sparse_ot/value_capped",
        build=lambda: partial(transport_value, SparsityConstrained(2, 0.5)),
        inputs=lambda generator: (randn(generator, 6, 4).square(),),
        compile=False,
        fake_cuda=False,
        reason=UNTIL_CONVERGED,
    ),
    Sample(
        name="sparse_ot/router",
        build=lambda: partial(combine_weights, SparseOTRouter(6, 3).double()),
        inputs=lambda generator: (randn(generator, 2, 9, 6),),
    ),
)

SAMPLES: tuple[Sample, ...] = MAPS + MONGE_GAP + SPARSE_OT
