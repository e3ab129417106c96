r"""Pairs of distributions whose optimal map for the squared Euclidean cost is known, and the error of a map on them.

Korotin et al., "Do Neural Optimal Transport Solvers Work? A Continuous Wasserstein-2 Benchmark", NeurIPS 2021, arXiv 2106.01954. The
source is a mixture of 3 Gaussians in d = 2 to 256 dimensions; the target is its image under ``grad psi`` for a convex ``psi`` that
is close to mapping it to mixtures of 10. By Brenier's theorem ``grad psi`` is the optimal map, so a learned map has an error:

    L2-UVP(T) = 100 E|T(x) - grad psi(x)|^2 / Var(target)   [percent]

:func:`mixture_pair` makes such a pair in closed form, :func:`read_mixture_pair` reads the published ones, and
:class:`RidgePotential` makes a known map for samples of your own.

>>> import torch
>>> from poise.ot import l2_uvp, mixture_pair
>>> generator = torch.Generator().manual_seed(0)
>>> pair = mixture_pair(16, generator=generator)
>>> x = pair.sample_source(512, generator)
>>> y = pair.sample_target(512, generator)            # independent of x
>>> round(l2_uvp(pair(x), pair(x)).item(), 3), bool(l2_uvp(x, pair(x)) > 10)
(0.0, True)
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from poise.ot.maps.icnn import potential_gradient

SPREAD = 0.4
"""Standard deviation of a component's coordinates, before standardisation, in the published benchmark."""

PUBLISHED_STRONG_CONVEXITY = 1e-2
"""Quadratic term of the published potentials; not stored in their files."""

STANDARDISATION_SAMPLES = 2**14


def l2_uvp(mapped: Float[Tensor, "n d"], optimal: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    r"""Unexplained variance of a map in percent, ``100 E|T(x) - T*(x)|^2 / Var(T*(x))``.

    Args:
        mapped: ``T(x_i)``.
        optimal: ``T*(x_i)`` for the same ``x_i``; their total variance is the denominator.

    Raises:
        ValueError: the shapes differ, or there is no point.
    """
    if mapped.shape != optimal.shape or mapped.numel() == 0:
        raise ValueError(f"expected images of the same points, got {tuple(mapped.shape)} and {tuple(optimal.shape)}")
    return 100 * (mapped - optimal).square().sum(-1).mean() / optimal.var(0, correction=0).sum()


class GaussianMixture(nn.Module):
    """Equally likely Gaussians ``N(center_k, factor_k factor_k^T)``.

    Args:
        centers: ``(k, d)``.
        factors: ``(k, d, d)``.
    """

    centers: Tensor
    factors: Tensor

    def __init__(self, centers: Float[Tensor, "k d"], factors: Float[Tensor, "k d d"]) -> None:
        super().__init__()
        self.register_buffer("centers", centers)
        self.register_buffer("factors", factors)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Draw on the generator's device, answer on the mixture's."""
        like, device = self.centers, generator.device
        component = torch.randint(len(like), (n,), generator=generator, device=device).to(like.device)
        noise = torch.randn(n, like.shape[1], generator=generator, device=device, dtype=like.dtype).to(like.device)
        spread = torch.empty_like(noise)
        for index, factor in enumerate(self.factors):  # over the few components, not the samples
            chosen = component == index
            spread[chosen] = noise[chosen] @ factor.T
        return like[component] + spread


class BenchmarkPair(nn.Module):
    """A source and its image under the gradient of a convex potential; calling the pair maps points optimally.

    The map is standardised: the target has mean 0 and an average variance of 1 per coordinate, estimated on 2^14 samples.

    Args:
        source: where samples come from.
        potential: convex, ``(n, d) -> (n,)``.
        generator: draws the samples of the standardisation.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, source: GaussianMixture, potential: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.source = source
        self.potential = potential.requires_grad_(False)
        images = potential_gradient(potential, source.sample(STANDARDISATION_SAMPLES, generator))
        self.register_buffer("shift", images.mean(0))
        self.register_buffer("scale", images.var(0, correction=0).mean().rsqrt())

    @property
    def dim(self) -> int:
        """The dimension."""
        return self.source.centers.shape[1]

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The optimal map."""
        return self.scale * (potential_gradient(self.potential, x) - self.shift)

    def sample_source(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Samples of the source."""
        return self.source.sample(n, generator)

    def sample_target(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Samples of the target: images of fresh samples of the source."""
        return self(self.source.sample(n, generator))


class SoftMaxAffinePotential(nn.Module):
    r"""``psi(x) = t logsumexp_k(<a_k, x> / t) + alpha |x|^2 / 2``: its gradient gathers space around the points ``a_k``.

    Args:
        points: ``a``, ``(k, d)``.
        temperature: ``t``; towards 0 each ``x`` goes to the one ``a_k`` that it is most aligned with.
        strong_convexity: ``alpha``, the share of ``x`` itself in its image.
    """

    points: Tensor

    def __init__(self, points: Float[Tensor, "k d"], temperature: float, strong_convexity: float) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.temperature, self.strong_convexity = temperature, strong_convexity

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        aligned = self.temperature * torch.logsumexp(x @ self.points.T / self.temperature, dim=-1)
        return aligned + self.strong_convexity * x.square().sum(-1) / 2


class RidgePotential(nn.Module):
    r"""``phi(x) = |x|^2 / 2 + sum_j h_j softplus(s <u_j, x> + c_j) / s``, unit directions ``u_j``: bends space along ridges.

    Args:
        dim: dimension d.
        ridges: number of ridges.
        height: the largest ``h_j``; they are uniform below it.
        sharpness: ``s``.
        generator: draws directions, offsets and heights, on the CPU.

    Raises:
        ValueError: ``dim`` or ``ridges`` is below 1, or, when called, the points are of another dimension.
    """

    directions: Tensor
    offsets: Tensor
    heights: Tensor

    def __init__(
        self, dim: int, ridges: int = 8, *, height: float = 1.0, sharpness: float = 3.0, generator: torch.Generator
    ) -> None:
        super().__init__()
        if dim < 1 or ridges < 1:
            raise ValueError(f"dim and ridges must be at least 1, got {dim} and {ridges}")
        directions = torch.randn(ridges, dim, generator=generator)
        self.register_buffer("directions", functional.normalize(directions, dim=-1))
        self.register_buffer("offsets", torch.randn(ridges, generator=generator))
        self.register_buffer("heights", height * torch.rand(ridges, generator=generator))
        self.sharpness = sharpness

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        if x.shape[-1] != self.directions.shape[1]:
            raise ValueError(f"x must be of dimension {self.directions.shape[1]}, got shape {tuple(x.shape)}")
        along = functional.softplus(self.sharpness * (x @ self.directions.T) + self.offsets) / self.sharpness
        return x.square().sum(-1) / 2 + along @ self.heights


class QuadraticICNN(nn.Module):
    r"""The potential of the published benchmark: a convex network whose every layer sees convex quadratics of the input.

        z_0 = q_0(x),    z_{l+1} = celu(W_l z_l + q_{l+1}(x)),    psi(x) = w . z_L + alpha |x|^2 / 2,
        q_l(x)_k = sum_r <A_lrk, x>^2 + <V_lk, x> + b_lk

    Args:
        state: a state dict as published, ``quadratic_layers.l.{quadratic_decomposed, weight, bias}``,
            ``convex_layers.l.weight`` and ``final_layer.weight``.
        strong_convexity: ``alpha``.

    Raises:
        ValueError: a key is missing, shapes do not fit together, or a weight that must not be negative is.
    """

    def __init__(self, state: dict[str, Tensor], strong_convexity: float = PUBLISHED_STRONG_CONVEXITY) -> None:
        super().__init__()
        self.strong_convexity = strong_convexity
        self.depth = sum(key.startswith("convex_layers.") for key in state)
        names = [
            f"quadratic_layers.{i}.{part}"
            for i in range(self.depth + 1)
            for part in ("quadratic_decomposed", "weight", "bias")
        ]
        names += [f"convex_layers.{i}.weight" for i in range(self.depth)] + ["final_layer.weight"]
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"not a potential of the W2 benchmark: {missing[0]!r} is missing")
        for name in names:
            if not name.startswith("quadratic") and bool((state[name] < 0).any()):
                raise ValueError(f"the potential is not convex: {name!r} has a negative entry")
            self.register_buffer(name.replace(".", "_"), state[name])

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        z = self._quadratic(0, x)
        for layer in range(self.depth):
            z = functional.celu(
                functional.linear(z, self.get_buffer(f"convex_layers_{layer}_weight")) + self._quadratic(layer + 1, x)
            )
        final = functional.linear(z, self.get_buffer("final_layer_weight")).squeeze(-1)
        return final + self.strong_convexity * x.square().sum(-1) / 2

    def _quadratic(self, layer: int, x: Tensor) -> Tensor:
        factors, weight, bias = (
            self.get_buffer(f"quadratic_layers_{layer}_{part}") for part in ("quadratic_decomposed", "weight", "bias")
        )
        return torch.einsum("...d,drk->...rk", x, factors).square().sum(-2) + functional.linear(x, weight, bias)


class _Sum(nn.Module):
    """The sum of several potentials."""

    def __init__(self, potentials: Sequence[nn.Module]) -> None:
        super().__init__()
        self.potentials = nn.ModuleList(potentials)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([potential(x) for potential in self.potentials]).sum(0)


def mixture_pair(
    dim: int,
    *,
    generator: torch.Generator,
    components: int = 3,
    modes: int = 10,
    temperature: float = 0.1,
    strong_convexity: float = 0.1,
) -> BenchmarkPair:
    r"""A pair in the manner of the benchmark, in closed form.

    The source is a mixture of Gaussians. The potential is the sum of two :class:`SoftMaxAffinePotential`, each of which alone would
    gather the source around ``modes`` points: as in the benchmark, the sum of two maps has no simple target any more.

    Args:
        dim: dimension.
        generator: draws the pair, on the CPU; the same seed gives the same pair.
        components: Gaussians in the source.
        modes: points of each potential.
        temperature: softness of the potentials, relative to the spread of the alignments ``<a_k, x>``.
        strong_convexity: share of ``x`` itself in its image.

    Raises:
        ValueError: a number below 1, or a temperature or strong convexity that is not positive.
    """
    if min(dim, components, modes) < 1 or not (temperature > 0 and strong_convexity > 0):
        raise ValueError(
            "expected dim, components, modes >= 1 and temperature, strong_convexity > 0, "
            f"got {dim}, {components}, {modes}, {temperature} and {strong_convexity}"
        )

    def permutation() -> np.ndarray:
        return torch.randperm(components, generator=generator).numpy()

    def normal(*shape: int) -> np.ndarray:
        return torch.randn(*shape, generator=generator).numpy()

    source = _random_mixture(dim, components, permutation, normal)
    potentials = [
        SoftMaxAffinePotential(torch.randn(modes, dim, generator=generator), temperature * dim**0.5, strong_convexity)
        for _ in range(2)
    ]
    return BenchmarkPair(source, _Sum(potentials), generator)


def read_mixture_pair(folder: Path, dim: int) -> BenchmarkPair:
    """Read a pair of the published benchmark: the files ``Mix3toMix10/{dim}_v1.pt`` and ``{dim}_v2.pt`` of its repository.

    The source is not stored: it follows from NumPy's legacy generator at seed 0, as in the published code.

    Args:
        folder: the repository, its ``benchmarks`` folder, or ``Mix3toMix10`` itself.
        dim: 2, 4, ..., 256.

    Raises:
        FileNotFoundError: no such files in the folder.
        ValueError: a file holds something else.
    """
    names = (f"{dim}_v1.pt", f"{dim}_v2.pt")
    places = [folder, folder / "Mix3toMix10", folder / "benchmarks" / "Mix3toMix10"]
    found = next((place for place in places if all((place / name).is_file() for name in names)), None)
    if found is None:
        raise FileNotFoundError(
            f"expected Mix3toMix10/{names[0]} and {names[1]} of the Wasserstein-2 benchmark in {folder}"
        )
    potentials = [QuadraticICNN(torch.load(found / name, map_location="cpu", weights_only=True)) for name in names]
    random = np.random.RandomState(0)
    source = _random_mixture(
        dim, 3, lambda: random.choice(3, 3, replace=False), lambda *shape: random.normal(size=shape)
    )
    return BenchmarkPair(source, _Sum(potentials), torch.Generator().manual_seed(0))


def _random_mixture(
    dim: int, components: int, permutation: Callable[[], np.ndarray], normal: Callable[..., np.ndarray]
) -> GaussianMixture:
    """The benchmark's random mixture: centers on a permuted grid per coordinate, rows of the factors on the sphere, standardised."""
    centers = np.stack([permutation() for _ in range(dim)], axis=1).astype(np.float32) - (components - 1) / 2
    factors = normal(components, dim, dim).astype(np.float32)
    factors = SPREAD * factors / np.linalg.norm(factors, axis=2, keepdims=True)
    deviation = np.sqrt((centers**2).sum(1).mean() / dim + SPREAD**2)
    return GaussianMixture(torch.from_numpy(centers / deviation), torch.from_numpy(factors / deviation))
