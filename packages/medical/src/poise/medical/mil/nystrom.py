r"""Self-attention through landmarks, in memory linear in the number of tokens, for padded sequences of any length.

Xiong et al., "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", AAAI 2021, arXiv 2102.03902.

.. math:: \mathrm{softmax}(Q \tilde K^\top)\, \mathrm{softmax}(\tilde Q \tilde K^\top)^{+}\, \mathrm{softmax}(\tilde Q K^\top)\, V

where the landmarks :math:`\tilde Q, \tilde K` are means over m windows of tokens. Each sequence of a batch has windows of its own,
so that it gets what it would get alone.

>>> import torch
>>> out, scores = NystromAttention(32, heads=4)(torch.randn(2, 50, 32), torch.tensor([50, 20]))
>>> out.shape, scores.shape
(torch.Size([2, 50, 32]), torch.Size([2, 4, 50]))
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class NystromAttention(nn.Module):
    """Multi-head attention by the Nyström approximation, with a depthwise convolution of the values added.

    Args:
        dim: width of a token, divisible by ``heads``.
        heads: number of heads.
        landmarks: windows per sequence; half of ``dim`` by default, as TransMIL has it.
        iterations: of the pseudo-inverse.
        kernel: length of the convolution, odd.
        dropout: of the output.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        landmarks: int | None = None,
        iterations: int = 6,
        kernel: int = 33,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads, self.landmarks, self.iterations = heads, landmarks or max(1, dim // 2), iterations
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.local = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(
        self, tokens: Float[Tensor, "bags tokens dim"], lengths: Int[Tensor, "bags"]
    ) -> tuple[Float[Tensor, "bags tokens dim"], Float[Tensor, "bags heads tokens"]]:
        """Attend among the first ``lengths`` tokens of every sequence.

        Returns:
            The new tokens, and the raw scores that the first token gives to all others: the row of exact attention, of which the
            landmarks give an approximation.
        """
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        rows = real[:, None, :, None]
        q, k, v = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q / math.sqrt(q.shape[-1])
        v = v * rows
        windows = self._windows(lengths, tokens.shape[1]).unsqueeze(1).to(q.dtype)
        q_mark, k_mark = windows @ q, windows @ k
        from_marks = (q_mark @ k.mT).masked_fill(~rows.mT, -math.inf).softmax(-1) @ v
        core = pseudo_inverse((q_mark @ k_mark.mT).softmax(-1), self.iterations) @ from_marks
        out = (q @ k_mark.mT).softmax(-1) @ core + self.local(v)
        first = (q[:, :, :1] @ k.mT).squeeze(2)
        return self.to_out(out.transpose(1, 2).flatten(2)), first

    def _windows(self, lengths: Tensor, tokens: int) -> Float[Tensor, "bags landmarks tokens"]:
        """Averages over equal windows of the real tokens; windows of one token, some of them twice, where there are too few."""
        mark = torch.arange(self.landmarks, device=lengths.device)
        start = mark * lengths[:, None] // self.landmarks
        stop = torch.maximum(start + 1, (mark + 1) * lengths[:, None] // self.landmarks)
        place = torch.arange(tokens, device=lengths.device)
        inside = (place >= start[..., None]) & (place < stop[..., None])
        return inside / (stop - start)[..., None]


def pseudo_inverse(matrix: Float[Tensor, "... m m"], iterations: int = 6) -> Float[Tensor, "... m m"]:
    """Moore-Penrose inverse by matrix products alone, each matrix of a batch scaled by its own norms.

    Source:
        Razavi, Kerayechian, Gachpazan and Shateyi, "A New Iterative Method for Finding Approximate Inverses of Complex Matrices",
        Abstract and Applied Analysis 2014; in Xiong et al. 2021, equation 13.
    """
    size = matrix.abs()
    scale = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    inverse = (matrix.mT / scale[..., None, None]).flatten(0, -3)
    flat = matrix.flatten(0, -3)
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(flat)
    for _ in range(iterations):
        product = flat @ inverse
        inner = torch.baddbmm(one, product, 7 * one - product, beta=15, alpha=-1)
        inverse = inverse @ torch.baddbmm(one, product, inner, beta=13, alpha=-1) / 4
    return inverse.view_as(matrix)
