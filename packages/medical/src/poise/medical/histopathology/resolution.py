"""Images at low resolution: how they arise, how to enlarge them without learning, and how close a restored one comes.

>>> import torch
>>> hr = torch.rand(1, 3, 32, 32)
>>> lr = degrade(hr, scale=2)
>>> lr.shape, enlarge(lr, scale=2).shape
(torch.Size([1, 3, 16, 16]), torch.Size([1, 3, 32, 32]))
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

SSIM_WINDOW = 11
"""Pixels across the window of structural similarity."""


def degrade(hr: Float[Tensor, "batch 3 height width"], scale: int) -> Float[Tensor, "batch 3 rows columns"]:
    """Bicubic reduction with antialiasing, clamped to [0, 1] as a stored image is.

    Args:
        hr: images in [0, 1].
        scale: a whole factor that divides height and width.

    Raises:
        ValueError: it does not, or there is no pixel.
    """
    _, _, height, width = hr.shape
    if height * width == 0:
        raise ValueError(f"hr must have pixels, got shape {tuple(hr.shape)}")
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"scale must divide height and width, got {scale} for {height} x {width}")
    size = (height // scale, width // scale)
    wide = hr.to(torch.promote_types(hr.dtype, torch.float32))  # on the CPU there is no antialiasing of half types
    return interpolate(wide, size=size, mode="bicubic", antialias=True).clamp(0, 1).to(hr.dtype)


def enlarge(lr: Float[Tensor, "batch 3 height width"], scale: int) -> Float[Tensor, "batch 3 rows columns"]:
    """Bicubic enlargement, clamped to [0, 1]: what super-resolution is measured against.

    Raises:
        ValueError: the images have no pixels.
    """
    if 0 in lr.shape[1:]:
        raise ValueError(f"lr must have pixels, got shape {tuple(lr.shape)}")
    return interpolate(lr, scale_factor=scale, mode="bicubic").clamp(0, 1)


class Fidelity(NamedTuple):
    """How close restored images are to true ones.

    Attributes:
        psnr: peak signal-to-noise ratio in dB.
        ssim: structural similarity, up to 1.
        l1: mean absolute difference.
        images: how many were compared.
    """

    psnr: float
    ssim: float
    l1: float
    images: int


@torch.no_grad()
def evaluate_sr(
    model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], *, clamp: bool = True
) -> Fidelity:
    r"""Means over images of PSNR and SSIM for values in [0, 1], and of the absolute difference.

    PSNR is :math:`-10 \log_{10} \mathrm{MSE}` over pixels and channels of an image. SSIM is that of Wang et al. (2004): a Gaussian
    window of :math:`\sigma = 1.5` and 11 pixels wherever it fits into the image, population covariances, the mean over channels.
    scikit-image gives it with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``. Both come from torchmetrics, whose
    own SSIM counts windows that stick out as well.

    Args:
        model: low-resolution images to restored ones; a module is put into evaluation mode meanwhile.
        batches: pairs of low-resolution and true images.
        clamp: judge what a viewer would be shown: restored images clamped to [0, 1]. Networks do not clamp their output.

    Raises:
        ValueError: no batch, restored images of another size than the true ones, or images smaller than the window.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    training = model.training if isinstance(model, nn.Module) else False
    if isinstance(model, nn.Module):
        model.eval()
    psnr, ssim, l1 = [], [], []
    inside = slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))
    for lr, hr in batches:
        sr = model(lr)
        if sr.shape != hr.shape:
            raise ValueError(f"restored and true images differ in size: {tuple(sr.shape)} and {tuple(hr.shape)}")
        if min(hr.shape[2:]) < SSIM_WINDOW:
            raise ValueError(f"images must be at least {SSIM_WINDOW} pixels wide, got {tuple(hr.shape)}")
        sr, hr = sr.float(), hr.float()
        l1.append((sr - hr).abs().mean((1, 2, 3)))
        sr = sr.clamp(0, 1) if clamp else sr
        # One value per image; torchmetrics pools over a batch otherwise.
        psnr.append(peak_signal_noise_ratio(sr, hr, data_range=1.0, dim=(1, 2, 3), reduction="none"))
        _, similarity = structural_similarity_index_measure(
            sr, hr, data_range=1.0, reduction="none", return_full_image=True
        )
        ssim.append(similarity[..., inside, inside].mean((1, 2, 3)))
    if isinstance(model, nn.Module):
        model.train(training)
    if not psnr:
        raise ValueError("batches must hold at least one pair of images, got none")
    of_psnr, of_ssim, of_l1 = (torch.cat(values) for values in (psnr, ssim, l1))
    return Fidelity(float(of_psnr.mean()), float(of_ssim.mean()), float(of_l1.mean()), images=len(of_psnr))
