"""Replace the Linear layers of a network by low-rank ones, and say what was done to each.

>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 5))
>>> small, report = apply_low_rank(model, ratio=2)
>>> small[0].rank, len(report.layers), report.skipped[0].reason
(21, 1, 'fewer than 10 outputs')
>>> print(report)
layer     rank  parameters      error
0.weight    21  8192 -> 4032    0.62
2.weight        640             fewer than 10 outputs
in all          8965 -> 4805    53.6 %
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.core.adapters.low_rank import (
    LowRankLinear,
    LowRankProduct,
    Method,
    dense_matrix,
    is_linear,
    low_rank_factorize,
    low_rank_factors,
    low_rank_tensors,
    new_factors,
    rank_for_ratio,
)
from poise.core.adapters.targets import AdaptedModule, replace_module
from poise.core.names import match_modules, plain_modules


@dataclass(frozen=True)
class FactorizedMatrix:
    """A matrix that is a product now.

    Attributes:
        name: of the matrix: ``blocks.0.mlp.fc1.weight``.
        rank: of the product.
        parameters: entries of the matrix.
        kept: entries of both factors.
        error: distance of the product from the matrix, relative, in the Frobenius norm; None where nothing was decomposed.
    """

    name: str
    rank: int
    parameters: int
    kept: int
    error: float | None


@dataclass(frozen=True)
class SkippedMatrix:
    """A matrix that was left as it is.

    Attributes:
        name: of the matrix.
        parameters: its entries.
        reason: why.
    """

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class LowRankReport:
    """What :func:`apply_low_rank` did to every matrix of a Linear layer or an attention; ``print`` gives a table.

    Attributes:
        layers: what was factorised.
        skipped: what was not.
        parameters: of the model before, buffers not counted and shared ones once.
        kept: of the model after.
    """

    layers: tuple[FactorizedMatrix, ...]
    skipped: tuple[SkippedMatrix, ...]
    parameters: int
    kept: int

    @property
    def share(self) -> float:
        """The part of the parameters that is left."""
        return self.kept / self.parameters

    def __str__(self) -> str:
        rows = [("layer", "rank", "parameters", "error")]
        for layer in self.layers:
            error = "new" if layer.error is None else f"{layer.error:.2g}"
            rows.append((layer.name, str(layer.rank), f"{layer.parameters} -> {layer.kept}", error))
        rows += [(matrix.name, "", str(matrix.parameters), matrix.reason) for matrix in self.skipped]
        rows.append(("in all", "", f"{self.parameters} -> {self.kept}", f"{100 * self.share:.1f} %"))
        name, rank, parameters, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{row[0]:{name}}  {row[1]:>{rank}}  {row[2]:{parameters}}  {row[3]}" for row in rows)


class LowRankModel(NamedTuple):
    """What :func:`apply_low_rank` returns.

    Attributes:
        model: the network with low-rank layers.
        report: what was done to it.
    """

    model: nn.Module
    report: LowRankReport


def apply_low_rank(
    model: nn.Module,
    ratio: float,
    skip: Iterable[str] = (),
    min_out_features: int = 10,
    decompose: bool = True,
    inplace: bool = False,
    *,
    method: Method | str = "svd",
    generator: torch.Generator | None = None,
) -> LowRankModel:
    """Factorise every Linear layer of a network, each at the rank that leaves 1 / ratio of its parameters.

    Linear layers and the ``Conv1D`` of Hugging Face transformers become :class:`LowRankLinear`. The bare projections inside
    ``nn.MultiheadAttention`` become parametrized products (:class:`LowRankProduct`): they save parameters, not time. A layer that
    occurs under several names is replaced under all of them. These stay as they are, and the report says so: what ``skip`` names
    or holds inside, small heads, weights that are tied to another module's, computed ones (parametrized, quantised, with an adapter),
    subclasses with a forward of their own, and layers whose factors would not be smaller.

    Args:
        model: the network, not wrapped.
        ratio: k; 2 halves each layer.
        skip: names or patterns of modules to leave alone with all that is inside, see :mod:`poise.core.names`. The authors skip
            the head, the patch embedding, and in Swin ``"layers.*.downsample"`` and ``"layers.*.blocks.*.attn.proj"``.
        min_out_features: layers with fewer outputs are left alone.
        decompose: if false, draw new factors and run no SVD: the structure that a checkpoint of a low-rank model is loaded into,
            or one to train from scratch.
        inplace: change ``model`` itself instead of a copy.
        method: see :func:`low_rank_factorize`.
        generator: of the randomized method.

    Returns:
        The network and the report.

    Raises:
        ValueError: the ratio is not positive or leaves a layer no rank; a pattern in ``skip`` matches nothing; the model is a Linear
            layer itself; or there is nothing to factorise.

    Source:
        Guo et al., CVPR 2024, on low-rank approximation, and the authors' code.
    """
    if is_linear(model):
        raise ValueError("the model is a Linear layer itself: use LowRankLinear.from_linear")
    skip = tuple(skip)
    if not inplace:
        model = copy.deepcopy(model)
    parameters = _count(model)
    untouched = {module for root in (match_modules(model, *skip).values() if skip else ()) for module in root.modules()}
    owners = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    layers: list[FactorizedMatrix] = []
    skipped: list[SkippedMatrix] = []
    for holder, module, tensor in list(_matrices(model)):
        name, matrix = _join(holder, tensor), dense_matrix(module, tensor).detach()
        reason = "named in skip" if module in untouched else _obstacle(module, tensor, owners, min_out_features)
        if reason is None:
            rank = _rank(name, matrix, ratio)
            kept = rank * sum(matrix.shape)
            if kept >= matrix.numel():
                reason = f"factors of rank {rank} are not smaller"
        if reason is not None:
            skipped.append(SkippedMatrix(name, matrix.numel(), reason))
            continue
        if isinstance(module, nn.MultiheadAttention):
            _parametrize(module, tensor, rank, decompose, method, generator)
            w1, w2 = low_rank_factors(module, tensor)
        else:
            layer = LowRankLinear.from_linear(module, rank, method, generator=generator, decompose=decompose)
            replace_module(model, module, layer)
            w1, w2 = layer.factors
        error = float(torch.dist(w2.detach() @ w1.detach(), matrix) / matrix.norm()) if decompose else None
        layers.append(FactorizedMatrix(name, rank, matrix.numel(), kept, error))
    if not layers:
        why = "; ".join(f"{left.name}: {left.reason}" for left in skipped[:5]) or "it has no Linear layer"
        raise ValueError(f"there is nothing to factorise in {type(model).__name__} ({why})")
    return LowRankModel(model, LowRankReport(tuple(layers), tuple(skipped), parameters, _count(model)))


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module that multiplies by a matrix, once, with its first name and the name of the matrix."""
    seen: set[nn.Module] = set()
    for name, module in plain_modules(model).items():
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, nn.MultiheadAttention):
            for tensor in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if getattr(module, tensor) is not None:
                    yield name, module, tensor
        elif isinstance(module, LowRankLinear | AdaptedModule):
            seen.update(module.modules())  # what is inside goes with it
            yield name, module, "weight"
        elif is_linear(module):
            yield name, module, "weight"


def _obstacle(module: nn.Module, tensor: str, owners: Mapping[nn.Parameter, int], min_out_features: int) -> str | None:
    """Why a matrix cannot be factorised; None if it can."""
    if isinstance(module, LowRankLinear) or any(
        of is module and name == tensor for _, name, of in low_rank_tensors(module)
    ):
        return "of low rank already"
    if isinstance(module, AdaptedModule):
        return "carries an adapter"
    if parametrize.is_parametrized(module, tensor) or tensor not in module._parameters:
        return "computed from other parameters"
    if owners[getattr(module, tensor)] > 1:
        return "tied to another module"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if dense_matrix(module, tensor).shape[0] < min_out_features:
        return f"fewer than {min_out_features} outputs"
    return None


def _rank(name: str, matrix: Tensor, ratio: float) -> int:
    outputs, inputs = matrix.shape
    try:
        return rank_for_ratio(inputs, outputs, ratio)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; or leave it out with skip") from error


def _parametrize(
    module: nn.Module, tensor: str, rank: int, decompose: bool, method: Method | str, generator: torch.Generator | None
) -> None:
    product = LowRankProduct(
        partial(low_rank_factorize, rank=rank, method=method, generator=generator)
        if decompose
        else partial(new_factors, rank=rank)
    )
    parametrize.register_parametrization(module, tensor, product)
    product.factorize = partial(low_rank_factorize, rank=rank)  # for what is assigned later; holds no generator


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
