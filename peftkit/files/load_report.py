"""What a file and a model had to say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit.files.extras import listed


@dataclass(frozen=True)
class LoadReport:
    """What a file and a model had to say to each other. str(report) lists it."""

    name: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()
    base_distance: float = 0.0
    extras: tuple[str, ...] = ()  # parameters of the model that were loaded beside the adapters
    left_out: tuple[str, ...] = ()  # and those that extras=False left out

    @property
    def complete(self) -> bool:
        """Whether every key of the file, but those left out, went to the model, and every parameter came from it."""
        return not (self.missing or self.unexpected or self.mismatched or self.non_finite)

    def __str__(self) -> str:
        lines = [f"adapter {self.name!r}: {len(self.loaded)} weights loaded"]
        lines += [f"{listed(self.extras)} beside them loaded"] if self.extras else []
        lines += [f"{listed(self.left_out)} left out, as extras=False asks"] if self.left_out else []
        for title in ("missing", "unexpected", "mismatched", "non_finite"):
            items = getattr(self, title)
            if items:
                lines.append(f"{title.replace('_', '-')} ({len(items)}):")
                lines += [f"  {item}" for item in items[:8]] + (["  …"] if len(items) > 8 else [])
        return "\n".join(lines)
