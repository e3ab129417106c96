r"""Convex potentials: input-convex neural networks, whose gradients are optimal maps for the squared Euclidean cost.

Amos, Xu and Kolter, "Input Convex Neural Networks", ICML 2017, arXiv 1609.07152; as transport maps: Makkuva et al., "Optimal
Transport Mapping via Input Convex Neural Networks", ICML 2020, arXiv 1908.10962; initialised at the Gaussian map: Bunne, Krause and
Cuturi, "Supervised Training of Conditional Monge Maps", NeurIPS 2022, arXiv 2206.14262.

    z_1 = act(V_0 x + b_0),    z_{l+1} = act(W_l z_l + V_l x + b_l),    f(x) = w . z_L + v . x + |A x|^2 / 2

With ``W_l >= 0``, ``w >= 0`` and a convex, nondecreasing ``act``, ``f`` is convex in ``x``.

>>> import torch
>>> from poise.ot import ICNN
>>> potential = ICNN(2, hidden=(32, 32))
>>> x, y = torch.randn(64, 2), torch.randn(64, 2)
>>> bool((potential((x + y) / 2) <= (potential(x) + potential(y)) / 2 + 1e-6).all())
True
>>> potential.gradient(x).shape
torch.Size([64, 2])
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

POSITIVITIES = ("projection", "softplus", "penalty")


def potential_gradient(
    potential: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """The gradient of a potential at every point, differentiable again in ``x`` and in the potential's parameters.

    Args:
        potential: maps ``(..., d)`` to ``(...)``, point by point.
        x: the points.
    """
    return torch.func.grad(lambda points: potential(points).sum())(x)


class ICNN(nn.Module):
    r"""A convex function of its input, ``(..., d) -> (...)``; :meth:`gradient` is the transport map.

    At the start ``f(x)`` is close to ``|x|^2 / 2`` and the map close to the identity (:meth:`initialise_at_gaussian_map` starts at
    the optimal map between two Gaussians instead).

    Args:
        dim: dimension d.
        hidden: widths of the layers.
        activation: convex and nondecreasing; twice differentiable if the map itself is trained. Softplus bends over a width of
            about 1: for data on a smaller scale, such as colours in [0, 1], take ``partial(softplus, beta=10)``.
        positivity: how the weights ``W`` between layers are kept nonnegative. ``"projection"``: clamped at 0 by :meth:`project_`
            after each optimizer step (let :meth:`project_after` do it). ``"softplus"``: ``W = softplus(V) / fan_in``, nonnegative by
            construction. ``"penalty"``: free, with :meth:`negativity` for the loss; then ``f`` is convex only as far as that is 0.
        rank: rows of ``A``; the full ``dim`` when left out, 0 for no quadratic term.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64, 64, 64),
        *,
        activation: Callable[[Tensor], Tensor] = functional.softplus,
        positivity: str = "projection",
        rank: int | None = None,
    ) -> None:
        super().__init__()
        rank = dim if rank is None else rank
        if dim < 1 or not hidden or min(hidden) < 1 or not 0 <= rank <= dim:
            raise ValueError(
                f"expected dim >= 1, widths >= 1 and 0 <= rank <= dim, got {dim}, {tuple(hidden)} and {rank}"
            )
        if positivity not in POSITIVITIES:
            raise ValueError(f"positivity must be one of {', '.join(POSITIVITIES)}, got {positivity!r}")
        widths = (*hidden, 1)
        self.dim = dim
        self.activation = activation
        self.positivity = positivity
        self.from_input = nn.ModuleList(nn.Linear(dim, width) for width in widths)
        self.between = nn.ParameterList(_initial_weights(out, width, positivity) for width, out in pairwise(widths))
        self.quadratic = nn.Parameter(torch.eye(rank, dim))  # A
        with torch.no_grad():
            last = self.from_input[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.zero_()
            self._shrink_last(0.1)  # the quadratic term leads at first: the map starts near the identity

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have points of {self.dim} dimensions, got shape {tuple(x.shape)}")
        first, *others = self.from_input
        z = first(x)
        for layer, weight in zip(others, self.between, strict=True):
            z = functional.linear(self.activation(z), self._nonnegative(weight)) + layer(x)
        quadratic = functional.linear(x, self.quadratic).square().sum(-1) / 2
        return z.squeeze(-1) + quadratic

    def gradient(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The map ``x -> grad f(x)``, monotone because ``f`` is convex."""
        return potential_gradient(self, x)

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp the weights between layers at 0 (nothing to do unless ``positivity="projection"``)."""
        if self.positivity == "projection":
            for weight in self.between:
                weight.clamp_(min=0)

    def project_after(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`project_` after each step of ``optimizer``; the handle returned undoes this."""

        def project(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            self.project_()

        return optimizer.register_step_post_hook(project)

    def negativity(self) -> Float[Tensor, ""]:
        """``sum relu(-W)^2`` over the weights between layers: 0 iff they keep ``f`` convex (for ``positivity="penalty"``)."""
        return torch.stack([self._nonnegative(weight).neg().relu().square().sum() for weight in self.between]).sum()

    @torch.no_grad()
    def initialise_at_gaussian_map(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> None:
        """Start at the optimal map between the Gaussians with the means and covariances of two samples.

        The last weights between layers become 0, so that the map is exactly :func:`gaussian_map`; under ``"softplus"`` they cannot
        and become a hundredth of an average instead.

        Args:
            x: samples that the map sends away.
            y: samples that it sends them to.

        Raises:
            ValueError: the quadratic term has not full rank.
        """
        if self.quadratic.shape[0] != self.dim:
            raise ValueError(f"a Gaussian map needs rank {self.dim}, this potential has rank {self.quadratic.shape[0]}")
        matrix, offset = gaussian_map(x, y)
        self.quadratic.copy_(_power(matrix, 0.5))  # A^T A = matrix
        last = self.from_input[-1]
        assert isinstance(last, nn.Linear)
        last.weight.copy_(offset[None])
        self._shrink_last(0.0)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, positivity={self.positivity!r}"

    def _shrink_last(self, factor: float) -> None:
        """Scale the last weights between layers; softplus weights by 0.01 at least, below which they would no longer learn."""
        weight = self.between[-1]
        if self.positivity == "softplus":
            weight.copy_(functional.softplus(weight).mul(max(factor, 0.01)).expm1().log())
        else:
            weight.mul_(factor)

    def _nonnegative(self, weight: Tensor) -> Tensor:
        return functional.softplus(weight) / weight.shape[1] if self.positivity == "softplus" else weight


def gaussian_map(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    r"""The optimal map between Gaussians fitted to two samples, ``T(x) = S x + s`` (Bures).

    ``S = C_x^{-1/2} (C_x^{1/2} C_y C_x^{1/2})^{1/2} C_x^{-1/2}`` with the covariances ``C``, and ``s = mean(y) - S mean(x)``.

    Args:
        x: ``(n, d)`` with an invertible covariance.
        y: ``(m, d)``.

    Returns:
        ``S``, symmetric positive semidefinite, and ``s``.

    Raises:
        ValueError: fewer than two samples, samples that are not finite, or a singular covariance of ``x``.
        TypeError: a half precision, in which there are no roots of matrices.
    """
    if {x.dtype, y.dtype} & {torch.float16, torch.bfloat16}:
        raise TypeError(f"x and y must be float32 or float64, got {x.dtype} and {y.dtype}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, got NaN or infinite entries")
    if 0 in (x.shape[1], y.shape[1]):
        raise ValueError(f"x and y must have coordinates, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"covariances need at least 2 samples each, got {len(x)} and {len(y)}")
    covariance_x, covariance_y = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    if not bool(torch.linalg.matrix_rank(covariance_x, hermitian=True) == x.shape[1]):
        raise ValueError("the covariance of x is singular: give more samples or drop constant coordinates")
    root, inverse_root = _power(covariance_x, 0.5), _power(covariance_x, -0.5)
    matrix = inverse_root @ _power(root @ covariance_y @ root, 0.5) @ inverse_root
    return matrix, y.mean(0) - matrix @ x.mean(0)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp(min=0).pow(exponent)) @ vectors.mT


def _initial_weights(out: int, width: int, positivity: str) -> nn.Parameter:
    """Weights between layers that average over the ``width`` inputs, so that depth neither inflates nor kills the values."""
    if positivity == "softplus":
        return nn.Parameter(torch.empty(out, width).uniform_(-2.0, 0.5))  # softplus of this: 0.13 to 0.97
    return nn.Parameter(torch.empty(out, width).uniform_(0.0, 2.0 / width))
