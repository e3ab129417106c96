r"""Mixture-of-experts routing by sparse transport: no expert gets more tokens than it can take, without an auxiliary loss.

Liu, Puigcerver and Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466. In every group of S tokens and E
experts, with scores from a linear layer,

.. math:: \min_{T 1 = 1_S,\ T^\top 1 = \frac SE 1_E} -\langle T, \mathrm{softmax}(X W)\rangle + \tfrac\gamma2 \|T\|^2, \qquad
          \|t_j\|_0 \le k,

solved by a fixed number of steps of Adam on the semi-dual. Where the plan has mass, the token goes to the expert; the answers are
combined with the softmax gates, so the plan needs no gradient. Where the plan itself weighs the answers, its gradient is that of the
read-out at the potentials found: never of the steps that found them.

>>> import torch
>>> from poise.ot import SparseOTRouter
>>> router = SparseOTRouter(width=16, experts=4)
>>> dispatch, combine, metrics = router(torch.randn(2, 64, 16))
>>> dispatch.shape, bool((dispatch.sum(1) <= router.capacity(64)).all())
(torch.Size([2, 64, 4]), True)
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.core.eager import eager
from poise.ot.sparse.duals import SemiDual
from poise.ot.sparse.firstorder import adam_point
from poise.ot.sparse.lbfgs import lbfgs
from poise.ot.sparse.projection import sparse_simplex_projection, wide
from poise.ot.sparse.regularizers import NegEntropy, SparsityConstrained

CAPACITY_MULTIPLE = 4
"""The released layer rounds the capacity up to a multiple of this."""

RELEASED_STEPS, RELEASED_RATE = 20, 1e-2
LBFGS_ERROR = 1e-3
"""Share of the tokens' mass that the released L-BFGS router may miss."""

Choice = Literal["tokens", "experts"]
Method = Literal["sparse", "sinkhorn", "lbfgs"]
Weights = Literal["gates", "plan"]


class Routing(NamedTuple):
    """What goes where.

    Attributes:
        dispatch: whether a token goes to an expert (groups, tokens, experts).
        combine: the weight of the expert's answer, 0 elsewhere.
        metrics: detached scalars for logging: ``max_load`` (tokens of the fullest expert, in capacities), ``dropped`` (share of
            tokens that no expert takes), ``row_error`` (what the plan misses of the tokens' unit masses, on average).
    """

    dispatch: Bool[Tensor, "groups tokens experts"]
    combine: Float[Tensor, "groups tokens experts"]
    metrics: dict[str, Tensor]


class SparseOTRouter(nn.Module):
    """Routes tokens to experts by sparsity-constrained transport.

    Args:
        width: features of a token.
        experts: number of experts.
        choose: what is chosen: ``"tokens"``, every expert chooses tokens, at most its capacity; ``"experts"``, every token chooses
            experts, at most ``selected``, and those beyond an expert's capacity are turned away.
        capacity_factor: capacity of an expert in units of an equal share of the tokens (times ``selected``, if tokens choose).
        selected: experts per token, for ``choose="experts"``.
        method: ``"sparse"``, the capped plan of the softmax of the scores. ``"sinkhorn"`` and ``"lbfgs"``, the entropic plan of the
            raw scores by that solver, cut to the largest entries per expert (or token): the released comparison.
        gamma: strength of the quadratic term; the entropic plans have strength 1.
        steps: steps of Adam on the semi-dual, or of the solver of ``method``.
        learning_rate: of Adam.
        combine: what weighs the answers: the softmax ``"gates"``, as released, or the entries of the ``"plan"``.
        first_come: whether the tokens that an expert turns away are the last ones; else those with the smallest entries in the plan
            (batch priority routing). All first choices go before all second ones. For ``choose="experts"``.
        noise: standard deviation of the noise on the scores of the entropic methods while training, in units of 1 / experts.
        generator: of that noise.

    Raises:
        ValueError: a number is out of range, or an option is unknown.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        choose: Choice | str = "tokens",
        capacity_factor: float = 1.0,
        selected: int = 1,
        method: Method | str = "sparse",
        gamma: float = 1.0,
        steps: int = RELEASED_STEPS,
        learning_rate: float = RELEASED_RATE,
        combine: Weights | str = "gates",
        first_come: bool = True,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or experts < 1:
            raise ValueError(f"width and experts must be at least 1, got {width} and {experts}")
        for name, given, known in (
            ("choose", choose, get_args(Choice)),
            ("method", method, get_args(Method)),
            ("combine", combine, get_args(Weights)),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {given!r}")
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        if not 1 <= selected <= experts:
            raise ValueError(f"selected must lie in 1..{experts}, got {selected}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not gamma > 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.score = nn.Linear(width, experts, bias=False)
        self.experts, self.choose, self.capacity_factor, self.selected = experts, choose, capacity_factor, selected
        self.gamma, self.steps, self.learning_rate = gamma, steps, learning_rate
        self.method, self.combine, self.first_come = method, combine, first_come
        self.noise, self.generator = noise, generator

    def capacity(self, tokens: int) -> int:
        """Tokens that an expert can take from a group of ``tokens``."""
        wishes = tokens if self.choose == "tokens" else tokens * self.selected
        exact = math.ceil(self.capacity_factor * wishes / self.experts)
        return min(tokens, CAPACITY_MULTIPLE * math.ceil(exact / CAPACITY_MULTIPLE))

    def forward(self, tokens: Float[Tensor, "..."]) -> Routing:
        """Route every group by itself.

        Args:
            tokens: (groups, tokens, width).

        Raises:
            ValueError: the shape does not fit.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.score.in_features or tokens.numel() == 0:
            raise ValueError(
                f"tokens must have shape (groups, tokens, {self.score.in_features}) with none of them 0, got {tuple(tokens.shape)}"
            )
        logits = self._noisy(self.score(tokens))
        gates = wide(logits).softmax(-1)
        plan = self.plan(gates if self.method == "sparse" else wide(logits))
        dispatch = self._within_capacity(plan) if self.choose == "experts" else plan > 0
        weights = gates if self.combine == "gates" else plan
        combine = torch.where(dispatch, weights, 0.0).to(logits.dtype)
        return Routing(dispatch, combine, self._metrics(plan.detach(), dispatch))

    def plan(self, scores: Float[Tensor, "groups tokens experts"]) -> Float[Tensor, "groups tokens experts"]:
        """The capped plan of scores in float32 or float64: tokens have mass 1, experts an equal share of it.

        Its gradient is that of the read-out at fixed potentials.
        """
        _, tokens, experts = scores.shape
        if self.choose == "tokens":
            return self._columns(scores, tokens / experts, self.capacity(tokens))
        return self._columns(scores.mT, 1.0, self.selected).mT

    def _columns(self, scores: Float[Tensor, "groups m n"], share: float, k: int) -> Float[Tensor, "groups m n"]:
        """The plan whose columns have the mass ``share`` and at most ``k`` nonzeros."""
        potential = row_potential(
            scores.detach(), share, SparsityConstrained(k, self.gamma), self.method, self.steps, self.learning_rate
        )
        x = scores + potential[..., None]
        if self.method == "sparse":
            return share * sparse_simplex_projection(x / (self.gamma * share), k, dim=-2)
        plan = share * x.softmax(-2)
        largest = plan.topk(min(k, plan.shape[-2]), dim=-2)
        return torch.zeros_like(plan).scatter(-2, largest.indices, largest.values)

    def _noisy(self, logits: Tensor) -> Tensor:
        if self.method == "sparse" or not (self.training and self.noise):
            return logits
        draw = torch.randn(logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device)
        return logits + self.noise / self.experts * draw

    def _within_capacity(self, plan: Float[Tensor, "groups tokens experts"]) -> Bool[Tensor, "groups tokens experts"]:
        """What the experts accept of what the tokens chose: all first choices before all second ones, and so on."""
        plan = plan.detach()
        groups, tokens, experts = plan.shape
        value, choice = plan.topk(self.selected, dim=-1)
        queue = torch.arange(tokens, device=plan.device).expand(groups, -1)
        if not self.first_come:
            queue = value[..., 0].argsort(dim=-1, descending=True, stable=True)
        # one row per wish, in the order in which experts see them
        value, choice = (each.gather(1, queue[..., None].expand_as(each)).mT.flatten(1) for each in (value, choice))
        wishes = nn.functional.one_hot(choice, experts) * (value > 0)[..., None]
        accepted = wishes * (wishes.cumsum(1) <= self.capacity(tokens))
        by_queue = accepted.view(groups, self.selected, tokens, experts).amax(1)
        return torch.zeros_like(by_queue).scatter(1, queue[..., None].expand_as(by_queue), by_queue) > 0

    def _metrics(self, plan: Tensor, dispatch: Tensor) -> dict[str, Tensor]:
        load = dispatch.sum(-2).amax() / self.capacity(plan.shape[-2])
        dropped = (~dispatch.any(-1)).float().mean()
        return {"max_load": load, "dropped": dropped, "row_error": (plan.sum(-1) - 1).abs().mean()}


@eager  # the unrolled steps make a large graph for no gain
@torch.no_grad()
def row_potential(
    scores: Float[Tensor, "groups m n"],
    share: float,
    capped: SparsityConstrained,
    method: str,
    steps: int,
    learning_rate: float,
) -> Float[Tensor, "groups m"]:
    """``alpha`` of the transport problem with costs ``-scores``, columns of mass ``share`` and equal rows."""
    groups, rows, columns = scores.shape
    a, b = scores.new_full((groups, rows), share * columns / rows), scores.new_full((groups, columns), share)
    zeros = torch.zeros_like(a)
    if method == "sinkhorn":
        return sinkhorn_potential(a, b, scores, steps)
    cost = -scores.mT.contiguous()
    if method == "lbfgs":
        objective = SemiDual(a, b, cost, NegEntropy(1.0))
        return lbfgs(objective, zeros, tol=LBFGS_ERROR * a.sum(-1), max_iter=steps).point
    return adam_point(SemiDual(a, b, cost, capped), zeros, learning_rate=learning_rate, steps=steps)


def sinkhorn_potential(
    a: Float[Tensor, "groups m"], b: Float[Tensor, "groups n"], scores: Float[Tensor, "groups m n"], steps: int
) -> Float[Tensor, "groups m"]:
    """The row potential after a fixed number of Sinkhorn iterations at strength 1, in the log domain."""
    alpha = torch.zeros_like(a)
    for _ in range(steps):
        beta = b.log() - (scores + alpha[..., None]).logsumexp(-2)
        alpha = a.log() - (scores + beta[:, None, :]).logsumexp(-1)
    return alpha
