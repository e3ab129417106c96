"""The interface of what an adapter adds to the weight of one layer."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class Delta(nn.Module):
    """What an adapter adds to the weight of one layer. A subclass writes :meth:`forward` and :meth:`matrix`.

    A delta that starts from a part of the pretrained weight, as SORSA and PiSSA do, *takes* that part: the layer keeps the rest.
    It then also writes :meth:`taken` and :meth:`give_back`, so that switching it off gives the pretrained layer.
    """

    @property
    def takes(self) -> bool:
        """Whether a part of the pretrained weight is taken."""
        return False

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """The output with the change.

        Args:
            x: input of the layer.
            y: output of the layer without the change.
            layer: the layer, whose geometry counts (the stride of a convolution).
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def matrix(self) -> Float[Tensor, "outputs inputs"]:
        """The change of the weight as a matrix with a row per output, differentiable, in at least float32."""
        raise NotImplementedError(f"{type(self).__name__} must define matrix()")

    def taken(self) -> Float[Tensor, "outputs inputs"]:
        """The part of the pretrained weight that was taken."""
        raise NotImplementedError(f"{type(self).__name__} takes nothing")

    def give_back(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """The output with what was taken and without the change; arguments as those of :meth:`forward`."""
        raise NotImplementedError(f"{type(self).__name__} takes nothing")

    def settings(self) -> dict[str, Any]:
        """What :meth:`restored` needs besides the tensors, in types that JSON has; kept in adapter files."""
        raise NotImplementedError(f"{type(self).__name__} must define settings() to be saved")

    @classmethod
    def restored(cls, layer: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Delta":
        """The delta that has these settings and tensors, for a layer that has not been adapted.

        Args:
            layer: the layer.
            settings: as :meth:`settings` gives them.
            tensors: its ``state_dict``.

        Raises:
            ValueError: they do not fit the layer.
        """
        raise NotImplementedError(f"{cls.__name__} must define restored() to be loaded")

    def misfit(self, pretrained: Float[Tensor, "outputs inputs"]) -> float:
        """How far what was taken is from being a part of a weight: 0 for the weight that it was taken from.

        Args:
            pretrained: the weight before it was adapted, as a matrix.
        """
        return 0.0
