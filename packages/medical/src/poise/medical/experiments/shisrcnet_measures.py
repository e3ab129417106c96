"""What the SHISRCNet experiment measures on test images."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from poise.core.experiments.published_images import Images, evaluation_batches
from poise.medical.histopathology.recognition import image_accuracy, patient_accuracy
from poise.medical.histopathology.resolution import degrade, evaluate_sr
from poise.medical.histopathology.shisrcnet.losses import SHISRCLoss
from poise.medical.histopathology.shisrcnet.network import SHISRCNet, SHISRCOutput

Answer = Callable[[SHISRCOutput], Int[Tensor, " batch"]]
"""The prediction that an output stands for."""


def pairs(images: Images, scale: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image at both resolutions."""
    for hr, _ in evaluation_batches(images, batch, device):
        yield degrade(hr, scale), hr


def fidelity(upscaler: nn.Module, images: Images, scale: int, batch: int, device: torch.device) -> dict[str, float]:
    """PSNR and SSIM of restored images, clamped to [0, 1], and the mean absolute difference before that."""
    found = evaluate_sr(upscaler, pairs(images, scale, batch, device))
    return {"psnr": found.psnr, "ssim": found.ssim, "l1": found.l1}


@torch.no_grad()
def predictions(
    model: SHISRCNet, images: Images, scale: int, batch: int, device: torch.device, answer: Answer
) -> tuple[Int[Tensor, " images"], float]:
    """Predicted classes from low resolution, and how much closer the two views of an image are than those of different images.

    Args:
        model: what to measure; its own scale is 1 if it is given high resolution.
        images: on which.
        scale: of low resolution.
        batch: images at a time.
        device: where.
        answer: what the model predicts.
    """
    model.eval()
    answers, ours, theirs = [], [], []
    for lr, hr in pairs(images, scale, batch, device):
        output = model(lr if model.scale > 1 else hr, hr)
        answers.append(answer(output).cpu())
        ours.append(output.features)
        theirs.append(output.hr_features)
    return torch.cat(answers), view_gap(torch.cat(ours), torch.cat(theirs))


def view_gap(ours: Float[Tensor, "images features"], theirs: Float[Tensor, "images features"]) -> float:
    """Mean cosine of the two views of an image minus that of views of different images."""
    first, second = normalize(ours.double()), normalize(theirs.double())
    same = (first * second).sum()
    count = len(first)
    different = first.sum(0) @ second.sum(0) - same  # the sum over all pairs, without a matrix of them
    return float(same / count - different / (count * (count - 1)))


def rates(
    predicted: Tensor, labels: Tensor, patients: Sequence[str] = (), magnifications: Sequence[int] = ()
) -> dict[str, float]:
    """Accuracy in percent: of images, of those of each magnification, and of patients."""
    found = {"accuracy": 100 * image_accuracy(predicted, labels)}
    if patients:
        found["patient_accuracy"] = 100 * patient_accuracy(predicted, labels, patients)
    scales = torch.tensor(magnifications)
    for scale in sorted(set(magnifications)):
        found[f"accuracy_{scale}x"] = 100 * image_accuracy(predicted[scales == scale], labels[scales == scale])
    return found


def gradient_share(model: SHISRCNet, criterion: SHISRCLoss, lr: Tensor, hr: Tensor, labels: Tensor) -> float:
    """Length of the gradient that classification and contrast send to the super-resolution, relative to that of the pixels."""
    model.eval()
    terms = criterion(model(lr, hr), hr, labels)
    weights = [weight for weight in model.upscaler.parameters() if weight.requires_grad]
    pixels = torch.autograd.grad(terms["sr"], weights, retain_graph=True)
    decision = criterion.w_cls * terms["classification"] + criterion.w_con * terms["contrastive"]
    other = torch.autograd.grad(decision, weights, allow_unused=True, materialize_grads=True)
    return float(_length(other) / (criterion.w_sr * _length(pixels)))


def _length(gradient: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.norm() for part in gradient]).norm()
