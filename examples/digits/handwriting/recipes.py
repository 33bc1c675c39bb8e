"""The adapters of the demo: kind, options and learning rate, chosen once by hand. No ranking of methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peftkit as pk


@dataclass(frozen=True)
class Recipe:
    """Rules that cover all 40 layers of the U-Net, and a learning rate.

    portable: the adapter is made of its base's own factors; its file holds them, so that it fits another base too.
    """

    rules: list[pk.Rule]
    lr: float
    portable: bool = False


def _everywhere(kind: str, **options: Any) -> list[pk.Rule]:
    return [pk.Rule("full", kind, **options)]


RECIPES: dict[str, Recipe] = {
    "locon": Recipe(_everywhere("locon", rank=4), lr=2.5e-3),
    "loha": Recipe(_everywhere("loha", rank=4), lr=4e-3),
    "lokr": Recipe(_everywhere("lokr", factor=8), lr=3e-3),
    # conv_out has four rows, and so four pivots
    "loldu": Recipe([pk.Rule("conv_out", "loldu", rank=4), *_everywhere("loldu", rank=32)], 1.2e-3, portable=True),
    "dora": Recipe(_everywhere("dora", rank=4), lr=2.5e-3),
    # four output channels hold no block of eight, so conv_out rotates its inputs
    "oft": Recipe([pk.Rule("conv_out", "oft", block_size=8, side="in"), *_everywhere("oft", block_size=8)], lr=3e-3),
    "svdlora": Recipe(_everywhere("svdlora", rank=4), lr=7e-3),
    "miss": Recipe(_everywhere("miss", rank=4), lr=1.5e-3),
    "lora-xs": Recipe(_everywhere("lora-xs"), lr=2e-3, portable=True),
    "vera": Recipe(_everywhere("vera", rank=64), lr=4e-2),
    "pissa": Recipe(_everywhere("anchored", rank=4), lr=1e-3, portable=True),
}
