"""An experiment is data plus one function: presets, arms, ``run(config, arm, run) -> metrics``, and the claims it puts to the test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from poise.core.lab.run import ArmResult, Run

Verdict = Literal["holds", "undecided", "refuted"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of the paper that can be measured: ``metric`` of ``arm`` is higher or lower than that of ``versus``, by ``margin``.

    Attributes:
        metric: the metric compared.
        arm: the arm the claim is about.
        versus: the arm it is compared with on the same seed; ``None`` compares the metric itself with ``margin``.
        direction: which way is the claimed one.
        margin: the least effect that counts. The claim holds when the whole confidence interval of the effect is beyond it.
        kind: ``mechanism`` (the method moves what it says it moves) or ``outcome`` (the paper's headline).
        scale: ``difference`` measures the effect as a difference in the claimed direction; ``ratio`` as the factor of improvement
            (``versus / arm`` for lower, ``arm / versus`` for higher), for which both must be positive.
        source: where the paper or card says so.
        note: what a reader should know about the verdict.
        presets: the presets that produce this metric.
    """

    metric: str
    arm: str
    direction: Literal["higher", "lower"]
    kind: Literal["mechanism", "outcome"]
    source: str
    versus: str | None = "baseline"
    margin: float = 0.0
    scale: Literal["difference", "ratio"] = "difference"
    note: str = ""
    presets: tuple[str, ...] = ("quick",)

    def __post_init__(self) -> None:
        if self.scale == "ratio" and self.versus is None:
            raise ValueError(f"claim on {self.metric!r}: a ratio needs an arm to compare with")
        if self.scale == "ratio" and self.margin <= 0:
            raise ValueError(f"claim on {self.metric!r}: the margin of a ratio is a positive factor, got {self.margin}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ``poise run`` and ``poise verify`` run.

    Attributes:
        method: full name, ``ot/monge-gap``.
        presets: frozen config dataclass instances by name; ``quick`` is required.
        arms: what each arm is, by name; the first is the baseline.
        run: trains and measures one arm; returns its metrics (finite floats).
        claims: what the experiment puts to the test.
        only: the arms of a preset that does not have them all.
        compare: draws figures that need several arms; called with the config, the finished arms and a run whose figures go into
            the report.
    """

    method: str
    presets: Mapping[str, Any]
    arms: Mapping[str, str]
    run: "Callable[[Any, str, Run], Mapping[str, float]]"
    claims: tuple[Claim, ...] = field(default=())
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compare: "Callable[[Any, Mapping[str, ArmResult], Run], None] | None" = None

    def __post_init__(self) -> None:
        if "quick" not in self.presets:
            raise ValueError(f"{self.method}: a preset named 'quick' is required, got {sorted(self.presets)}")
        for name, config in self.presets.items():
            if not is_dataclass(config) or isinstance(config, type):
                raise TypeError(f"{self.method}: preset {name!r} must be an instance of a dataclass")
        for preset, names in self.only.items():
            if preset not in self.presets or not set(names) <= self.arms.keys():
                raise ValueError(
                    f"{self.method}: `only` names the preset {preset!r} and the arms {names}; not all of them exist"
                )
        for claim in self.claims:
            for preset in claim.presets:
                if preset not in self.presets:
                    raise ValueError(f"{self.method}: a claim names the preset {preset!r}, which does not exist")
                for arm in (claim.arm, claim.versus):
                    if arm is not None and arm not in self.arms_of(preset):
                        raise ValueError(
                            f"{self.method}: a claim names the arm {arm!r}, which {preset!r} does not have"
                        )

    def arms_of(self, preset: str) -> tuple[str, ...]:
        """The arms that a preset has, the baseline first."""
        return self.only.get(preset, tuple(self.arms))
