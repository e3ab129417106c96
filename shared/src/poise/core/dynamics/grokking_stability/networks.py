"""The networks on which grokking is studied: a ReLU perceptron, and a transformer of one layer.

>>> import torch
>>> model = algorithmic_mlp(226, 113)
>>> model(torch.zeros(1, 226)).shape
torch.Size([1, 113])
"""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn


class AlgorithmicMLP(nn.Module):
    """A ReLU perceptron whose output is multiplied by ``alpha``; see :func:`algorithmic_mlp`."""

    def __init__(self, widths: Sequence[int], *, bias: bool, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        return self.alpha * last(x)


def algorithmic_mlp(
    inputs: int, outputs: int, hidden: Sequence[int] = (200, 200), *, bias: bool = False, alpha: float = 1.0
) -> AlgorithmicMLP:
    """The network of the MLP experiments: two hidden layers of 200 ReLU units.

    Args:
        inputs: numbers per sample.
        outputs: classes.
        hidden: widths of the hidden layers.
        bias: whether the layers have biases. The paper's have some for sparse parity only: without them the network is
            homogeneous in its weights.
        alpha: scale of the output; a small one keeps the network from the lazy regime. Divide the learning rate by its square.

    Raises:
        ValueError: a width is below 1.
    """
    widths = (inputs, *hidden, outputs)
    if min(widths) < 1:
        raise ValueError(f"every layer needs at least one unit, got widths {widths}")
    return AlgorithmicMLP(widths, bias=bias, alpha=alpha)


class AlgorithmicTransformer(nn.Module):
    """A post-norm encoder on a sequence of residues, read out at the last one.

    Args:
        p: the modulus: number of tokens and of classes.
        dim: width; the feed-forward layers have PyTorch's default of 2,048 units, as the authors' do.
        heads: attention heads.
        layers: encoder layers.
        alpha: scale of the output.
    """

    def __init__(self, p: int, dim: int = 128, heads: int = 4, layers: int = 1, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.embedding = nn.Embedding(p, dim)
        self.encoder = nn.Sequential(*(nn.TransformerEncoderLayer(dim, heads, batch_first=True) for _ in range(layers)))
        self.readout = nn.Linear(dim, p)

    def forward(self, residues: Int[Tensor, "batch length"]) -> Float[Tensor, "batch p"]:
        return self.alpha * self.readout(self.encoder(self.embedding(residues))[:, -1])
