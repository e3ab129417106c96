r"""The policy of DrQ-v2: normal noise, clipped, and an action moved into its range with a straight-through gradient.

.. math:: a = \mathrm{clamp}\big(\mu + \mathrm{clip}(\sigma \epsilon, \pm c),\; -1 + 10^{-6},\; 1 - 10^{-6}\big),
          \qquad \epsilon \sim N(0, 1), \quad \partial a / \partial \mu = 1

>>> import torch
>>> policy = TruncatedNormal(torch.tensor([0.9, 0.0]), 0.5)
>>> policy.sample(clip=0.3, eps=torch.tensor([2.0, -2.0]))
tensor([ 1.0000, -0.3000])
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.gates import clamp_through


class TruncatedNormal:
    """Actions in [-1, 1] around a mean.

    Args:
        mean: μ (*batch, a), in [-1, 1].
        stddev: σ, a number or a tensor that broadcasts to the mean.
        eps: distance that actions keep from the bounds of their range.

    Raises:
        ValueError: a standard deviation that is negative.

    Source:
        Yarats et al. 2022, arXiv 2107.09645, section 3.1; the straight-through clamp is in its released code.
    """

    def __init__(self, mean: Float[Tensor, "*batch a"], stddev: float | Tensor, eps: float = 1e-6) -> None:
        if not isinstance(stddev, Tensor) and not stddev >= 0:
            raise ValueError(f"stddev must not be negative, got {stddev}")
        self.mean, self.stddev, self.eps = mean, stddev, eps

    def sample(
        self,
        clip: float | None = None,
        *,
        eps: Float[Tensor, "*batch a"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch a"]:
        """An action, whose gradient with respect to the mean is 1 even where it was moved into the range.

        Args:
            clip: bound c on the noise; ``None`` leaves it as it is.
            eps: the standard normal draws themselves.
            generator: where to draw them otherwise; ``None`` is PyTorch's global CPU generator.
        """
        if eps is None:
            where = "cpu" if generator is None else generator.device
            drawn = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=where)
            eps = drawn.to(self.mean.device, non_blocking=True)
        noise = eps * self.stddev
        if clip is not None:
            noise = noise.clamp(-clip, clip)
        action = self.mean + noise
        return clamp_through(action, -1 + self.eps, 1 - self.eps)

    def log_prob(self, action: Float[Tensor, "*batch a"]) -> Float[Tensor, "*batch a"]:
        """Log density of the normal before clipping and clamping, per entry of the action, as the released code has it.

        Raises:
            ValueError: the action has not the shape of the mean.
        """
        if action.shape != self.mean.shape:
            raise ValueError(f"action must have shape {tuple(self.mean.shape)}, got {tuple(action.shape)}")
        stddev = self.stddev if isinstance(self.stddev, Tensor) else self.mean.new_full((), self.stddev)
        return -((action - self.mean) / stddev).square() / 2 - stddev.log() - 0.5 * math.log(2 * math.pi)
