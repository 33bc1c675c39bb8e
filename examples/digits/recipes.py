"""The adapters of the demo: kind, options and learning rate, chosen once by hand. No ranking of methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peftkit as pk


@dataclass(frozen=True)
class Recipe:
    """Rules that cover all 40 layers of the U-Net, and a learning rate."""

    rules: list[pk.Rule]
    lr: float


def _everywhere(kind: str, **options: Any) -> list[pk.Rule]:
    return [pk.Rule("full", kind, **options)]


RECIPES: dict[str, Recipe] = {
    "locon": Recipe(_everywhere("locon", rank=4), lr=4e-3),
    "loha": Recipe(_everywhere("loha", rank=4), lr=1e-2),
    "lokr": Recipe(_everywhere("lokr", factor=8), lr=4e-3),
    # conv_out has one row and so one pivot; conv_in has nine columns
    "loldu": Recipe(
        [pk.Rule("conv_out", "loldu", rank=1), pk.Rule("conv_in", "loldu", rank=9), pk.Rule("full", "loldu", rank=32)],
        lr=3e-3,
    ),
    "dora": Recipe(_everywhere("dora", rank=4), lr=4e-3),
    # one output channel cannot rotate, so conv_out rotates its inputs
    "oft": Recipe([pk.Rule("conv_out", "oft", block_size=8, side="in"), pk.Rule("full", "oft", block_size=8)], lr=1e-2),
}
