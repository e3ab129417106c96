"""Sample inputs that put every method of poise.ot under the workspace contract."""

from functools import partial

import torch
from torch import nn

from poise.core.testing import Sample, randn
from poise.ot import (
    ICNN,
    STVS,
    ConditionalMongeMap,
    ConservativePenalty,
    ElasticCost,
    EmbeddingContext,
    Euclidean,
    KOverlap,
    MongeGapLoss,
    PNormP,
    SphereMap,
    StructuredMap,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_points,
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

SAMPLES: tuple[Sample, ...] = MAPS + MONGE_GAP
