r"""How far confidences can be trusted: calibration, likelihood, and whether errors come with low confidence.

All take probabilities and labels and give a number. The confidence of a prediction is its largest probability.

>>> import torch
>>> probs = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.25, 0.75], [0.65, 0.35]])
>>> labels = torch.tensor([0, 0, 1, 1])  # the last prediction, the least confident one, is wrong
>>> round(expected_calibration_error(probs, labels), 4)
0.275
>>> aurc(probs, labels), eaurc(probs, labels)
(0.0625, 0.0)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expected_calibration_error(
    probs: Float[Tensor, "examples classes"], labels: Int[Tensor, " _"], *, bins: int = 10
) -> float:
    r"""Mean difference between confidence and accuracy, :math:`\sum_b \frac{n_b}{n} |acc_b - conf_b|`, from 0 to 1.

    Bins are of equal width and contain their upper bound, as in the papers. (``torchmetrics`` has bins that contain the lower
    one, and a bin of its own for a confidence of exactly 1, which saturated predictions have.)

    Args:
        probs: predicted probabilities.
        labels: true classes.
        bins: number of bins.

    Raises:
        ValueError: there are no examples, their numbers differ, a probability is NaN, or there is no bin.

    Source:
        Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., ICML 2017, eq. 3.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, right = _confidence(probs, labels)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=probs.device)[1:-1]
    place = torch.bucketize(confidence, edges)
    gap = torch.zeros(bins, dtype=torch.float64, device=probs.device)
    gap.index_add_(0, place, right - confidence)
    return float(gap.abs().sum() / len(labels))


def negative_log_likelihood(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, " _"]) -> float:
    r"""Mean of :math:`-\log p_y`, in nats; infinite if a true class got probability 0.

    Args:
        probs: predicted probabilities.
        labels: true classes.

    Raises:
        ValueError: there are no examples, their numbers differ, or a probability is NaN.
    """
    _check(probs, labels)
    return float(-probs.gather(1, labels.long().unsqueeze(1)).double().log().mean())


def aurc(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, " _"]) -> float:
    r"""Area under the risk-coverage curve: the mean over j of the error rate among the j most confident predictions.

    It depends on the order of the confidences alone. Papers give 1000 times this.

    Args:
        probs: predicted probabilities.
        labels: true classes.

    Raises:
        ValueError: there are no examples, their numbers differ, or a probability is NaN.

    Source:
        Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019.
    """
    confidence, right = _confidence(probs, labels)
    # ascending and then reversed, which decides the order of ties as the authors' code does
    order = confidence.argsort(stable=True).flip(0)
    return _area(1 - right[order])


def eaurc(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, " _"]) -> float:
    """What :func:`aurc` is above that of the best order, in which all errors come last; 0 for a perfect ranking.

    Args:
        probs: predicted probabilities.
        labels: true classes.

    Raises:
        ValueError: there are no examples, their numbers differ, or a probability is NaN.
    """
    _, right = _confidence(probs, labels)
    return aurc(probs, labels) - _area((1 - right).sort().values)


def _area(errors: Tensor) -> float:
    coverage = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return float((errors.cumsum(0) / coverage).mean())


def _confidence(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence of each prediction, and 1 where it is right, in float64: sums of many small numbers follow."""
    _check(probs, labels)
    confidence, predicted = probs.max(1)
    return confidence.double(), (predicted == labels).double()


def _check(probs: Tensor, labels: Tensor) -> None:
    if len(labels) == 0 or len(probs) != len(labels):
        raise ValueError(f"expected as many labels as predictions and at least one, got {len(labels)} and {len(probs)}")
    if probs.shape[1] == 0 or probs.isnan().any():
        raise ValueError(f"probs must hold numbers for at least one class, got NaN or the shape {tuple(probs.shape)}")
