r"""BEER: keep the rank of a critic's representation where the Bellman equation puts it, neither collapsed nor maximal.

He, Zhou, Fang and Maghsudi, "Adaptive Regularization of Representation Rank as an Implicit Constraint of Bellman Equation", ICLR
2024, arXiv 2404.12754.

A value is linear in the last hidden layer, :math:`Q(s, a) = \phi(s, a)^\top w`. Where the Bellman equation holds,
:math:`w^\top(\phi - \gamma\phi') = r` for the successor :math:`\phi' = \phi(s', a')`, and by the Cauchy-Schwarz inequality

.. math:: \cos(\phi, \phi') \;\le\; b = \frac{\|\phi\|^2 + \gamma^2 \|\phi'\|^2 - r^2 / \|w\|^2}{2\gamma\, \|\phi\| \|\phi'\|},
          \qquad R = \mathbb E\, \big[\cos(\phi, \phi') - b\big]_+ .

The penalty R touches only what is more alike than the equation allows, so its strength adapts. The bound b is a constant and
:math:`\phi'` too: only :math:`\phi(s, a)` carries gradient.

>>> import torch
>>> from poise.rl import BEERRegularizer, Representation
>>> critic, target = (torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)) for _ in range(2))
>>> phi, phi_next = Representation(critic), Representation(target)
>>> beer = BEERRegularizer(weight=1e-3)
>>> now, following, reward, terminated = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8), torch.zeros(8, dtype=torch.bool)
>>> with torch.no_grad():
...     goal = reward + 0.99 * ~terminated * target(following).squeeze(1)
>>> loss = (critic(now).squeeze(1) - goal).square().mean()
>>> loss = loss + beer(phi.features, phi_next.features, reward, phi.weight, 0.99, terminated)
>>> loss.backward()
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.rl.representation.critic_step import CriticStep


def bellman_cosine_bound(
    features: Float[Tensor, "..."],
    next_features: Float[Tensor, "..."],
    reward: Float[Tensor, "..."],
    head_weight: Float[Tensor, "..."],
    gamma: float | Float[Tensor, "..."],
    *,
    norm_from: Float[Tensor, "..."] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "batch"]:
    r"""Greatest cosine between the representations of a state-action pair and of its successor that the Bellman equation allows.

    .. math:: \frac{\|\phi\|^2 + \gamma^2\|\phi'\|^2 - r^2/\|w\|^2}{2\gamma\,\|\phi\|\|\phi'\|}

    It may exceed 1, where every cosine is allowed, or be less than -1, where none is.

    Args:
        features: φ (batch, d).
        next_features: φ' (batch, d).
        reward: r (batch,) or (batch, 1); over several steps their discounted sum.
        head_weight: w, the weight of the linear head: (d,) or (1, d), or (batch, d) for a row per sample. A bias is ignored.
        gamma: γ, a number or (batch,) for transitions over several steps.
        norm_from: features whose norm stands for that of φ' in the numerator; ``next_features`` by default.
        eps: least norm in a denominator, so that representations of zero give no NaN.

    Returns:
        The bound of each sample, in float32 for half types. Gradients flow through it; the penalty treats it as constant.

    Raises:
        ValueError: shapes that do not fit, or γ outside (0, 1]: at γ = 0 there is no bound.

    Source:
        He et al. 2024, the upper bound on the cosine of consecutive representations.
    """
    terms = _checked(features, next_features, reward, head_weight, gamma)
    return _bound(_norm(terms.features), _norm(terms.next_features), terms, norm_from, eps)


def beer_loss(
    features: Float[Tensor, "..."],
    next_features: Float[Tensor, "..."],
    reward: Float[Tensor, "..."],
    head_weight: Float[Tensor, "..."],
    gamma: float | Float[Tensor, "..."],
    beta: float = 1.0,
    *,
    mask: Bool[Tensor, "..."] | None = None,
    norm_from: Float[Tensor, "..."] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, ""]:
    r""":math:`\beta\, \mathbb E\, [\cos(\phi, \mathrm{sg}\,\phi') - \mathrm{sg}\,b]_+`, with gradient for φ alone.

    Args:
        features: φ (batch, d) of the critic that is trained.
        next_features: φ' (batch, d), taken as constant.
        reward: see :func:`bellman_cosine_bound`.
        head_weight: see there; constant.
        gamma: see there.
        beta: the weight β.
        mask: which samples count, (batch,) or (batch, 1); the others contribute 0 to the mean.
        norm_from: see there.
        eps: see there; also the least norm in the cosine.

    Returns:
        The loss, in float32 for half types.

    Raises:
        ValueError: as :func:`bellman_cosine_bound`.

    Source:
        He et al. 2024, the regularizer.
    """
    excess = cosine_excess(features, next_features, reward, head_weight, gamma, norm_from=norm_from, eps=eps)
    if mask is not None:
        excess = excess * _flat(mask, len(excess), "mask")
    return beta * excess.relu().mean()


def cosine_excess(
    features: Float[Tensor, "..."],
    next_features: Float[Tensor, "..."],
    reward: Float[Tensor, "..."],
    head_weight: Float[Tensor, "..."],
    gamma: float | Float[Tensor, "..."],
    *,
    norm_from: Float[Tensor, "..."] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "batch"]:
    """By how much the cosine of each sample exceeds its bound; negative where it does not. Arguments as in :func:`beer_loss`."""
    terms = _checked(features, next_features.detach(), reward, head_weight, gamma)
    norm, next_norm = _norm(terms.features), _norm(terms.next_features)
    product = torch.linalg.vecdot(terms.features, terms.next_features)
    with torch.no_grad():
        bound = _bound(norm, next_norm, terms, norm_from, eps)
    return product / (norm.clamp_min(eps) * next_norm.clamp_min(eps)) - bound


class BEERRegularizer(Penalty):
    r"""``weight`` times the mean excess of the cosine over its Bellman bound.

    Give it to an agent (``DPGAgent(..., regularizers=[BEERRegularizer(1e-3)])``), or call it in a loop of your own with what
    :class:`~poise.rl.Representation` reads from any critic.

    Args:
        weight: β, or a schedule of it. The paper's is 1e-3; early in training the bound may be below -1 on all samples, so that
            a large weight leads the loss.
        official: reproduce the released code: the norm of φ' in the numerator comes from the critic that is trained, at its own
            policy's action, while cosine and denominator use the target critic; and terminal transitions count. By default φ' is one
            and the same, and a terminal transition, after which φ' counts as zero, contributes nothing.
        eps: least norm in a denominator.

    Attributes:
        active: share of the samples above their bound at the last call, detached; ``None`` before.

    Raises:
        ValueError: the shapes do not fit, γ is not in (0, 1], or ``official`` was chosen and ``norm_from`` not given.

    Source:
        He et al. 2024, the regularizer and its use with deterministic policy gradient; the released code for ``official``.
    """

    active: Tensor | None

    def __init__(self, weight: float | Schedule = 1e-3, *, official: bool = False, eps: float = 1e-6) -> None:
        super().__init__(weight)
        self.official, self.eps = official, eps
        self.active = None

    def penalty(
        self,
        features: Float[Tensor, "..."],
        next_features: Float[Tensor, "..."],
        reward: Float[Tensor, "..."],
        head_weight: Float[Tensor, "..."],
        gamma: float | Float[Tensor, "..."],
        terminated: Bool[Tensor, "..."] | None = None,
        norm_from: Float[Tensor, "..."] | None = None,
    ) -> Tensor:
        """The mean excess; arguments as in :func:`beer_loss`, with ``terminated`` (batch,) instead of a mask."""
        if self.official and norm_from is None:
            raise ValueError("official=True takes the norm of the next features from the online critic: give norm_from")
        excess = cosine_excess(
            features,
            next_features,
            reward,
            head_weight,
            gamma,
            norm_from=norm_from if self.official else None,
            eps=self.eps,
        ).relu()
        if terminated is not None and not self.official:
            excess = excess.masked_fill(_flat(terminated, len(excess), "terminated"), 0)
        self.active = (excess.detach() > 0).to(excess.dtype).mean()
        return excess.mean()

    def critic_loss(self, step: CriticStep) -> Tensor:
        """The term for a critic that an agent is updating."""
        return self(
            step.features,
            step.next_features,
            step.batch.reward,
            step.head_weight,
            step.batch.discount,
            step.batch.terminated,
            step.online_next_features() if self.official and self.weight else None,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, official={self.official}"


class _Terms(NamedTuple):
    """The arguments in one shape convention and full precision."""

    features: Tensor
    next_features: Tensor
    reward: Tensor
    head_weight: Tensor
    gamma: float | Tensor


def _bound(norm: Tensor, next_norm: Tensor, terms: _Terms, norm_from: Tensor | None, eps: float) -> Tensor:
    """The bound, given the norms of the features."""
    if norm_from is not None and norm_from.shape != terms.next_features.shape:
        raise ValueError(f"norm_from must have shape {tuple(terms.next_features.shape)}, got {tuple(norm_from.shape)}")
    far = next_norm if norm_from is None else _norm(_wide(norm_from))
    least_return = terms.reward.square() / terms.head_weight.square().sum(-1).clamp_min(eps**2)
    numerator = norm.square() + (terms.gamma * far).square() - least_return
    return numerator / (2 * terms.gamma * norm.clamp_min(eps) * next_norm.clamp_min(eps))


def _checked(
    features: Tensor, next_features: Tensor, reward: Tensor, head_weight: Tensor, gamma: float | Tensor
) -> _Terms:
    if features.ndim != 2 or features.shape != next_features.shape:
        raise ValueError(
            "expected features and next_features of one shape (batch, d), got "
            f"{tuple(features.shape)} and {tuple(next_features.shape)}"
        )
    count, width = features.shape
    if count == 0:
        raise ValueError(f"features must hold at least one transition, got shape {tuple(features.shape)}")
    weight = head_weight.unsqueeze(0) if head_weight.ndim == 1 else head_weight
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] not in (1, count):
        raise ValueError(
            f"head_weight must have shape ({width},), (1, {width}) or ({count}, {width}), got {tuple(head_weight.shape)}"
        )
    if isinstance(gamma, Tensor):
        gamma = _wide(_flat(gamma, count, "gamma"))
    elif not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}: without a future there is no bound")
    return _Terms(_wide(features), _wide(next_features), _wide(_flat(reward, count, "reward")), _wide(weight), gamma)


def _flat(values: Tensor, count: int, name: str) -> Tensor:
    if tuple(values.shape) not in ((count,), (count, 1)):
        raise ValueError(f"{name} must have shape ({count},) or ({count}, 1), got {tuple(values.shape)}")
    return values.reshape(count)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)
