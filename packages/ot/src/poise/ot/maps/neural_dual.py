r"""The neural dual of the squared Wasserstein distance: transport maps as gradients of convex networks, without a regularizer.

The baseline that a Monge gap is compared with; it serves the squared Euclidean cost only.

    max over convex f of  -E_mu f(x) - E_nu f*(y),      f*(y) = <x^, y> - f(x^)  at  x^ = argmax_x <x, y> - f(x)

At the optimum ``grad f`` sends ``mu`` to ``nu``, and ``x^`` as a function of ``y``, predicted by ``grad g(y)``, is its inverse. The
methods differ in how ``x^`` is found and ``g`` trained (``conjugate=``):

``"amortized"``
    ``x^ = grad g(y)``, and ``g`` maximises the same ``<x^, y> - f(x^)``. Makkuva, Taghvaei, Oh and Lee, Optimal Transport Mapping
    via Input Convex Neural Networks, ICML 2020, arXiv 1908.10962.
``"lbfgs"``
    ``grad g(y)`` is refined by L-BFGS to ``x^``, and ``g`` regresses onto it. Amos, On Amortizing Convex Conjugates for Optimal
    Transport, ICLR 2023, arXiv 2210.12153.
``"cycle"``
    No inner maximisation: both minimise ``|grad f(grad g(y)) - y|^2`` beside the dual. Korotin et al., Wasserstein-2 Generative
    Networks, ICLR 2021, arXiv 1909.13082.

>>> import torch
>>> from poise.ot import ICNN, NeuralDualSolver
>>> solver = NeuralDualSolver(ICNN(2, (16, 16)), ICNN(2, (16, 16)), conjugate="lbfgs")
>>> x, y = torch.randn(256, 2), torch.randn(256, 2) + 1
>>> _ = solver.fit(x.split(64), y.split(64), steps=5)
>>> solver.transform(x).shape
torch.Size([256, 2])
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.ot.maps.batches import cycled, to_module
from poise.ot.maps.conjugate import conjugate_point
from poise.ot.maps.icnn import ICNN, potential_gradient

CONJUGATES = ("amortized", "lbfgs", "cycle")
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.9))
"""Makkuva et al.'s optimizer."""


class NeuralDualSolver:
    r"""Learns the optimal map for the squared Euclidean cost and its inverse from samples of both sides.

    :meth:`fit` is the whole algorithm. In a training loop of your own, call :meth:`update_inverse` with samples of ``nu``
    ``inner_steps`` times and then :meth:`update_forward` once; or take the losses and step your own optimizers.

    Args:
        f: the potential whose gradient maps ``mu`` to ``nu``, ``(n, d) -> (n,)``. For an :class:`ICNN` the solver keeps it convex by
            the means that it was built with.
        g: the potential whose gradient maps ``nu`` back to ``mu``.
        conjugate: how the conjugate is computed, see the module's text.
        optimizer: makes the two optimizers from parameters.
        inner_steps: updates of ``g`` per update of ``f`` (``"cycle"`` updates both at once).
        cycle_weight: weight of the cycle term; Korotin et al. take the dimension of the data in their benchmark.
        positivity_weight: weight of ``ICNN.negativity`` for potentials with ``positivity="penalty"``.
        tol: tolerance of the L-BFGS refinement.
        max_iter: iterations of the L-BFGS refinement.

    Raises:
        ValueError: an unknown ``conjugate``, or a setting outside its range.
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        conjugate: str = "amortized",
        *,
        optimizer: OptimizerFactory = ADAM,
        inner_steps: int = 10,
        cycle_weight: float = 1.0,
        positivity_weight: float = 1.0,
        tol: float = 1e-3,
        max_iter: int = 20,
    ) -> None:
        if conjugate not in CONJUGATES:
            raise ValueError(f"conjugate must be one of {', '.join(CONJUGATES)}, got {conjugate!r}")
        if inner_steps < 1 or cycle_weight < 0 or positivity_weight < 0:
            raise ValueError(
                "expected inner_steps >= 1, cycle_weight >= 0 and positivity_weight >= 0, "
                f"got {inner_steps}, {cycle_weight} and {positivity_weight}"
            )
        self.f, self.g = f, g
        self.conjugate = conjugate
        self.inner_steps = inner_steps
        self.cycle_weight, self.positivity_weight = cycle_weight, positivity_weight
        self._refine = partial(conjugate_point, tol=tol, max_iter=max_iter)
        self.optimizer_f, self.optimizer_g = (optimizer(potential.parameters()) for potential in (f, g))
        for potential, its_optimizer in ((f, self.optimizer_f), (g, self.optimizer_g)):
            if isinstance(potential, ICNN):
                potential.project_after(its_optimizer)

    # Losses

    def forward_loss(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        """The loss of ``f``: the negative dual ``E f(x) + E f*(y)``, with ``x^`` held fixed (envelope theorem).

        Its value is the negative dual itself where ``x^`` is the maximiser.
        """
        inverse = potential_gradient(self.g, y).detach()
        if self.conjugate == "lbfgs":
            inverse = self._refine(self.f, y, inverse).point
        conjugate = (inverse * y).sum(-1) - self.f(inverse)
        return self.f(x).mean() + conjugate.mean() + self._negativity(self.f)

    def inverse_loss(self, y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        """The loss of ``g``: the inner maximisation, the regression onto the refined points, or the cycle term.

        The cycle term is a loss of ``f`` as well.
        """
        inverse = potential_gradient(self.g, y)
        if self.conjugate == "amortized":
            loss = (self.f(inverse) - (inverse * y).sum(-1)).mean()
        elif self.conjugate == "lbfgs":
            loss = (inverse - self._refine(self.f, y, inverse.detach()).point).square().sum(-1).mean()
        else:
            loss = self.cycle_weight * (potential_gradient(self.f, inverse) - y).square().sum(-1).mean() / 2
        return loss + self._negativity(self.g)

    # Updates

    def update_inverse(self, y: Float[Tensor, "m d"]) -> Tensor:
        """One optimizer step of ``g``; returns the loss, detached."""
        return _descend(self.inverse_loss(y), self.optimizer_g)

    def update_forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Tensor:
        """One optimizer step of ``f``; returns the loss, detached."""
        return _descend(self.forward_loss(x, y), self.optimizer_f)

    def update_cycle(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Tensor:
        """One step of both optimizers on the dual and the cycle term together; returns the loss, detached."""
        loss = self.forward_loss(x, y) + self.inverse_loss(y)
        return _descend(loss, self.optimizer_f, self.optimizer_g)

    def update(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], inner: Iterator[Tensor] | None = None) -> Tensor:
        """One outer step: ``inner_steps`` updates of ``g`` and one of ``f``, or one joint update for ``"cycle"``.

        Args:
            x: samples of ``mu``.
            y: samples of ``nu``.
            inner: fresh batches of ``nu`` for the updates of ``g``; ``y`` serves them all when left out.

        Returns:
            The loss of ``f``, detached.
        """
        if self.conjugate == "cycle":
            return self.update_cycle(x, y)
        for _ in range(self.inner_steps):
            self.update_inverse(y if inner is None else next(inner))
        return self.update_forward(x, y)

    # The whole algorithm

    def fit(self, loader_x: Iterable[Any], loader_y: Iterable[Any], *, steps: int = 20_000) -> "NeuralDualSolver":
        """Train on batches of both sides, taken in turn and from the start again when a loader ends.

        Args:
            loader_x: batches ``(n, d)`` of ``mu``: tensors, or tuples that start with one.
            loader_y: batches of ``nu``.
            steps: outer steps.

        Raises:
            ValueError: a loader is empty.
        """
        batches_x, batches_y = (to_module(cycled(loader), self.f) for loader in (loader_x, loader_y))
        for _ in range(steps):
            self.update(next(batches_x), next(batches_y), inner=batches_y)
        return self

    def transform(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Images under ``grad f``: samples of ``mu`` sent to ``nu``."""
        return potential_gradient(self.f, x).detach()

    def inverse_transform(self, y: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Images under the inverse map: ``grad g``, refined if ``conjugate="lbfgs"``."""
        inverse = potential_gradient(self.g, y).detach()
        return self._refine(self.f, y, inverse).point if self.conjugate == "lbfgs" else inverse

    def squared_distance(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        r"""The dual's estimate of ``W_2^2 = E|x|^2 + E|y|^2 - 2 (E f(x) + E f*(y))``."""
        inverse = self.inverse_transform(y)
        with torch.no_grad():
            conjugate = (inverse * y).sum(-1) - self.f(inverse)
            return x.square().sum(-1).mean() + y.square().sum(-1).mean() - 2 * (self.f(x).mean() + conjugate.mean())

    def state_dict(self) -> dict[str, Any]:
        """The state of both potentials and both optimizers."""
        parts: dict[str, Any] = {
            "f": self.f,
            "g": self.g,
            "optimizer_f": self.optimizer_f,
            "optimizer_g": self.optimizer_g,
        }
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.f.load_state_dict(state["f"])
        self.g.load_state_dict(state["g"])
        self.optimizer_f.load_state_dict(state["optimizer_f"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])

    def _negativity(self, potential: nn.Module) -> Tensor | float:
        if isinstance(potential, ICNN) and potential.positivity == "penalty":
            return self.positivity_weight * potential.negativity()
        return 0.0


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
    """One step of the optimizers; parameters that they do not hold get no gradient."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=[p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]])
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()
