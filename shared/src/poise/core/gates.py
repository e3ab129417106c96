r"""Gates: discrete choices in the forward pass, gradients in the backward pass.

Every random operation takes its draw (``noise``) or a ``torch.Generator``; the generator may live on the CPU while the
gates are on another device, so that one seed gives one result everywhere.

>>> import torch
>>> scores = torch.tensor([0.2, 0.9, 0.7, 0.7], requires_grad=True)
>>> gate = topk_gate(scores, k=2)
>>> gate.tolist()
[0.0, 1.0, 1.0, 0.0]
>>> (gate * torch.arange(4.0)).sum().backward()
>>> scores.grad.tolist()
[0.0, 1.0, 2.0, 3.0]
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def straight_through(hard: Float[Tensor, "*shape"], soft: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""The value of ``hard``, exactly, with the gradient of ``soft``.

    Args:
        hard: the discrete value; gets no gradient.
        soft: what it stands for, of the same shape.

    Raises:
        ValueError: the shapes differ.

    Source:
        Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, section 4, arXiv
        1308.3432.
    """
    if hard.shape != soft.shape:
        raise ValueError(f"hard and soft must have the same shape, got {tuple(hard.shape)} and {tuple(soft.shape)}")
    return hard.detach() + (soft - soft.detach())


def binarize(scores: Float[Tensor, "*shape"], threshold: float = 0.5) -> Float[Tensor, "*shape"]:
    """1 where ``scores > threshold`` (strictly), else 0; the gradient of the identity.

    Clamp the scores to [0, 1] before for the clipped estimator, whose gradient is 0 outside.

    Args:
        scores: probabilities or real-valued scores.
        threshold: what a score must exceed.
    """
    return straight_through((scores > threshold).to(scores.dtype), scores)


def round_through(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest whole number (halves to even) with the gradient of the identity.

    Args:
        x: values in units of the quantization step.
    """
    return straight_through(x.round(), x)


def clamp_through(x: Float[Tensor, "*shape"], low: float, high: float) -> Float[Tensor, "*shape"]:
    """``x`` clamped to [low, high] with the gradient of the identity, outside too.

    Args:
        x: values.
        low: smallest result.
        high: largest result.

    Raises:
        ValueError: ``low`` is above ``high``.
    """
    if low > high:
        raise ValueError(f"low must not be above high, got {low} and {high}")
    return straight_through(x.clamp(low, high), x)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Standard Gumbel draws, :math:`-\log E` with E standard exponential, in float32 or wider.

    Args:
        like: gives shape, device and dtype.
        generator: where the draws come from; torch's global generator by default.
    """
    return _draw(like, generator).exponential_(generator=generator).log_().neg_().to(like.device)


def logistic_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Standard logistic draws, :math:`\log u - \log(1 - u)` with u uniform on (0, 1), in float32 or wider.

    Args:
        like: gives shape, device and dtype.
        generator: where the draws come from; torch's global generator by default.
    """
    uniform = _draw(like, generator).uniform_(generator=generator)
    return torch.logit(uniform, eps=torch.finfo(uniform.dtype).eps).to(like.device)


def gumbel_softmax(
    logits: Float[Tensor, "..."],
    temperature: float = 1.0,
    *,
    hard: bool = False,
    dim: int = -1,
    noise: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    r"""A relaxed draw from a categorical distribution, :math:`\mathrm{softmax}((\ell + g) / \tau)`, g standard Gumbel.

    Args:
        logits: unnormalised log-probabilities.
        temperature: :math:`\tau`; towards 0 the draw becomes one-hot.
        hard: return the one-hot vector of the largest entry (the first, if several), exactly, with the soft gradient.
        dim: the dimension that sums to one.
        noise: Gumbel draws of the shape of ``logits``; zeros give the softmax itself.
        generator: where the draws come from if ``noise`` is not given; torch's global generator by default.

    Raises:
        ValueError: the temperature is not positive, ``noise`` has another shape, or both noise and generator are given.

    Source:
        Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, eq. 2; Maddison, Mnih and Teh, "The
        Concrete Distribution", ICLR 2017.
    """
    _check_temperature(temperature)
    draw = _noise(logits, noise, generator, gumbel_noise)
    soft = ((logits + draw) / temperature).softmax(dim)
    if hard:
        soft = straight_through(torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0), soft)
    return soft.to(logits.dtype)


def gumbel_sigmoid(
    logits: Float[Tensor, "..."],
    temperature: float = 1.0,
    *,
    hard: bool = False,
    noise: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    r"""A relaxed draw of independent binary gates (binary concrete).

    .. math:: \sigma\big((\ell + \epsilon) / \tau\big)

    with :math:`\epsilon` standard logistic, the difference of two Gumbel draws.

    Args:
        logits: log-odds of an open gate.
        temperature: :math:`\tau`; towards 0 the draw becomes 0 or 1.
        hard: return 1 above one half and 0 else, exactly, with the soft gradient.
        noise: logistic draws of the shape of ``logits``; zeros give the sigmoid itself.
        generator: where the draws come from if ``noise`` is not given; torch's global generator by default.

    Raises:
        ValueError: the temperature is not positive, ``noise`` has another shape, or both noise and generator are given.

    Source:
        Maddison, Mnih and Teh, "The Concrete Distribution", ICLR 2017, appendix B.
    """
    _check_temperature(temperature)
    draw = _noise(logits, noise, generator, logistic_noise)
    soft = ((logits + draw) / temperature).sigmoid()
    return (binarize(soft) if hard else soft).to(logits.dtype)


class HardConcrete(nn.Module):
    r"""Learnable gates that are exactly 0 or 1 with positive probability, and whose expected number is differentiable:

    .. math:: s = \sigma\left(\frac{\epsilon + \log\alpha}{\beta}\right), \qquad
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \qquad
        P(z \ne 0) = \sigma\left(\log\alpha - \beta \log\frac{-\gamma}{\zeta}\right)

    with :math:`\epsilon` standard logistic. Multiply what is gated by the gates, and add a multiple of
    :meth:`expected_l0` to the loss. In training mode a call samples; in evaluation mode it gives the deterministic
    gates :math:`\min(1, \max(0, \sigma(\log\alpha)(\zeta - \gamma) + \gamma))`.

    >>> gates = HardConcrete(4, keep=0.9, generator=torch.Generator().manual_seed(0))
    >>> [round(gate, 2) for gate in gates.eval()().tolist()]
    [0.98, 0.98, 0.98, 0.98]
    >>> round(gates.expected_l0().item(), 2)
    3.91

    Args:
        shape: shape of the gates.
        keep: :math:`\sigma(\log\alpha)` at the start, up to a jitter of 0.01 in :math:`\log\alpha` that breaks ties.
        temperature: :math:`\beta`.
        low: :math:`\gamma < 0`, the lower end of the stretched interval.
        high: :math:`\zeta > 1`, its upper end.
        generator: where the initial jitter comes from; torch's global generator by default.

    Raises:
        ValueError: ``keep`` is outside (0, 1), the temperature is not positive, [0, 1] is not inside (low, high), or a size of
            ``shape`` is negative.

    Source:
        Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, section 2.2, eq. 10-13.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        keep: float = 0.5,
        temperature: float = 2 / 3,
        low: float = -0.1,
        high: float = 1.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < keep < 1:
            raise ValueError(f"keep must lie in (0, 1), got {keep}")
        _check_temperature(temperature)
        if not (low < 0 and high > 1):
            raise ValueError(f"[0, 1] must lie inside the stretched interval (low, high), got ({low}, {high})")
        self.temperature, self.low, self.high = temperature, low, high
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if min(sizes, default=0) < 0:
            raise ValueError(f"shape must not hold a negative size, got {shape}")
        log_odds = math.log(keep / (1 - keep))
        self.log_alpha = nn.Parameter(torch.empty(sizes).normal_(log_odds, 0.01, generator=generator))

    def forward(
        self,
        samples: Sequence[int] = (),
        *,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """Gates of shape ``(*samples, *shape)``, in [0, 1].

        Args:
            samples: leading shape of independent draws, one for all by default; equal copies in evaluation mode.
            noise: logistic draws of that shape; not used in evaluation mode, as is the generator.
            generator: where the draws come from if ``noise`` is not given; torch's global generator by default.

        Raises:
            ValueError: ``noise`` has another shape, or both noise and generator are given.
        """
        log_alpha = self.log_alpha.expand(*samples, *self.log_alpha.shape)
        if self.training:
            gates = gumbel_sigmoid(log_alpha, self.temperature, noise=noise, generator=generator)
        else:
            gates = log_alpha.sigmoid()
        return (gates * (self.high - self.low) + self.low).clamp(0, 1)

    def open_probability(self) -> Float[Tensor, "..."]:
        """The probability that each gate is not zero (eq. 12), of the shape of the gates."""
        return (self.log_alpha - self.temperature * math.log(-self.low / self.high)).sigmoid()

    def expected_l0(self) -> Float[Tensor, ""]:
        """The expected number of gates that are not zero, the penalty of the paper."""
        return self.open_probability().sum()

    def extra_repr(self) -> str:
        shape = tuple(self.log_alpha.shape)
        return f"{shape}, temperature={self.temperature:.4g}, low={self.low}, high={self.high}"


def topk_mask(
    scores: Float[Tensor, "*shape"], k: int, *, dim: int | None = -1, largest: bool = True
) -> Bool[Tensor, "*shape"]:
    """Exactly ``k`` entries along ``dim`` are True: the largest (or smallest), and among equals the first.

    A partition finds the k-th value in linear time and ties are settled by position, so that the result does not depend
    on the device or the build. NaN is chosen last.

    Args:
        scores: what to choose by.
        k: how many entries to choose.
        dim: along which dimension; ``None`` chooses among all entries in memory order.
        largest: choose the largest, else the smallest.

    Raises:
        ValueError: ``k`` is negative or larger than the dimension.
    """
    if dim is None:
        return topk_mask(scores.flatten(), k, largest=largest).view(scores.shape)
    size = scores.size(dim)
    if not 0 <= k <= size:
        raise ValueError(f"k must lie in 0..{size}, the size of dimension {dim}, got {k}")
    if k in (0, size):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    values = scores.detach().nan_to_num(nan=-math.inf if largest else math.inf, posinf=math.inf, neginf=-math.inf)
    threshold = _kth_largest(values, k if largest else size - k + 1, dim)
    beyond = values > threshold if largest else values < threshold
    equal = values == threshold
    vacant = k - beyond.sum(dim, keepdim=True)
    return beyond | (equal & (equal.cumsum(dim) <= vacant))


def topk_masks(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    """Exactly ``k`` True entries over several tensors together, as if they were one; a tensor may get none.

    Args:
        scores: tensors of any shapes on one device; among equals the first tensor, then memory order, comes first.
        k: how many entries to choose in all.
        largest: choose the largest, else the smallest.

    Returns:
        One boolean mask per tensor.

    Raises:
        ValueError: no tensor is given, or ``k`` is negative or larger than the number of entries.
    """
    if not scores:
        raise ValueError("scores must hold at least one tensor")
    chosen = topk_mask(torch.cat([each.flatten() for each in scores]), k, largest=largest)
    pieces = chosen.split([each.numel() for each in scores])
    return [piece.view(each.shape) for piece, each in zip(pieces, scores, strict=True)]


def topk_gate(scores: Float[Tensor, "*shape"], k: int, *, dim: int | None = -1) -> Float[Tensor, "*shape"]:
    """:func:`topk_mask` as 0 and 1 with the gradient of the identity: entries that are left out keep learning.

    Args:
        scores: what to choose by.
        k: how many gates are open.
        dim: along which dimension; ``None`` chooses among all entries.

    Raises:
        ValueError: ``k`` is negative or larger than the dimension.

    Source:
        Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020, section 3.2.
    """
    return straight_through(topk_mask(scores, k, dim=dim).to(scores.dtype), scores)


def _kth_largest(values: Tensor, k: int, dim: int) -> Tensor:
    """By ``topk`` from the nearer end: unlike ``kthvalue`` it uses the whole device for one long dimension."""
    rest = values.shape[dim] - k + 1
    if k <= rest:
        return values.topk(k, dim, sorted=False).values.amin(dim, keepdim=True)
    return values.topk(rest, dim, largest=False, sorted=False).values.amax(dim, keepdim=True)


def _draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Room for draws where the generator lives: half precision has too few bits for the tails of a distribution."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(like.shape, dtype=dtype, device=generator.device if generator else like.device)


def _noise(
    logits: Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
    draw: Callable[[Tensor, torch.Generator | None], Tensor],
) -> Tensor:
    if noise is None:
        return draw(logits, generator)
    if generator is not None:
        raise ValueError("give noise or a generator, not both")
    if noise.shape != logits.shape:
        raise ValueError(f"noise must have the shape of the logits {tuple(logits.shape)}, got {tuple(noise.shape)}")
    return noise


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
