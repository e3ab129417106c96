r"""L2-init: weight decay towards where training began, and not towards zero.

Kumar, Marklund and Van Roy, "Maintaining Plasticity in Continual Learning via Regenerative Regularization", arXiv 2308.11958.

.. math:: \|\theta - \theta_0\|_2^2

>>> from torch import nn
>>> layer = nn.Linear(2, 1)
>>> decay = L2Init(layer, weight=1e-2)
>>> decay(layer).item()
0.0
"""

import torch
from torch import Tensor, nn

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule


class L2Init(Penalty):
    """``weight`` times the squared distance of a network's parameters from what they were when this was made.

    The initial parameters are buffers, so that they are saved and moved with the penalty.

    Args:
        module: the network; its trainable parameters count.
        weight: a number or a schedule of it.

    Raises:
        ValueError: nothing to train in ``module``; later, a network with other parameters.

    Source:
        Kumar et al. 2023, equation 2.
    """

    def __init__(self, module: nn.Module, weight: float | Schedule = 1e-2) -> None:
        super().__init__(weight)
        initial = [parameter.detach().clone() for parameter in _trained(module)]
        if not initial:
            raise ValueError(f"{type(module).__name__} has no parameters to train")
        for index, parameter in enumerate(initial):
            self.register_buffer(f"initial_{index}", parameter)

    def penalty(self, module: nn.Module) -> Tensor:
        """The squared distance of the same network, or of a copy of it."""
        own, initial = _trained(module), list(self.buffers())
        if [each.shape for each in own] != [each.shape for each in initial]:
            raise ValueError(
                f"expected the parameters of the network this was made for, {[tuple(each.shape) for each in initial]}, got "
                f"{[tuple(each.shape) for each in own]}"
            )
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in own]
        return torch.stack([(a - b).square().sum() for a, b in zip(wide, initial, strict=True)]).sum()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
