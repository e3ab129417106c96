"""The intermediate stage of PELA as one call in a training loop: student and teacher side by side, and the loss beside the task's."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.adapters.pela import FeatureDistillation, WeightPerturbation
from poise.core.penalty import Penalties, Penalty
from poise.core.schedule import Schedule
from poise.core.taps import Select, Taps


class PelaOutput(NamedTuple):
    """What :class:`PelaTrainer` returns.

    Attributes:
        output: what the student returns.
        penalty: the weighted sum of distillation and perturbation, to be added to the loss of the task.
    """

    output: Any
    penalty: Float[Tensor, ""]


class PelaTrainer:
    """Runs student and teacher on the same inputs and gives all of the loss but the task's part.

    The teacher stays in evaluation mode and runs without a graph, or not at all when both distillation weights are 0. The
    features are those that the blocks return in this forward pass; both networks stay tapped until :meth:`close`, also as a
    context manager. Wrap the student (DistributedDataParallel, ``torch.compile``) before it is passed.

    Args:
        student: the network in training, see :func:`~poise.core.apply_low_rank`.
        teacher: the network that it was made from.
        blocks: names or patterns of the modules whose outputs are distilled, the same in both networks: ``"blocks.*"``.
        feature_weight: α, a number or a schedule.
        logit_weight: β, a number or a schedule.
        perturbation_weight: w, a number or a schedule. The authors' code uses 1 with ε = 0 for Swin, and 0 for DeiT.
        eps: ε.
        select: which tensor of a block's output, where there are several, see :class:`~poise.core.Taps`.
        teacher_dtype: run the teacher under autocast in this type, ``torch.bfloat16`` say.

    Attributes:
        terms: the three penalties ``features``, ``logits`` and ``perturbation``.

    Raises:
        ValueError: student and teacher share parameters, as they do when the surgery was done in place; they have no features of
            the same names; or as for :class:`WeightPerturbation`.

    Source:
        Guo et al., CVPR 2024.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blocks: Sequence[str],
        *,
        feature_weight: float | Schedule = 1.0,
        logit_weight: float | Schedule = 0.0,
        perturbation_weight: float | Schedule = 1.0,
        eps: float = 0.0,
        select: Select | None = None,
        teacher_dtype: torch.dtype | None = None,
    ) -> None:
        if shared := _shared(student, teacher):
            raise ValueError(
                f"student and teacher share {len(shared)} parameters ({shared[0]}, ...): train a copy, apply_low_rank(inplace=False)"
            )
        self.student, self.teacher = student, teacher.eval()
        self.teacher_dtype = teacher_dtype
        self.terms = Penalties(
            features=FeatureDistillation(feature_weight),
            logits=FeatureDistillation(logit_weight),
            perturbation=WeightPerturbation(student, teacher, perturbation_weight, eps=eps),
        )
        self._ours = Taps(student, *blocks, select=select)
        self._theirs = Taps(teacher, *blocks, select=select, detach=True)
        if self._ours.names != self._theirs.names:
            raise ValueError(
                f"the blocks differ: {self._ours.names} of the student, {self._theirs.names} of the teacher"
            )
        self._ours.attach()
        self._theirs.attach()

    def __call__(self, *args: Any, **kwargs: Any) -> PelaOutput:
        """Both networks on these arguments.

        Raises:
            TypeError: logits are distilled, and the output is neither a tensor nor has ``logits``.
        """
        output = self.student(*args, **kwargs)
        features: tuple[Any, ...] = ()
        logits: tuple[Any, ...] = ()
        if self._weight("features") or self._weight("logits"):
            target = self._teach(*args, **kwargs)
            if self._weight("features"):
                features = (dict(self._ours), dict(self._theirs))
            if self._weight("logits"):
                logits = ([_logits(output)], [_logits(target)])
        penalty = self.terms(features=features, logits=logits, perturbation=())
        self._ours.clear()
        self._theirs.clear()
        return PelaOutput(output, penalty)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The unweighted value of every term that the last call computed."""
        return self.terms.values

    def step(self) -> None:
        """Advance the schedules; call it once per optimizer step."""
        self.terms.step()

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedules; the networks have their own state."""
        return self.terms.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        self.terms.load_state_dict(state)

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._ours.close()
        self._theirs.close()

    def __enter__(self) -> "PelaTrainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _weight(self, term: str) -> float:
        return cast(Penalty, self.terms.terms[term]).weight

    @torch.no_grad()
    def _teach(self, *args: Any, **kwargs: Any) -> Any:
        if self.teacher.training:  # a train() on a module around both networks
            self.teacher.eval()
        with self._precision():
            return self.teacher(*args, **kwargs)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.teacher_dtype is None:
            return nullcontext()
        return torch.autocast(next(self.teacher.parameters()).device.type, self.teacher_dtype)


def _shared(student: nn.Module, teacher: nn.Module) -> list[str]:
    theirs = set(teacher.parameters())
    return [name for name, parameter in student.named_parameters() if parameter in theirs]


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"to distil logits the networks must return a tensor or an object with logits, got {type(output).__name__}"
        )
    return logits
