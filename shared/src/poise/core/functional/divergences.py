r"""Entropy and divergences of the categorical distributions that logits describe, in nats, in log space.

All take the distributions along ``dim`` and give one value for each. Entries outside ``mask`` do not exist: they have
no probability and get no gradient, so that padded rows give what the rows alone would. A logit of minus infinity is a
probability of 0.

>>> import torch
>>> scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 9.0, 9.0]])
>>> real = torch.tensor([[True, True, True, True], [True, True, False, False]])
>>> [round(value, 4) for value in entropy(scores, real).tolist()]
[1.3863, 0.6931]
>>> kl_divergence(scores, scores).tolist()
[0.0, 0.0]
>>> js_divergence(torch.tensor([50.0, 0.0]), torch.tensor([0.0, 50.0])).item() == torch.tensor(2.0).log().item()
True
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poise.core.functional._numerics import widen


def entropy(
    logits: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None, dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Shannon entropy :math:`H(p) = -\sum_i p_i \log p_i` of ``p = softmax(logits)``, from 0 to log n.

    Its gradient with respect to a logit is :math:`-p_i (\log p_i + H)`, finite however far apart the logits are.

    Args:
        logits: unnormalised log-probabilities.
        mask: which entries exist; broadcasts to ``logits``.
        dim: the dimension that sums to one.

    Returns:
        One entropy per distribution: the shape of ``logits`` without ``dim``.

    Raises:
        ValueError: ``mask`` does not fit, or leaves a distribution without entries.
        TypeError: ``logits`` is not floating-point, or ``mask`` not boolean.

    Source:
        Shannon, "A Mathematical Theory of Communication", 1948, section 6.
    """
    mask = _checked_mask(mask, logits, dim)
    log_p = _log_softmax(logits, mask, dim, "logits")
    return -_expectation(log_p, log_p, dim)


def kl_divergence(
    logits_p: Float[Tensor, "..."],
    logits_q: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    dim: int = -1,
) -> Float[Tensor, "..."]:
    r"""Kullback-Leibler divergence :math:`KL(p \| q) = \sum_i p_i (\log p_i - \log q_i)` of two softmax distributions.

    Args:
        logits_p: unnormalised log-probabilities of p, as a rule the target.
        logits_q: those of q, of the same shape.
        mask: which entries exist, in both; broadcasts to the logits.
        dim: the dimension that sums to one.

    Returns:
        One non-negative divergence per distribution; infinite where q rules out what p allows.

    Raises:
        ValueError: the shapes differ, ``mask`` does not fit, or leaves a distribution without entries.
        TypeError: logits are not floating-point, or ``mask`` not boolean.

    Source:
        Kullback and Leibler, "On Information and Sufficiency", 1951, eq. 2.4.
    """
    mask = _checked_mask(mask, logits_p, dim)
    _check_same_shape(logits_p, logits_q)
    log_p = _log_softmax(logits_p, mask, dim, "logits_p")
    log_q = _log_softmax(logits_q, mask, dim, "logits_q")
    return _expectation(log_p, log_p - log_q, dim)


def js_divergence(
    *logits: Float[Tensor, "..."],
    weights: Sequence[float] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    dim: int = -1,
) -> Float[Tensor, "..."]:
    r"""Jensen-Shannon divergence of two or more softmax distributions,

    .. math:: JS_\pi(p_1, \dots, p_m) = \sum_j \pi_j\, KL(p_j \| \bar p) = H(\bar p) - \sum_j \pi_j H(p_j), \qquad
        \bar p = \sum_j \pi_j p_j

    Args:
        logits: unnormalised log-probabilities of each distribution, all of one shape.
        weights: the mixture :math:`\pi`, positive and summing to one; equal by default.
        mask: which entries exist, in all of them; broadcasts to the logits.
        dim: the dimension that sums to one.

    Returns:
        One divergence from 0 (all equal) to :math:`H(\pi)` (disjoint) per distribution.

    Raises:
        ValueError: fewer than two distributions, their shapes differ, ``weights`` is no mixture of them, ``mask``
            does not fit, or leaves a distribution without entries.
        TypeError: logits are not floating-point, or ``mask`` not boolean.

    Source:
        Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Trans. Inf. Theory 1991, section V.
    """
    if len(logits) < 2:
        raise ValueError(f"give at least two distributions, got {len(logits)}")
    mask = _checked_mask(mask, logits[0], dim)
    _check_same_shape(*logits)
    mixture = _mixture(weights, len(logits))
    log_p = [_log_softmax(each, mask, dim, f"logits {index}") for index, each in enumerate(logits)]
    # logsumexp has a NaN gradient where every term is minus infinity; any finite stand-in does, as its probability
    # is 0.
    finite = [each.clamp_min(torch.finfo(each.dtype).min / 2) for each in log_p]
    weighted = [each + math.log(weight) for each, weight in zip(finite, mixture, strict=True)]
    log_mean = torch.stack(weighted).logsumexp(0)
    terms = [weight * _expectation(each, each - log_mean, dim) for each, weight in zip(log_p, mixture, strict=True)]
    return torch.stack(terms).sum(0)


def _log_softmax(logits: Tensor, mask: Tensor | None, dim: int, name: str) -> Tensor:
    wide = widen(logits, name)
    if mask is not None:
        wide = wide.masked_fill(~mask, -math.inf)
    return wide.log_softmax(dim)


def _expectation(log_p: Tensor, values: Tensor, dim: int) -> Tensor:
    """The expectation of ``values`` under p; what p gives no probability counts as 0, be it infinite or undefined."""
    p = log_p.exp()
    return (p * torch.where(p > 0, values, 0.0)).sum(dim)


def _checked_mask(mask: Tensor | None, logits: Tensor, dim: int) -> Tensor | None:
    """``mask`` in the shape of ``logits``.

    That no distribution is empty can only be read off the values, so CUDA waits for them here. ``torch.compile``
    would have to break the graph; there, an empty distribution gives NaN instead of the error.
    """
    if logits.size(dim) == 0:
        raise ValueError(
            f"a distribution needs at least one entry, got logits of shape {tuple(logits.shape)} and dim {dim}"
        )
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True where an entry exists), got {mask.dtype}")
    try:
        full = mask.expand(logits.shape)
    except RuntimeError:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to {tuple(logits.shape)}") from None
    if not torch.compiler.is_compiling() and not full.any(dim).all():
        raise ValueError("mask leaves a distribution without entries: every row needs at least one True")
    return full


def _check_same_shape(*logits: Tensor) -> None:
    shapes = [tuple(each.shape) for each in logits]
    if len(set(shapes)) > 1:
        raise ValueError(f"distributions must have the same shape, got {', '.join(map(str, shapes))}")


def _mixture(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"weights must have one entry per distribution, got {len(weights)} for {count}")
    if not all(weight > 0 for weight in weights) or not math.isclose(sum(weights), 1, rel_tol=1e-6):
        raise ValueError(f"weights must be positive and sum to 1, got {list(weights)}")
    return list(weights)
