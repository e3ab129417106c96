"""Cost of PELA: what low-rank layers save, what the intermediate stage takes, and both against the forms in the authors' code.

Peers: NumPy's decomposition with full matrices, as the authors initialise; the thin and the randomised ones of PyTorch; and the
perturbation term with a dense backward pass, as they write it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.low_rank import LowRankLinear, low_rank_factorize, rank_for_ratio
from poise.core.adapters.low_rank_surgery import apply_low_rank
from poise.core.adapters.pela import Pair, weight_perturbation_loss
from poise.core.adapters.pela_trainer import PelaTrainer
from poise.core.bench import Case, Peer, case, peer
from poise.core.experiments.pela_digits import DigitTransformer

LAYERS = ((48, 192, 2.0), (384, 1536, 2.0), (768, 3072, 1.5), (768, 3072, 2.0), (768, 3072, 3.0), (768, 768, 2.0))
"""Inputs, outputs and ratio: layers of the digit transformer, of MiniLM and DeiT-Small, and of DeiT-Base."""


@torch.no_grad()
def forward(inputs: int, outputs: int, ratio: float, tokens: int = 1024) -> Case:
    linear = nn.Linear(inputs, outputs)
    layer = LowRankLinear(inputs, outputs, rank_for_ratio(inputs, outputs, ratio))
    x = torch.randn(tokens, inputs)
    name = f"forward of a layer {inputs} -> {outputs}, ratio {ratio:g}, {tokens} tokens: dense, low rank"
    return case(name, plain=lambda: linear(x), method=lambda: layer(x), memory=False)


def stage(name: str, *, distill: bool, perturb: bool) -> Case:
    teacher = DigitTransformer(width=192, depth=4)
    student = apply_low_rank(teacher, 2, ("head", "patch_embed")).model.train()
    images, labels = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    pela = PelaTrainer(
        student, teacher, ("blocks.*",), feature_weight=float(distill), perturbation_weight=float(perturb)
    )

    def plain() -> None:
        student.zero_grad()
        F.cross_entropy(student(images), labels).backward()

    def method() -> None:
        student.zero_grad()
        logits, penalty = pela(images)
        (F.cross_entropy(logits, labels) + penalty).backward()

    return case(f"training step of a transformer, width 192, 512 tokens: {name}", plain=plain, method=method)


def weight(outputs: int = 768, inputs: int = 3072) -> Tensor:
    return torch.randn(outputs, inputs) / inputs**0.5


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    w1, w2 = factors
    return w2 @ w1


def full_matrices(rank: int = 307) -> Peer:
    w = weight()
    array = w.numpy()

    def theirs() -> Tensor:
        u, s, vh = np.linalg.svd(array, full_matrices=True)
        root = np.sqrt(s[:rank])
        return torch.from_numpy((u[:, :rank] * root) @ (root[:, None] * vh[:rank]))

    return peer(
        "NumPy, full matrices (the authors' code)",
        np.__version__,
        f"factors of 768 x 3072 at rank {rank}",
        ours=lambda: product(low_rank_factorize(w, rank)),
        theirs=theirs,
        repeats=3,
        warmup=1,
    )


def thin(rank: int = 307) -> Peer:
    w = weight()

    def theirs() -> Tensor:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    return peer(
        "torch.linalg.svd, thin",
        torch.__version__,
        f"factors of 768 x 3072 at rank {rank}",
        ours=lambda: product(low_rank_factorize(w, rank)),
        theirs=theirs,
        repeats=3,
        warmup=1,
    )


def library_draws(rank: int) -> Peer:
    w = weight()

    def theirs() -> Tensor:
        u, s, v = torch.svd_lowrank(w, q=rank + 8, niter=4)
        return (u[:, :rank] * s[:rank]) @ v[:, :rank].T

    return peer(
        "torch.svd_lowrank",
        torch.__version__,
        f"randomized factors of 768 x 3072 at rank {rank}; agreement of the errors",
        ours=lambda: torch.dist(product(low_rank_factorize(w, rank, "randomized")), w),
        theirs=lambda: torch.dist(theirs(), w),
        repeats=3,
        warmup=1,
    )


def dense_backward(layers: int, outputs: int, inputs: int, rank: int) -> Peer:
    factors = [
        torch.randn(shape, requires_grad=True) for _ in range(layers) for shape in ((rank, inputs), (outputs, rank))
    ]
    pairs: list[Pair] = [
        (w1, w2, torch.randn(outputs, inputs)) for w1, w2 in zip(factors[::2], factors[1::2], strict=True)
    ]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, factors)])

    def theirs() -> Tensor:
        errors = [torch.norm(torch.mm(w2, w1) - w0, float("inf")).square() for w1, w2, w0 in pairs]
        return gradient(torch.stack(errors).mean())

    return peer(
        "dense backward pass (the authors' code)",
        torch.__version__,
        f"perturbation term and gradient, {layers} layers of {outputs} x {inputs} at rank {rank}",
        ours=lambda: gradient(weight_perturbation_loss(pairs)),
        theirs=theirs,
        repeats=5,
        warmup=1,
    )


def bench() -> dict[str, Any]:
    """The record of docs/results/core/pela.bench.json."""
    torch.manual_seed(0)
    return {
        "method": "core/pela",
        "cases": [
            *(forward(*layer) for layer in LAYERS),
            stage("distillation", distill=True, perturb=False),
            stage("perturbation term", distill=False, perturb=True),
            stage("both", distill=True, perturb=True),
        ],
        "peers": [
            full_matrices(),
            thin(),
            library_draws(rank=307),
            library_draws(rank=64),
            *(dense_backward(*size) for size in ((12, 144, 48, 18), (12, 384, 384, 96), (4, 3072, 768, 307))),
        ],
    }
