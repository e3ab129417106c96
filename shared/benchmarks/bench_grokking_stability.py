"""Cost of perpGrad on a training step and on the optimizer alone, and of StableMax against cross-entropy."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from poise.core import PerpGrad, perp_grad_, stablemax_cross_entropy
from poise.core.bench import case, peer

LAYERS = 10
SIZES = ((256, 1_024), (512, 1_024), (1_024, 1_024))
"""Width and batch of the perceptrons; each has 20 tensors."""


class Training:
    """A perceptron in training, and its step."""

    def __init__(self, width: int, batch: int, make: Callable[[Any], Optimizer]) -> None:
        torch.manual_seed(0)
        layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
        self.model = nn.Sequential(*layers[:-1])
        self.optimizer = make(self.model.parameters())
        self.x, self.y = torch.randn(batch, width), torch.randint(width, (batch,))
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-6, foreach=True)


def perp_adamw(params: Any) -> Optimizer:
    return PerpGrad(adamw(params))


def loop_(params: Iterable[Tensor]) -> None:
    """perpGrad as it is written down: tensor by tensor."""
    with torch.no_grad():
        for w in params:
            assert w.grad is not None
            perp = w.grad - (w * w.grad).sum() / (w.square().sum() + 1e-30) * w
            w.grad.copy_(perp * w.grad.norm() / (perp.norm() + 1e-30))


def composed(z: Tensor, y: Tensor) -> Tensor:
    """StableMax cross-entropy with the squashed logit left to autograd."""
    return F.cross_entropy(torch.where(z >= 0, z.clamp_min(0).log1p(), -(-z).clamp_min(0).log1p()), y)


def forward_backward(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    z.grad = None
    loss(z, y).backward()
    assert z.grad is not None
    return z.grad


def projected(project_: Callable[[list[Tensor]], None], training: Training) -> Tensor:
    params: list[Tensor] = list(training.model.parameters())
    project_(params)
    return torch.cat([w.grad.flatten() for w in params if w.grad is not None])


def bench() -> dict[str, Any]:
    """The record of docs/results/core/grokking-stability.bench.json."""
    generator = torch.Generator().manual_seed(0)
    z, y = 5 * torch.randn(8_192, 113, generator=generator), torch.randint(113, (8_192,), generator=generator)
    z.requires_grad_()
    sizes = "8,192 x 113, forward and backward"
    softmax, stablemax = (partial(forward_backward, loss, z, y) for loss in (F.cross_entropy, stablemax_cross_entropy))
    cases = []
    for width, batch in SIZES:
        plain, method = Training(width, batch, adamw), Training(width, batch, perp_adamw)
        name = f"20 tensors, width {width:,}"
        cases += [
            case(f"training step with AdamW, {name}, batch {batch:,}", plain.step, method.step),
            case(f"optimizer step alone, {name}", plain.optimizer.step, method.optimizer.step, repeats=21),
        ]
    adam_p = Training(512, 1_024, lambda params: timm.optim.AdamP(params, lr=1e-6))
    perp = Training(512, 1_024, perp_adamw)
    cases.append(
        case(
            "optimizer step alone, timm's AdamP without the method, width 512",
            adam_p.optimizer.step,
            perp.optimizer.step,
        )
    )

    cases.append(case(f"StableMax against softmax cross-entropy, {sizes}", softmax, stablemax, repeats=21))

    return {
        "method": "core/grokking-stability",
        "cases": cases,
        "peers": [
            peer(
                "torch, tensor by tensor",
                torch.__version__,
                "the projection alone, 20 tensors, width 512",
                ours=partial(projected, perp_grad_, Training(512, 64, adamw)),
                theirs=partial(projected, loop_, Training(512, 64, adamw)),
            ),
            peer(
                "torch, composed",
                torch.__version__,
                f"StableMax cross-entropy, {sizes}",
                ours=stablemax,
                theirs=partial(forward_backward, composed, z, y),
            ),
        ],
    }
