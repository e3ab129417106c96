r"""Mixture-of-experts routing by sparse transport: no expert gets more tokens than it can take, without an auxiliary loss.

Liu, Puigcerver and Blondel, Sparsity-Constrained Optimal Transport, ICLR 2023, arXiv 2209.15466. In every group of S tokens and E
experts, with scores from a linear layer,

.. math:: \min_{T 1 = 1_S,\ T^\top 1 = \frac SE 1_E} -\langle T, \mathrm{softmax}(X W)\rangle + \tfrac\gamma2 \|T\|^2, \qquad
          \|t_j\|_0 \le k,

solved by a fixed number of steps of Adam on the semi-dual. Where the plan has mass, the token goes to the expert; the answers are
combined with the softmax gates, so the plan itself needs no gradient.

>>> import torch
>>> from poise.ot import SparseOTRouter
>>> router = SparseOTRouter(width=16, experts=4)
>>> dispatch, combine, metrics = router(torch.randn(2, 64, 16))
>>> dispatch.shape, bool((dispatch.sum(1) <= router.capacity(64)).all())
(torch.Size([2, 64, 4]), True)
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.ot.sparse.duals import SemiDual
from poise.ot.sparse.firstorder import adam_point
from poise.ot.sparse.projection import wide
from poise.ot.sparse.regularizers import ColumnRegularizer, NegEntropy, SparsityConstrained
from poise.ot.sparse.sparse_ot import solve_semi_dual

CAPACITY_MULTIPLE = 4
"""The released layer rounds the capacity up to a multiple of this."""

RELEASED_STEPS, RELEASED_RATE = 20, 1e-2


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
        choose: who is limited: ``"tokens"``, every expert chooses at most its capacity of tokens; ``"experts"``, every token chooses
            at most ``selected`` experts.
        capacity_factor: capacity of an expert in units of an equal share, for ``choose="tokens"``.
        selected: experts per token, for ``choose="experts"``.
        gamma: strength of the quadratic term.
        steps: steps of Adam on the semi-dual.
        learning_rate: of these steps.
        combine: what weighs the answers: the softmax ``"gates"``, as released, or the entries of the ``"plan"``.
        entropic: route by entropic transport on the raw scores instead, as the released comparison does: the L-BFGS router, whose
            plan is cut to the largest entries per expert (or token).
        noise: standard deviation of the noise on the scores of the entropic router while training, in units of 1 / experts.
        generator: of that noise.

    Raises:
        ValueError: a number is out of range, or an option is unknown.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        choose: Literal["tokens", "experts"] | str = "tokens",
        capacity_factor: float = 1.0,
        selected: int = 1,
        gamma: float = 1.0,
        steps: int = RELEASED_STEPS,
        learning_rate: float = RELEASED_RATE,
        combine: Literal["gates", "plan"] | str = "gates",
        entropic: bool = False,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or experts < 1:
            raise ValueError(f"width and experts must be at least 1, got {width} and {experts}")
        if choose not in ("tokens", "experts"):
            raise ValueError(f"choose must be 'tokens' or 'experts', got {choose!r}")
        if combine not in ("gates", "plan"):
            raise ValueError(f"combine must be 'gates' or 'plan', got {combine!r}")
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        if not 1 <= selected <= experts:
            raise ValueError(f"selected must lie in 1..{experts}, got {selected}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.score = nn.Linear(width, experts, bias=False)
        self.experts, self.choose, self.capacity_factor, self.selected = experts, choose, capacity_factor, selected
        self.gamma, self.steps, self.learning_rate = gamma, steps, learning_rate
        self.combine, self.entropic, self.noise, self.generator = combine, entropic, noise, generator

    def capacity(self, tokens: int) -> int:
        """Tokens that an expert can take from a group of ``tokens``."""
        exact = math.ceil(self.capacity_factor * tokens / self.experts)
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
        logits = self.score(tokens)
        gates = wide(logits).softmax(-1)
        scores = self._noisy(wide(logits.detach())) if self.entropic else gates.detach()
        plan = self._cut(entropic_plan(scores)) if self.entropic else self.sparse_plan(scores)
        dispatch = plan > 0
        weights = gates if self.combine == "gates" else plan
        combine = torch.where(dispatch, weights, 0.0).to(logits.dtype)
        return Routing(dispatch, combine, self._metrics(plan, dispatch))

    def sparse_plan(self, scores: Float[Tensor, "groups tokens experts"]) -> Float[Tensor, "groups tokens experts"]:
        """The capped plan of scores in float32 or float64; without gradient."""
        groups, tokens, experts = scores.shape
        a, b = scores.new_ones(groups, tokens), scores.new_full((groups, experts), tokens / experts)
        k = self.capacity(tokens) if self.choose == "tokens" else self.selected
        reg = SparsityConstrained(k, self.gamma)
        if self.choose == "tokens":
            return adam_plan(a, b, -scores, reg, self.steps, self.learning_rate)
        return adam_plan(b, a, -scores.mT, reg, self.steps, self.learning_rate).mT

    def _noisy(self, logits: Tensor) -> Tensor:
        if not (self.training and self.noise):
            return logits
        draw = torch.randn(logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device)
        return logits + self.noise / self.experts * draw

    def _cut(self, plan: Tensor) -> Tensor:
        """The largest entries per expert, or per token."""
        dim, k = (-2, self.capacity(plan.shape[-2])) if self.choose == "tokens" else (-1, self.selected)
        largest = plan.topk(k, dim=dim)
        return torch.zeros_like(plan).scatter(dim, largest.indices, largest.values)

    def _metrics(self, plan: Tensor, dispatch: Tensor) -> dict[str, Tensor]:
        load = dispatch.sum(-2).amax() / self.capacity(plan.shape[-2])
        dropped = (~dispatch.any(-1)).float().mean()
        return {"max_load": load, "dropped": dropped, "row_error": (plan.sum(-1) - 1).abs().mean()}


@torch.compiler.disable  # twenty unrolled steps make a large graph for no gain
def adam_plan(
    a: Float[Tensor, "groups m"],
    b: Float[Tensor, "groups n"],
    cost: Float[Tensor, "groups m n"],
    reg: ColumnRegularizer,
    steps: int = RELEASED_STEPS,
    learning_rate: float = RELEASED_RATE,
) -> Float[Tensor, "groups m n"]:
    """The plan after a fixed number of steps of Adam on the semi-dual from zero; nothing is checked and nothing waits."""
    objective = SemiDual(a, b, cost.detach().mT.contiguous(), reg)
    return (
        objective.entries(adam_point(objective, torch.zeros_like(a), learning_rate=learning_rate, steps=steps))
        .dense()
        .mT
    )


@torch.compiler.disable
def entropic_plan(scores: Float[Tensor, "groups tokens experts"]) -> Float[Tensor, "groups tokens experts"]:
    """The entropic plan, at strength 1, that gives every token a unit of mass and every expert an equal share."""
    groups, tokens, experts = scores.shape
    a, b = scores.new_ones(groups, tokens), scores.new_full((groups, experts), tokens / experts)
    plan = solve_semi_dual(a, b, -scores, NegEntropy(1.0), tol=1e-3).plan
    assert isinstance(plan, Tensor)
    return plan
