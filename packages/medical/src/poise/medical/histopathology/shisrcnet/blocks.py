r"""What the two halves of SHISRCNet are built from: branches that see the same tissue at several scales, weighed channel by channel.

.. math:: V = \sum_i w_i \odot U_i, \qquad w = \mathrm{softmax}_i(a_i), \qquad a_i \in R^C

for branches U_i of shape (batch, C, height, width) with a score for every branch and channel. The three blocks differ in where
branches and scores come from: :class:`MFEBlock` (a chain of dilated convolutions, a score each), ``SKConv`` (parallel dilated
convolutions, scores from their sum) and ``CSFBlock`` (two scales).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def branch_weights(
    scores: Sequence[Float[Tensor, "batch channels 1 1"]],
) -> Float[Tensor, "branches batch channels 1 1"]:
    """Softmax over the branches: for every channel the weights sum to one."""
    return torch.stack(tuple(scores)).softmax(0)


def weigh_branches(
    branches: Sequence[Float[Tensor, "batch channels height width"]],
    scores: Sequence[Float[Tensor, "batch channels 1 1"]],
) -> Float[Tensor, "batch channels height width"]:
    """The weighted sum of the branches, weights by :func:`branch_weights`. Equal branches give back the branch."""
    weights = branch_weights(scores)
    total = weights[0] * branches[0]
    for weight, branch in zip(weights[1:], branches[1:], strict=True):
        total = torch.addcmul(total, weight, branch)
    return total


def conv_bn_relu(
    channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Sequential:
    """Convolution that keeps the size (at stride 1), batch normalization, ReLU."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(channels, out_channels, kernel, stride, padding, dilation, groups, bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def pooled_conv_bn_relu(channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution with bias, batch normalization, ReLU, of globally pooled channels."""
    return conv_bn_relu(channels, out_channels, 1, bias=True)


def global_average(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels 1 1"]:
    """Mean over the picture."""
    return x.mean((2, 3), keepdim=True)


def check_batch(module: nn.Module, x: Tensor) -> None:
    """Refuse to train on one image where pooled channels are normalized over the batch: their variance would be 0 / 0.

    Raises:
        ValueError: ``module`` is in training mode and ``x`` holds a single image.
    """
    if module.training and x.shape[0] < 2:
        raise ValueError(
            f"in training mode {type(module).__name__} normalizes one number per image and channel over the batch: it needs "
            f"a batch of at least 2 images, got {x.shape[0]}"
        )


class MFEBlock(nn.Module):
    r"""Multi-features extraction: a chain of dilated convolutions, all of whose links count, and a shortcut around them.

    .. math::
        y_0 = f_0(x), \quad y_i = f_i(y_{i-1} + x), \qquad
        g_i = \sigma(W_i \, \mathrm{GAP}(y_i)), \qquad
        \mathrm{out} = f_{1 \times 1} \Big( \sum_i w_i \odot y_i + x \Big), \quad w = \mathrm{softmax}_i(g_i)

    with f_i a 3x3 convolution of dilation r_i, batch normalization and ReLU. Four dilations of 1, 2, 4, 8 see 31 x 31 pixels.

    Args:
        channels: C, of input and output.
        dilations: r_i, one per link of the chain.
        score_norm: the scores of the released code, :math:`\sigma(\mathrm{ReLU}(\mathrm{BN}(W_i \, \mathrm{GAP}(y_i) + b_i)))`, which
            are never below 1/2; published parameter counts include them.

    Raises:
        ValueError: no dilation, or one below 1; in training with ``score_norm`` also a batch of one image.

    Source:
        Xie et al., MICCAI 2023, SR module.
    """

    def __init__(self, channels: int, dilations: Sequence[int] = (1, 2, 4, 8), score_norm: bool = False) -> None:
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations must hold at least one number, none below 1, got {tuple(dilations)}")
        self.score_norm = score_norm
        self.links = nn.ModuleList(conv_bn_relu(channels, channels, 3, dilation=rate) for rate in dilations)
        self.scorers = nn.ModuleList(
            pooled_conv_bn_relu(channels, channels) if score_norm else nn.Conv2d(channels, channels, 1, bias=False)
            for _ in dilations
        )
        self.project = conv_bn_relu(channels, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Features of the same shape."""
        if self.score_norm:
            check_batch(self, x)
        branches: list[Tensor] = []
        for link in self.links:
            branches.append(link(branches[-1] + x if branches else x))
        scores = [
            scorer(global_average(branch)).sigmoid() for scorer, branch in zip(self.scorers, branches, strict=True)
        ]
        return self.project(weigh_branches(branches, scores) + x)
