"""The networks that ADELE was published with: the U-Net of SegTHOR, and DeepLabV1 on ResNet38 for PASCAL VOC."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """U-Net for images of any size.

    With ``width=64, levels=4`` that of SegTHOR: 64, 128, 256, 512, 512 channels, bilinear on the way up.

    Args:
        channels: of the image.
        classes: of the logits.
        width: channels of the first level; they double, up to eight times as many.
        levels: how often the image is halved.
        norm: ``"batch"``, or ``"instance"``, which is the same in training and evaluation.
    """

    def __init__(self, channels: int, classes: int, width: int = 64, levels: int = 4, norm: str = "batch") -> None:
        super().__init__()
        widths = [width * 2 ** min(level, 3) for level in range(levels)]
        widths.append(widths[-1])
        self.first = _double(channels, width, norm)
        self.down = nn.ModuleList(_double(a, b, norm) for a, b in pairwise(widths))
        up = [(widths[level + 1], widths[level], widths[max(level - 1, 0)]) for level in reversed(range(levels))]
        below = [widths[-1], *(out for _, _, out in up)]
        self.up = nn.ModuleList(_double(below[place] + skip, out, norm) for place, (_, skip, out) in enumerate(up))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes h w"]:
        """Logits."""
        skips = [self.first(x)]
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=True)
            x = block(torch.cat([skip, x], 1))
        return self.head(x)


def _double(channels: int, width: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (channels, width):
        normalization = nn.BatchNorm2d(width) if norm == "batch" else nn.InstanceNorm2d(width, affine=True)
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), normalization, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


BN_MOMENTUM = 3e-4


class DeepLabV1(nn.Module):
    """ResNet38 with a dilated head; its logits are an eighth of the image.

    Batch normalisation of the backbone keeps the statistics that it was pretrained with, and its first convolution stays as it is.

    Wu, Shen and van den Hengel, Wider or Deeper: Revisiting the ResNet Model for Visual Recognition, 2016, arXiv 1611.10080; Chen et
    al., Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs, ICLR 2015.

    Args:
        classes: of the logits.
        width: channels of the first layer; 64 is the published network.
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        head = 8 * width
        self.backbone = _resnet38(width)
        self.head = nn.Sequential(
            nn.Conv2d(64 * width, head, 3, padding=12, dilation=12, bias=False),
            nn.BatchNorm2d(head, momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
            nn.Conv2d(head, head, 1, bias=False),
            nn.BatchNorm2d(head, momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(head, classes, 1),
        )
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.backbone[0].weight.requires_grad_(False)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes _ _"]:
        """Logits at an eighth of the resolution."""
        return self.head(self.backbone(x))

    def train(self, mode: bool = True) -> "DeepLabV1":
        """Training mode, in which the backbone's batch normalisation stays in evaluation mode."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Weights and biases of the backbone, then of the head: factors 1, 2, 10 and 20 of the learning rate, biases without decay.

        Batch normalisation of the head is not trained by the authors' optimizer, and not here.
        """
        groups: list[dict[str, object]] = []
        for part, factor in ((self.backbone, 1.0), (self.head, 10.0)):
            convolutions = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
            weights = [module.weight for module in convolutions if module.weight.requires_grad]
            biases = [module.bias for module in convolutions if module.bias is not None]
            groups.append({"params": weights, "factor": factor, "weight_decay": weight_decay})
            groups.append({"params": biases, "factor": 2 * factor, "weight_decay": 0.0})
        return groups


class _Block(nn.Module):
    """Pre-activated residual block: a branch of convolutions, each behind batch normalisation, ReLU and perhaps dropout."""

    def __init__(self, channels: int, convolutions: list[nn.Conv2d], stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        out = convolutions[-1].out_channels
        self.before = nn.Sequential(nn.BatchNorm2d(channels, momentum=BN_MOMENTUM), nn.ReLU())
        layers: list[nn.Module] = [convolutions[0]]
        for convolution in convolutions[1:]:
            layers += [nn.BatchNorm2d(convolution.in_channels, momentum=BN_MOMENTUM), nn.ReLU()]
            layers += [nn.Dropout2d(dropout)] if dropout else []
            layers.append(convolution)
        self.branch = nn.Sequential(*layers)
        same = channels == out and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.before(x)
        return (x if self.shortcut is None else self.shortcut(activated)) + self.branch(activated)


def _resnet38(width: int) -> nn.Sequential:
    def convolution(before: int, after: int, side: int = 3, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
        padding = dilation if side == 3 else 0
        return nn.Conv2d(before, after, side, stride, padding, dilation, bias=False)

    def basic(before: int, middle: int, after: int, stride: int = 1, dilations: tuple[int, int] = (1, 1)) -> _Block:
        first = convolution(before, middle, 3, stride, dilations[0])
        return _Block(before, [first, convolution(middle, after, 3, 1, dilations[1])], stride)

    def bottleneck(before: int, after: int, dropout: float) -> _Block:
        narrow, middle = after // 4, after // 2
        parts = [convolution(before, narrow, 1), convolution(narrow, middle, 3, 1, 4), convolution(middle, after, 1)]
        return _Block(before, parts, dropout=dropout)

    w = width
    blocks: list[nn.Module] = [convolution(3, w)]
    for before, after, count in ((w, 2 * w, 3), (2 * w, 4 * w, 3), (4 * w, 8 * w, 6)):
        blocks.append(basic(before, after, after, stride=2))
        blocks += [basic(after, after, after) for _ in range(count - 1)]
    blocks.append(basic(8 * w, 8 * w, 16 * w, dilations=(1, 2)))
    blocks += [basic(16 * w, 8 * w, 16 * w, dilations=(2, 2)) for _ in range(2)]
    blocks += [bottleneck(16 * w, 32 * w, 0.3), bottleneck(32 * w, 64 * w, 0.5)]
    return nn.Sequential(*blocks, nn.BatchNorm2d(64 * w, momentum=BN_MOMENTUM), nn.ReLU())
