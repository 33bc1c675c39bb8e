"""What a merge did, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from peftkit.delta.addition import MergedWeight
from peftkit.wrapping.listing import Row, listing


@dataclass(frozen=True)
class MergeReport:
    """Say what a merge did. str(report) is a line, `table()` has a row for each weight.

    Attributes:
        weights: for each weight its name, the adapters in it, ‖ΔW‖, how far it moved and the share that was lost; of a
            weight that was quantised again, the share of ΔW that survived too.
        left_out: files of a checkpoint's folder that hold its weights without the adapters and were not copied.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> report = pk.merge(model)
        >>> report.changed, report.norm
        (('the model',), 4.0)
    """

    weights: tuple[MergedWeight, ...]
    left_out: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the weights that moved."""
        return tuple(w.site for w in self.weights if w.change > 0)

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all weights."""
        return math.sqrt(sum(w.norm**2 for w in self.weights))

    @property
    def lost(self) -> float:
        """The share of ΔW lost to rounding, over all weights but those that were quantised again."""
        rounded = [w for w in self.weights if w.survived is None]
        total = sum(w.norm**2 for w in rounded)
        return math.sqrt(sum((w.lost * w.norm) ** 2 for w in rounded) / total) if total else 0.0

    @property
    def survived(self) -> float | None:
        """The share of ΔW that is in the weights that were quantised again, over all of them; None without any."""
        again = [(w.norm**2, w.survived) for w in self.weights if w.survived is not None]
        total = sum(square for square, _ in again)
        return sum(square * share for square, share in again) / total if total else None

    def __str__(self) -> str:
        shares = [f"{100 * self.lost:.2g} % of it lost to the dtype"]
        if self.survived is not None:
            kept = f"{100 * self.survived:.3g} % of it survived in the quantised weights"
            shares = [kept] if all(w.survived is not None for w in self.weights) else [*shares, kept]
        line = (
            f"merged into {len(self.weights)} weights, {len(self.changed)} changed; "
            f"‖ΔW‖ = {self.norm:.4g}, {', '.join(shares)}"
        )
        return line + (f"\n{without_copies(self.left_out)}" if self.left_out else "")

    def table(self, *, every: bool = True) -> Table:
        """Every weight, for rich to print; every=False: one row for weights with the same adapters."""
        measures = {"‖ΔW‖": "{:.4g}".format, "lost to the dtype": "{:.2g} %".format}
        lost = [None if w.survived is not None else 100 * w.lost for w in self.weights]
        rows = [
            Row(w.site, (", ".join(w.adapters),), (w.norm, share)) for w, share in zip(self.weights, lost, strict=True)
        ]
        if self.survived is not None:
            measures["survived"] = "{:.3g} %".format
            shares = (None if w.survived is None else 100 * w.survived for w in self.weights)
            rows = [replace(row, measures=(*row.measures, share)) for row, share in zip(rows, shares, strict=True)]
        return listing(["adapters"], measures, rows, every=every)


def without_copies(files: Sequence[str]) -> str:
    """Return a line that names the files of a folder that a merge leaves out.

    Example:
        >>> from peftkit.wrapping.merge_report import without_copies
        >>> without_copies(["pytorch_model.bin"])
        'left out, as they hold the weights without the adapters: pytorch_model.bin'
    """
    return f"left out, as they hold the weights without the adapters: {', '.join(files)}"
