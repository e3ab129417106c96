"""Reads representation and head of any value network whose last layer is linear.

>>> import torch
>>> critic = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
>>> phi = Representation(critic)
>>> q = critic(torch.randn(8, 4))
>>> torch.allclose(q, phi.features @ phi.weight.T + critic[2].bias)
True
"""

from jaxtyping import Float
from torch import Tensor, nn

from poise.core.taps import Taps


class Representation:
    """φ and w of a value network, ``Q = φᵀ w``, whenever it runs.

    Args:
        network: the network; it stays as it is.
        name: name of its linear head among ``network.named_modules()``; by default the last linear layer there.

    Attributes:
        name: name of the head.

    Raises:
        ValueError: there is no linear layer, or no module of that name.
        TypeError: the module of that name is not linear.
    """

    def __init__(self, network: nn.Module, name: str | None = None) -> None:
        linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
        if name is None and not linear:
            raise ValueError(f"{type(network).__name__} has no nn.Linear that could be the head of a value network")
        self.name = linear[-1] if name is None else name
        modules = dict(network.named_modules())
        if self.name not in modules:
            raise ValueError(f"no module {self.name!r} in {type(network).__name__}; its linear layers are {linear}")
        head = modules[self.name]
        if not isinstance(head, nn.Linear):
            raise TypeError(f"the head must be an nn.Linear, {self.name!r} is a {type(head).__name__}")
        self._head, self._taps = head, Taps(network, self.name, at="input", select=0).attach()

    @property
    def features(self) -> Float[Tensor, "*batch d"]:
        """φ of the most recent forward pass, with its graph if it had one."""
        return self._taps[self.name]

    @property
    def weight(self) -> Float[Tensor, "outputs d"]:
        """The weight of the head."""
        return self._head.weight

    def close(self) -> None:
        """Stop reading."""
        self._taps.close()
