r"""Selective kernels: every channel chooses how far it looks. Backbone of the classifier.

Li, Wang, Hu and Yang, "Selective Kernel Networks", CVPR 2019, arXiv 1903.06586.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from poise.medical.histopathology.shisrcnet.blocks import check_batch, conv_bn_relu, global_average, weigh_branches


class SKConv(nn.Module):
    r"""Selective-kernel convolution: grouped 3x3 convolutions of growing dilation, weighed channel by channel.

    .. math:: U = \sum_i U_i, \quad z = \mathrm{ReLU}(\mathrm{BN}(W \, \mathrm{GAP}(U))), \quad
        w = \mathrm{softmax}_i(A_i z + b_i), \quad V = \sum_i w_i \odot U_i

    Args:
        channels: C, of input and output.
        branches: number of convolutions; the i-th has dilation i.
        groups: of each of them.
        reduction: z has C / reduction numbers,
        least: but at least so many.
        stride: of the convolutions.

    Raises:
        ValueError: fewer than two branches, or channels that do not divide into the groups; in training also a batch of one image.

    Source:
        Li et al., CVPR 2019, section 3.1.
    """

    def __init__(
        self,
        channels: int,
        *,
        branches: int = 2,
        groups: int = 32,
        reduction: int = 16,
        least: int = 32,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if branches < 2:
            raise ValueError(f"branches must be at least 2 for there to be a choice, got {branches}")
        if groups < 1 or channels % groups:
            raise ValueError(f"channels must divide into the groups, got {channels} channels and {groups} groups")
        squeezed = max(channels // reduction, least)
        self.branches = nn.ModuleList(
            conv_bn_relu(channels, channels, 3, stride=stride, dilation=1 + index, groups=groups)
            for index in range(branches)
        )
        self.squeeze = conv_bn_relu(channels, squeezed, 1)
        self.scorers = nn.ModuleList(nn.Conv2d(squeezed, channels, 1) for _ in range(branches))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels rows columns"]:
        """Features of as many channels, smaller by the stride."""
        check_batch(self, x)
        branches = [branch(x) for branch in self.branches]
        z = self.squeeze(global_average(sum(branches[1:], branches[0])))
        return weigh_branches(branches, [scorer(z) for scorer in self.scorers])


class SKUnit(nn.Module):
    """Bottleneck with a selective-kernel convolution in the middle, and a shortcut around it.

    Args:
        in_channels: of the input.
        width: of the bottleneck; divisible by the 32 groups.
        out_channels: of the output. The shortcut has a convolution where channels or size change.
        stride: of the convolution in the middle.

    Raises:
        ValueError: a width that does not divide into 32 groups.

    Source:
        Li et al., CVPR 2019, table 1.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.reduce = conv_bn_relu(in_channels, width, 1)
        self.select = SKConv(width, stride=stride)
        self.expand = _conv_bn(width, out_channels)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else _conv_bn(in_channels, out_channels, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out rows columns"]:
        """Features, smaller by the stride."""
        return self.activation(self.expand(self.select(self.reduce(x))) + self.shortcut(x))


class SKNet26(nn.Sequential):
    """Stem and three stages of :class:`SKUnit`: an image becomes 128 channels at an eighth of its size.

    The stem is a 7x7 convolution of stride 2 and a max pooling of stride 2; stages have 2, 2 and 4 units.

    Args:
        stages: ``(units, width, channels, stride)`` of each stage.

    Attributes:
        out_channels: channels of the output.

    Source:
        Xie et al., MICCAI 2023, CF module; widths of the bottlenecks as in the authors' release.
    """

    def __init__(
        self, stages: Sequence[tuple[int, int, int, int]] = ((2, 32, 64, 1), (2, 64, 128, 2), (4, 128, 128, 1))
    ) -> None:
        channels = 32
        layers: list[nn.Module] = [conv_bn_relu(3, channels, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)]
        for units, width, out_channels, stride in stages:
            for unit in range(units):
                layers.append(SKUnit(channels, width, out_channels, stride if unit == 0 else 1))
                channels = out_channels
        super().__init__(*layers)
        self.out_channels = channels


def _conv_bn(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
