"""What a rule says about a run: the contract of rules, and the advice that follows from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from peftkit.monitor.fluctuation import TurningPoint
from peftkit.monitor.record import Record


class Criterion(Protocol):
    """What EarlyStopping asks of a rule that says where overfitting started; SecondValley is one.

    Attributes:
        found: The turning point, None until the rule finds it.
        valleys: The measurements, counted from 0, in which the rule saw a valley.
    """

    found: TurningPoint | None
    valleys: list[int]

    def see(self, record: Record) -> float | None:
        """Take one more measurement, and return the rule's own value of it, which logs show beside the measurement."""
        ...

    @property
    def wanted(self) -> tuple[int | None, int]:
        """The measurement that may turn out the turning point, or None, and the earliest later one that may.

        Snapshots of both are kept, and of nothing before.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on, in types that `torch.load(weights_only=True)` takes."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Advice:
    """What is known of a run so far; `str(advice)` is a sentence for its owner.

    Attributes:
        step: The optimiser steps after which overfitting started, None while no turning point is found.
        snapshot: The optimiser steps of the snapshot nearest to `step`, to which `EarlyStopping.restore` goes back.
        detected: The optimiser steps after which the turning point was known.
        windows: How many windows of measurements the rule had seen by then.
        chance: The share of random walks in which the rule finds a turning point within as many windows. Near a half,
            the turning point says no more than a timer would. None for a rule that is no SecondValley.
        valleys: The optimiser steps of all valleys.
        diverged: How many measurements were not finite and are left out.

    Example:
        >>> print(pk.monitor.Advice(240, 250, 390, windows=4.0, chance=0.03, valleys=(150, 240)))
        turning point at step 240: seen at step 390 after 4.0 windows, where 3% of random walks show one;
        restore() goes back to step 250
    """

    step: int | None
    snapshot: int | None
    detected: int | None
    windows: float
    chance: float | None
    valleys: tuple[int, ...]
    diverged: int = 0

    def __str__(self) -> str:
        if self.step is None:
            seen = f"{len(self.valleys)} valley{'' if len(self.valleys) == 1 else 's'} in {self.windows:.1f} windows"
            lost = f"; {self.diverged} measurements were not finite and count for nothing" if self.diverged else ""
            return f"no turning point yet: {seen}; go on, or keep the last weights{lost}"
        by_chance = ""
        if self.chance is not None:
            by_chance = f", where {self.chance:.0%} of random walks show one"
        return (
            f"turning point at step {self.step}: seen at step {self.detected} after {self.windows:.1f} windows"
            f"{by_chance}; restore() goes back to step {self.snapshot}"
        )
