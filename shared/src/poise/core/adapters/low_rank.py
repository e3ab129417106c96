r"""Linear layers as products of two thin ones, at the best approximation of a given rank.

.. math:: W \approx W_2 W_1, \qquad W_1 = \Sigma_r^{1/2} V_r^\top, \quad W_2 = U_r \Sigma_r^{1/2}, \qquad
          r = \Big\lfloor \frac{n m}{k (n + m)} \Big\rfloor

for :math:`W \in R^{m \times n}` with the singular values :math:`\Sigma`: the pair has at most 1/k of the parameters, both factors
are scaled alike, and no matrix of rank r is nearer to W (Eckart and Young, 1936).

>>> import torch
>>> from torch import nn
>>> rank_for_ratio(64, 128, ratio=2)
21
>>> dense = nn.Linear(64, 128)
>>> layer = LowRankLinear.from_linear(dense, rank=21)
>>> w1, w2 = layer.factors
>>> torch.allclose(w1 @ w1.T, w2.T @ w2, atol=1e-5), layer(torch.ones(3, 64)).shape
(True, torch.Size([3, 128]))

:func:`~poise.core.apply_low_rank` does this to all layers of a network.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.core.adapters.svd import truncated_svd
from poise.core.adapters.targets import layer_kind, weight_matrix
from poise.core.names import plain_modules

Method = Literal["svd", "randomized"]
Factors = tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]


def rank_for_ratio(in_features: int, out_features: int, ratio: float) -> int:
    r"""The rank at which two factors have at most 1 / ratio of the parameters of the matrix.

    .. math:: r = \lfloor nm / (k (n + m)) \rfloor

    Args:
        in_features: n.
        out_features: m.
        ratio: k, positive; 2 halves the layer.

    Returns:
        r, at most ``min(n, m)``.

    Raises:
        ValueError: a size or the ratio is not positive, or the ratio is so large that no rank is left.

    Warns:
        UserWarning: the ratio is so small that r exceeds the full rank, which is returned.

    Source:
        Guo et al., CVPR 2024, on low-rank approximation.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"a layer has at least one input and output, got {in_features} and {out_features}")
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"ratio must be positive and finite, got {ratio}")
    rank = int(in_features * out_features // (ratio * (in_features + out_features)))
    full = min(in_features, out_features)
    if rank < 1:
        most = in_features * out_features / (in_features + out_features)
        raise ValueError(
            f"ratio {ratio} leaves no rank for a layer of {in_features} inputs and {out_features} outputs: "
            f"it can be {most:.4g} at most"
        )
    if rank > full:
        warnings.warn(f"ratio {ratio} asks for rank {rank}, above the full rank {full}", stacklevel=2)
    return min(rank, full)


@torch.no_grad()
def low_rank_factorize(
    weight: Float[Tensor, "outputs inputs"],
    rank: int,
    method: Method | str = "svd",
    *,
    generator: torch.Generator | None = None,
) -> Factors:
    r"""Factors :math:`W_1, W_2` with :math:`W_2 W_1 \approx W` and :math:`W_1 W_1^\top = W_2^\top W_2 = \Sigma_r`.

    Args:
        weight: W, a matrix; half types are widened first.
        rank: r, from 1 to the smaller side of W.
        method: ``"svd"``, the best approximation there is, or ``"randomized"``, nearly as good and faster where r is much less
            than the smaller side.
        generator: of the randomized method, on the device of the weight.

    Returns:
        :math:`W_1` (r, inputs) and :math:`W_2` (outputs, r), without a graph, in the dtype of the weight.

    Raises:
        TypeError: the weight is not of a floating-point type.
        ValueError: it is not a matrix or has entries that are not finite, the rank is out of range, or the method is unknown.

    Source:
        Guo et al., CVPR 2024, on low-rank approximation; see :func:`poise.core.adapters.svd.truncated_svd`.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix (outputs, inputs), got shape {tuple(weight.shape)}")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must lie in 1..{min(weight.shape)} for a weight of shape {tuple(weight.shape)}, got {rank}"
        )
    if method not in ("svd", "randomized"):
        raise ValueError(f"method must be 'svd' or 'randomized', got {method!r}")
    u, s, vh = truncated_svd(weight, rank, "exact" if method == "svd" else "randomized", generator=generator)
    root = s.sqrt()
    return (root.unsqueeze(1) * vh).to(weight.dtype), (u * root).to(weight.dtype)


class LowRankLinear(nn.Sequential):
    r"""A Linear layer :math:`y = W_2 W_1 x + b` in two Linear layers, ``self[0]`` and ``self[1]``.

    It stands in wherever a Linear layer is called, and where only its ``weight`` and ``bias`` are read (as
    ``nn.MultiheadAttention`` does with its output projection). Its state has the names of the authors' code
    (``0.weight``, ``1.weight``, ``1.bias``), so that their checkpoints load.

    >>> layer = LowRankLinear.from_linear(nn.Linear(32, 64), rank=8)
    >>> layer(torch.ones(2, 5, 32)).shape, layer.weight.shape
    (torch.Size([2, 5, 64]), torch.Size([64, 32]))

    Args:
        in_features: length of the inputs.
        out_features: length of the outputs.
        rank: r.
        bias: whether there is a bias, on the second layer.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: the rank is not between 1 and the smaller of the sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must lie in 1..{min(in_features, out_features)}, got {rank}")
        super().__init__(
            nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
        )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        method: Method | str = "svd",
        *,
        generator: torch.Generator | None = None,
        decompose: bool = True,
    ) -> "LowRankLinear":
        """The low-rank form of a Linear layer, or of the ``Conv1D`` of Hugging Face transformers.

        Args:
            linear: the layer, which stays as it is.
            rank: r.
            method: see :func:`low_rank_factorize`.
            generator: see there.
            decompose: if false, the factors are drawn like those of new layers, for a checkpoint to be loaded into.

        Raises:
            TypeError: not such a layer.
            ValueError: as for :func:`low_rank_factorize`.
        """
        if not is_linear(linear):
            raise TypeError(f"linear must be a Linear layer, got {type(linear).__name__}")
        weight, bias = dense_matrix(linear), cast(Tensor | None, linear.bias)
        outputs, inputs = weight.shape
        layer = cls(inputs, outputs, rank, bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            if decompose:
                w1, w2 = low_rank_factorize(weight, rank, method, generator=generator)
                layer.first.weight.copy_(w1)
                layer.second.weight.copy_(w2)
            if bias is not None:
                layer.second.bias.copy_(bias)
        for factor in layer.factors:
            factor.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.second.bias.requires_grad_(bias.requires_grad)
        layer.train(linear.training)
        return layer

    def to_linear(self) -> nn.Linear:
        """One Linear layer with the product as its weight."""
        weight, bias = self.weight.detach(), self.bias
        linear = nn.Linear(
            self.in_features, self.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear.train(self.training)

    @property
    def first(self) -> nn.Linear:
        """The layer with the weight W_1, without a bias."""
        return cast(nn.Linear, self[0])

    @property
    def second(self) -> nn.Linear:
        """The layer with the weight W_2 and the bias."""
        return cast(nn.Linear, self[1])

    @property
    def factors(self) -> Factors:
        """W_1 and W_2."""
        return self.first.weight, self.second.weight

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The product, differentiable in both factors."""
        w1, w2 = self.factors
        return w2 @ w1

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second layer."""
        return cast(Tensor | None, self.second.bias)


class LowRankProduct(nn.Module):
    """The parametrization of a bare matrix by two factors, ``original0`` and ``original1`` of ``torch.nn.utils.parametrize``.

    It is for matrices that their module reads itself, such as ``in_proj_weight`` of ``nn.MultiheadAttention``: parameters are
    saved, and the product is formed whenever it is read.

    Args:
        factorize: gives the factors of a matrix that is assigned.
    """

    def __init__(self, factorize: Callable[[Tensor], Factors]) -> None:
        super().__init__()
        self.factorize = factorize

    def forward(self, w1: Float[Tensor, "rank inputs"], w2: Float[Tensor, "outputs rank"]) -> Tensor:
        """The product."""
        return w2 @ w1

    def right_inverse(self, weight: Float[Tensor, "outputs inputs"]) -> Factors:
        """The factors."""
        return self.factorize(weight)


def new_factors(weight: Float[Tensor, "outputs inputs"], rank: int) -> Factors:
    """Factors drawn as those of two new Linear layers, for a product of this shape, dtype and device."""
    outputs, inputs = weight.shape
    w1, w2 = LowRankLinear(inputs, outputs, rank, bias=False, device=weight.device, dtype=weight.dtype).factors
    return w1.detach(), w2.detach()


def is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear layer or the ``Conv1D`` of Hugging Face transformers, which stores the transpose."""
    return layer_kind(module) in ("linear", "conv1d")


def dense_matrix(module: nn.Module, tensor: str = "weight") -> Float[Tensor, "outputs inputs"]:
    """A matrix of a module, with a row per output.

    Args:
        module: Linear, ``Conv1D``, attention, or low rank.
        tensor: name of the matrix.

    Raises:
        TypeError: the module has no such tensor.
    """
    if tensor == "weight" and is_linear(module):
        return weight_matrix(module)
    matrix = getattr(module, tensor, None)
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{type(module).__name__} has no tensor {tensor!r}")
    return matrix


def low_rank_tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Plain name of the module, name of the matrix, and the module, for every matrix that is a product of two factors.

    Args:
        model: any module, wrapped or not; a module that occurs under several names is given once.
    """
    seen: set[nn.Module] = set()
    for name, module in plain_modules(model).items():
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, LowRankLinear):
            yield name, "weight", module
        elif parametrize.is_parametrized(module):
            for tensor in cast(nn.ModuleDict, module.parametrizations):
                if _product(module, tensor) is not None:
                    yield name, tensor, module


def low_rank_factors(module: nn.Module, tensor: str = "weight") -> Factors:
    """W_1 and W_2 of a matrix that is their product.

    Args:
        module: as :func:`low_rank_tensors` gives it.
        tensor: name of the matrix.

    Raises:
        TypeError: the matrix is not of that kind.
    """
    if isinstance(module, LowRankLinear):
        return module.factors
    product = _product(module, tensor)
    if product is None:
        raise TypeError(f"{tensor!r} of {type(module).__name__} is not a product of two factors")
    return cast(Tensor, product.original0), cast(Tensor, product.original1)


def _product(module: nn.Module, tensor: str) -> parametrize.ParametrizationList | None:
    if not parametrize.is_parametrized(module, tensor):
        return None
    found = cast(nn.ModuleDict, module.parametrizations)[tensor]
    assert isinstance(found, parametrize.ParametrizationList)
    return found if len(found) == 1 and isinstance(found[0], LowRankProduct) else None
