r"""Plasticity injection: new capacity to learn, without changing what a network computes.

Nikishin et al., "Deep Reinforcement Learning with Plasticity Injection", NeurIPS 2023, arXiv 2305.15555.

.. math:: f_\theta(x) \;\to\; f_\theta(x) + f_{\theta_1}(x) - f_{\theta_2}(x), \qquad \theta_1 = \theta_2 \text{ fresh}

Only :math:`\theta_1` is trained from then on. At the moment of the injection the last two terms cancel. If learning recovers, it was
plasticity that was missing, and not exploration or a better minimum.

>>> import torch
>>> from torch import nn
>>> network, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)
>>> injected = plasticity_injection(network)
>>> torch.allclose(injected(x), network(x), atol=1e-6)
True
>>> sum(parameter.requires_grad for parameter in injected.parameters()), len(list(network.parameters()))
(4, 4)
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from poise.rl.plasticity.reset import Initialize, reset_module


class Injected(nn.Module):
    """``frozen(x) + fresh(x) - anchor(x)``, entry by entry where the result holds several tensors.

    Attributes:
        frozen: the network as it was at the injection.
        fresh: what is trained from then on.
        anchor: what ``fresh`` was at the injection.
    """

    def __init__(self, frozen: nn.Module, fresh: nn.Module, anchor: nn.Module) -> None:
        super().__init__()
        self.frozen, self.fresh, self.anchor = frozen, fresh, anchor
        self.frozen.requires_grad_(False)
        self.anchor.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map(
            _combine, self.frozen(*args, **kwargs), self.fresh(*args, **kwargs), self.anchor(*args, **kwargs)
        )

    def reset_parameters(self) -> None:
        """Fresh parameters in ``fresh`` and, the same, in ``anchor``."""
        reset_module(self.fresh)
        self.anchor.load_state_dict(self.fresh.state_dict())


def plasticity_injection(
    module: nn.Module, generator: torch.Generator | None = None, *, initialize: Initialize | None = None
) -> Injected:
    """A network that computes what ``module`` does and can learn as a new one can.

    Give its trainable parameters to a new optimizer. Several injections nest. A target network is injected with the same fresh
    networks: ``Injected(target, deepcopy(injected.fresh), deepcopy(injected.anchor))``.

    Args:
        module: the network; it is not changed.
        generator: fixes the fresh parameters; see :func:`~poise.rl.reset_module`.
        initialize: see there.

    Returns:
        The network around copies of ``module``.

    Raises:
        TypeError: see :func:`~poise.rl.reset_module`.

    Source:
        Nikishin et al. 2023, section 3, equation 1.
    """
    template = module.fresh if isinstance(module, Injected) else module
    fresh = reset_module(copy.deepcopy(template), generator, initialize=initialize).requires_grad_(True)
    return Injected(copy.deepcopy(module), fresh, copy.deepcopy(fresh))


def _combine(frozen: Tensor, fresh: Tensor, anchor: Tensor) -> Tensor:
    return frozen + (fresh - anchor)
