"""States at a common scale: the same map for the data, when acting, and when evaluating."""

from jaxtyping import Float
from torch import Tensor, nn


class StateNormalizer(nn.Module):
    r""":math:`(s - \mu) / (\sigma + \varepsilon)`, per dimension.

    Mean and standard deviation are those of a data set and never change afterwards; they are saved with the module.

    Args:
        observations: the data (n, s).
        eps: keeps a dimension that is constant in the data finite; 1e-3 is the value of TD3+BC and PRDC.

    Attributes:
        mean: μ, (s,).
        scale: σ + ε, (s,), with the standard deviation of the data as they are (no Bessel correction).

    Raises:
        ValueError: no rows, another number of axes, entries that are not finite, or ``eps`` not above 0; when called, an
            observation of another length.

    >>> import torch
    >>> normalizer = StateNormalizer(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    >>> normalizer(torch.tensor([1.0, 5.0])).tolist()
    [0.0, 0.0]
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, observations: Float[Tensor, "..."], eps: float = 1e-3) -> None:
        super().__init__()
        if observations.ndim != 2 or not len(observations) or not observations.isfinite().all():
            raise ValueError(
                f"expected finite observations (n, s) with n >= 1, got shape {tuple(observations.shape)}"
                + ("" if observations.isfinite().all() else " with entries that are not finite")
            )
        if not eps > 0:
            raise ValueError(f"eps must be positive, or a constant dimension divides by zero; got {eps}")
        wide = observations.detach().double()
        self.register_buffer("mean", wide.mean(0).to(observations.dtype))
        self.register_buffer("scale", (wide.std(0, correction=0) + eps).to(observations.dtype))

    def forward(self, observation: Float[Tensor, "*batch s"]) -> Float[Tensor, "*batch s"]:
        if observation.shape[-1:] != self.mean.shape:
            raise ValueError(f"expected observations of {len(self.mean)} entries, got shape {tuple(observation.shape)}")
        return (observation - self.mean) / self.scale
