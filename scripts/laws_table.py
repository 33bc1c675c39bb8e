"""Print adapter × layer × law: how many laws hold in each cell, or the reason it is refused.

    python scripts/laws_table.py [--verbose]

A cell shows the number of laws that hold, "✗" with the law's number if one does not, and "–" where the adapter
refuses the layer with a typed error; the reasons follow the table. Exits 1 if any law is broken.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support import laws
from tests.support.zoo import ADAPTERS, LAYERS, METHODS

CASES = {**ADAPTERS, **METHODS}


def cell(adapter: str, layer: str) -> tuple[str, str | None]:
    """What to print for a cell, and why it was refused."""
    reason = laws.refusal(adapter, layer)
    if reason is not None:
        return "–", reason
    broken = []
    for name, law in laws.LAWS.items():
        try:
            law(adapter, layer)
        except AssertionError:
            broken.append(name.split()[0])
    # Law 11 is that an unsupported cell is refused, which this one is not: it holds here by being supported
    return (f"✗ {','.join(broken)}" if broken else str(len(laws.LAWS) + 1)), None


def main() -> int:
    console = Console(width=max(60, 24 + 6 * len(LAYERS)))
    results = {
        (adapter, layer): cell(adapter, layer)
        for adapter in track(CASES, description="laws", transient=True)
        for layer in LAYERS
    }
    table = Table("adapter", *(str(i + 1) for i in range(len(LAYERS))), title="laws that hold (1–6, 8–11)")
    for adapter in CASES:
        table.add_row(adapter, *(results[adapter, layer][0] for layer in LAYERS))
    console.print(table)
    console.print("layers: " + "; ".join(f"{i + 1} {layer}" for i, layer in enumerate(LAYERS)), highlight=False)
    reasons: dict[str, list[str]] = {}
    for (adapter, layer), (_, reason) in results.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(f"{adapter} on {layer}")
    for reason, cells in reasons.items():
        console.print(f"– {'; '.join(cells)}:\n    {reason}", markup=False, highlight=False)
    broken = [key for key, (mark, _) in results.items() if mark.startswith("✗")]
    held = sum(1 for mark, _ in results.values() if mark.isdigit())
    refused = len(results) - held - len(broken)
    console.print(f"{held} cells hold every law, {refused} are refused, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
