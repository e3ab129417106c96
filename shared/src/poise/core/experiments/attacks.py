"""Adversarial images: the projected gradient attack in L2.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def l2_attack(
    net: nn.Module, x: Float[Tensor, "batch c h w"], y: Int[Tensor, "batch"], radius: float, steps: int
) -> Float[Tensor, "batch c h w"]:
    """Images in [0, 1] in a ball around ``x``, in L2, on which the margin of the true class is small.

    Ascent on the margin and not on the cross-entropy, whose gradient vanishes where a network is sure. Every step has the length
    2.5 radius / steps.

    Args:
        net: gives logits; its parameters receive no gradient.
        x: images in [0, 1].
        y: true classes.
        radius: of the ball.
        steps: gradient steps, from the image itself.
    """
    moved = torch.zeros_like(x)
    for _ in range(steps):
        with torch.enable_grad():
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(margins(net(x + moved), y).sum(), moved)
        moved = moved.detach() - 2.5 * radius / steps * F.normalize(gradient.flatten(1)).view_as(x)
        norms = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (x + moved * (radius / norms.clamp_min(radius))).clamp(0, 1) - x
    return x + moved


def margins(logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """The logit of the true class minus the largest of the others."""
    true = logits.gather(1, y[:, None])
    return (true - logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)


def attacked_batches(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], radius: float, *, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, attacked."""
    for x, y in batches:
        yield l2_attack(net, x, y, radius, steps), y


@torch.no_grad()
def accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose class has the largest logit."""
    right = total = 0
    for x, y in batches:
        right += int((net(x).argmax(1) == y).sum())
        total += len(y)
    return right / total
