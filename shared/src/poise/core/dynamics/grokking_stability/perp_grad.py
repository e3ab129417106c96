r"""perpGrad: keep gradient descent from lowering the loss by scaling the weights, which changes no prediction.

Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.

    g_perp = g - <w, g> / <w, w> w,    g_out = ||g|| g_perp / ||g_perp||

for every parameter tensor w with gradient g. Along w a network without biases only scales its logits: once all samples are
classified, that is where the gradient of the cross-entropy points ("naive loss minimisation"). Without that direction the
network has to learn something else, and generalises without weight decay.

>>> import torch
>>> model = torch.nn.Linear(8, 3, bias=False)
>>> optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1))
>>> model(torch.randn(16, 8)).logsumexp(-1).mean().backward()
>>> before = model.weight.square().sum()
>>> optimizer.step()
>>> growth = model.weight.square().sum() - before  # only of second order
>>> torch.allclose(growth, 0.1**2 * model.weight.grad.square().sum(), atol=1e-5)
True
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poise.core.dynamics.optimizer_wrapper import OptimizerWrapper, Parameters

EPS = 1e-30
PARALLEL_TOL = 1e-6


@torch.no_grad()
def perp_grad_(
    params: Iterable[Tensor], rescale: bool = True, eps: float = EPS, parallel_tol: float = PARALLEL_TOL
) -> None:
    r"""Remove from each ``grad`` its component along the parameter, in place.

    .. math:: g_\perp = g - \frac{\langle w, g \rangle}{\langle w, w \rangle + \epsilon}\, w, \qquad
        g_{out} = \frac{\|g\|}{\|g_\perp\| + \epsilon}\, g_\perp

    Each tensor is projected by itself. A gradient that is parallel to its parameter becomes 0, as always for a parameter
    with a single entry. Parameters without a gradient, or with a sparse one, are left alone. Half types are projected in
    float32.

    Args:
        params: parameters whose ``grad`` is changed.
        rescale: whether to give the gradient its old norm back. The paper's equation does not, the authors' code does.
        eps: keeps quotients of zeros at zero.
        parallel_tol: what counts as parallel: :math:`\|g_\perp\|` up to this share of :math:`\|g\|`. Rescaling would turn the
            rounding error that is left of such a gradient into a full step, as the authors' code does (0 for that).

    Raises:
        TypeError: a parameter is complex.
        ValueError: ``eps`` is not positive or ``parallel_tol`` is outside [0, 1).

    Source:
        Section 5, the definition of perpGrad; the rescaling from the authors' code.
    """
    _check(eps, parallel_tol)
    for weights, gradients in _groups(params):
        dtype = torch.promote_types(torch.promote_types(weights[0].dtype, gradients[0].dtype), torch.float32)
        wide = [gradient.to(dtype) for gradient in gradients]
        _project_([weight.to(dtype) for weight in weights], wide, rescale, eps, parallel_tol)
        if gradients[0].dtype != dtype:
            torch._foreach_copy_(gradients, wide)


def _project_(weights: list[Tensor], gradients: list[Tensor], rescale: bool, eps: float, parallel_tol: float) -> None:
    """Four passes over the gradients; no value leaves the device."""
    products = torch.stack([_dot(w, g) for w, g in zip(weights, gradients, strict=True)])
    weight_norm = torch.stack(torch._foreach_norm(weights))
    share = products / (weight_norm.square() + eps)
    torch._foreach_addcmul_(gradients, weights, list(share.unbind()), value=-1)

    perp_norm = torch.stack(torch._foreach_norm(gradients))
    norm = torch.hypot(perp_norm, share * weight_norm)  # of the gradient before, by Pythagoras
    scale = norm / (perp_norm + eps) if rescale else torch.ones_like(norm)
    # What is left of a parallel gradient is rounding error.
    scale = torch.where(perp_norm <= parallel_tol * norm, 0.0, scale)
    torch._foreach_mul_(gradients, list(scale.unbind()))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _groups(params: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Parameters and their gradients, by what the foreach operations want equal."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for param in params:
        if param.is_complex():
            raise TypeError(f"perpGrad is defined for real parameters, got one of {param.dtype}")
        if param.grad is None or param.grad.layout != torch.strided or param.numel() == 0:
            continue
        weights, gradients = groups[param.device, param.dtype, param.grad.dtype]
        weights.append(param)
        gradients.append(param.grad)
    return list(groups.values())


def _check(eps: float, parallel_tol: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if not 0 <= parallel_tol < 1:
        raise ValueError(f"parallel_tol must lie in [0, 1), got {parallel_tol}")


class PerpGrad(OptimizerWrapper):
    """:func:`perp_grad_` before every step of another optimizer.

    >>> model = torch.nn.Linear(8, 3)
    >>> optimizer = PerpGrad(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0))
    >>> optimizer = PerpGrad(torch.optim.AdamW, model.parameters(), {"lr": 0.01, "weight_decay": 0.0})
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)

    A decoupled weight decay of the optimizer still acts on the weights.

    Args:
        optimizer: the optimizer to wrap, or its class.
        params: with a class, the parameters or parameter groups to make it for.
        settings: with a class, its further arguments.
        rescale: whether a projected gradient gets its old norm back.
        eps: keeps quotients of zeros at zero.
        parallel_tol: share of the norm up to which what is left of a gradient counts as rounding error.

    Raises:
        TypeError: ``optimizer``, ``params`` and ``settings`` do not go together.
        ValueError: ``eps`` is not positive or ``parallel_tol`` is outside [0, 1).
    """

    def __init__(
        self,
        optimizer: Optimizer | type[Optimizer],
        params: Parameters | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        rescale: bool = True,
        eps: float = EPS,
        parallel_tol: float = PARALLEL_TOL,
    ) -> None:
        _check(eps, parallel_tol)
        super().__init__(optimizer, params, settings)
        self.rescale, self.eps, self.parallel_tol = rescale, eps, parallel_tol

    def transform_gradients(self) -> None:
        perp_grad_(self.weights_with_gradient(), self.rescale, self.eps, self.parallel_tol)
