r"""Is training stuck? Softmax collapse, and gradients that only scale the weights.

Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.

In floating-point numbers of type F the softmax of a sample has *collapsed* when its sum S = sum_k exp(z_k - max z) is exactly 1:
what the other classes add is lost in rounding, and loss and gradient of a classified sample are exactly 0. For a single rival that
is so beyond a margin of 16.6 in float32, 36.7 in float64, 7.6 in float16. Logits get there by *naive loss minimisation*, steps along
the weights themselves, which the cosine of -g and w measures.

>>> import torch
>>> logits = torch.tensor([[20.0, 0.0], [2.0, 0.0]])
>>> [softmax_collapse_fraction(logits, dtype).item() for dtype in (torch.float16, torch.float32, torch.float64)]
[0.5, 0.5, 0.0]
>>> zero_loss_fraction(torch.nn.functional.cross_entropy(logits, torch.zeros(2).long(), reduction="none")).item()
0.5
>>> weight = torch.tensor([3.0, 4.0])
>>> round(nlm_cosine([weight], [torch.tensor([-3.0, 0.0])]).item(), 4)
0.6
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def softmax_collapse_fraction(
    z: Float[Tensor, "*batch classes"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, ""]:
    r"""Share of samples whose softmax sum :math:`\sum_k \exp(z_k - \max z)` is exactly 1 when computed in ``dtype``.

    Args:
        z: logits, classes last.
        dtype: the floating-point type of the loss.

    Returns:
        A share from 0 to 1, in float32.

    Raises:
        TypeError: ``z`` or ``dtype`` is not floating-point.
        ValueError: there is no sample, or there are fewer than two classes.

    Source:
        Section 3, the definition of softmax collapse.
    """
    if not (z.is_floating_point() and dtype.is_floating_point):
        raise TypeError(f"logits and dtype must be floating-point, got {z.dtype} and {dtype}")
    if z.dim() == 0 or z.shape[-1] < 2 or z.numel() == 0:
        raise ValueError(f"expected samples with at least two classes, got logits of shape {tuple(z.shape)}")
    z = z.to(dtype)
    total = (z - z.amax(-1, keepdim=True)).exp().sum(-1)
    return (total == 1).float().mean()


@torch.no_grad()
def zero_loss_fraction(loss: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Share of samples whose loss is exactly 0: nothing more is learned from them.

    Args:
        loss: the loss of each sample (``reduction="none"``).

    Returns:
        A share from 0 to 1, in float32.

    Raises:
        ValueError: there is no sample.
    """
    if loss.numel() == 0:
        raise ValueError(f"expected the losses of samples, got shape {tuple(loss.shape)}")
    return (loss == 0).float().mean()


@torch.no_grad()
def nlm_cosine(
    params: Iterable[Tensor], grads: Iterable[Tensor | None] | None = None, per_layer: bool = False
) -> Float[Tensor, "..."]:
    r"""Alignment :math:`\cos(-g, w)` of the descent direction with the weights.

    For a network that is homogeneous in its weights (ReLU, no biases) moving along w scales the logits and changes no
    prediction; 1 means that nothing else happens. Take it before perpGrad removes this direction.

    Args:
        params: the parameters.
        grads: their gradients; the ``grad`` of each by default. Parameters without a gradient do not count.
        per_layer: one cosine for each parameter with a gradient instead of one for all together.

    Returns:
        A value from -1 to 1, 0 where the weights or the gradient are zero.

    Raises:
        ValueError: no parameter has a gradient, or a gradient does not fit its parameter.

    Source:
        Section 4, the definition of naive loss minimisation.
    """
    params = list(params)
    given = [param.grad for param in params] if grads is None else list(grads)
    if len(given) != len(params):
        raise ValueError(f"expected one gradient per parameter, got {len(given)} for {len(params)}")
    pairs = [(_flat(w), _flat(g).to(_flat(w))) for w, g in zip(params, given, strict=True) if g is not None]
    if not pairs:
        raise ValueError("no parameter has a gradient: call it between backward() and zero_grad()")
    if shapes := [(w.numel(), g.numel()) for w, g in pairs if w.numel() != g.numel()]:
        raise ValueError(
            f"gradients must have the size of their parameters, got {shapes[0][1]} for {shapes[0][0]} entries"
        )
    products = torch.stack([torch.dot(w, g) for w, g in pairs])
    weight_norms, norms = (
        torch.stack([torch.linalg.vector_norm(part) for part in side]) for side in zip(*pairs, strict=True)
    )
    if not per_layer:
        products, weight_norms, norms = products.sum(), weight_norms.norm(), norms.norm()
    # One after the other: the product of two norms may underflow.
    cosine = -products / _or_one(weight_norms) / _or_one(norms)
    return cosine.clamp(-1, 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().to(torch.promote_types(tensor.dtype, torch.float32))


def _or_one(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, 1.0)
