"""StartReport: what a start found, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StartReport:
    """What a start found.

    Attributes:
        how: the start.
        modules: how many weights it was given to.
        energy: module -> the share of what the start reads that its directions have: of ‖G‖² for starts made of the
            gradient, of the inputs' energy for those made of inputs, of ‖W‖² for those made of the base.
        alignment: module -> the cosine of the first step of gradient descent and of the whole gradient, about, for
            starts made of the gradient.
        extra_bytes: what the pass held beside the model and its activations.
        ranks: module -> the ranks before and after, of adapters whose rank was changed.
    """

    how: str
    modules: int
    energy: Mapping[str, float]
    alignment: Mapping[str, float]
    extra_bytes: int
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.how} on {self.modules} modules"]
        if self.energy:
            parts.append(f"{_range(self.energy)} of the energy")
        if self.alignment:
            parts.append(f"first step {_range(self.alignment)} along the gradient")
        if self.ranks:
            parts.append(f"other ranks on {len(self.ranks)}")
        return f"{parts[0]}: {', '.join([*parts[1:], f'{self.extra_bytes / 1e6:.3g} MB beside the model'])}"


def _range(shares: Mapping[str, float]) -> str:
    low, high = min(shares.values()), max(shares.values())
    return f"{100 * low:.0f} to {100 * high:.0f} %"
