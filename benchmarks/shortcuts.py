"""What exact shortcuts save: LoLDU's pivots over a full LU, truncating a low-rank ΔW over its SVD; and wrapping.

python benchmarks/shortcuts.py [--save]
"""

from __future__ import annotations

import torch
from torch import nn

import peftkit as pk
from peftkit.bench.cases import MODELS
from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.bench.timing import Spread, contest, ratios
from peftkit.delta import LowRank
from peftkit.delta.truncation import Keep, truncate
from peftkit.kernels.ldu import factor, pivot
from peftkit.wrapping.installed import installed_adapters


def pivots() -> Row:
    """Return the time of LoLDU's pivots over that of a full LU."""
    W = torch.randn(4096, 4096)
    seconds = contest({"ours": lambda: factor(W, pivot(W, 16)), "full": lambda: torch.linalg.lu_factor(W)}, rounds=3)
    ratio = ratios(seconds, seconds["full"])["ours"].median
    return Row("shortcuts", "loldu", "LoLDU init, 4096×4096 rank 16, over a full LU", values={"ratio": _digits(ratio)})


def truncation() -> Row:
    """Return the time of truncating a low-rank ΔW over that of its SVD."""
    B, A = torch.randn(1024, 64), torch.randn(64, 1024)
    seconds = contest(
        {"ours": lambda: truncate(LowRank(B, A), Keep(rank=16)), "full": lambda: torch.linalg.svd(B @ A)}, rounds=3
    )
    ratio = ratios(seconds, seconds["full"])["ours"].median
    return Row("shortcuts", "lora", "rank 64 to 16 at 1024×1024, over the SVD", values={"ratio": _digits(ratio)})


def wrapping() -> Row:
    """Return the seconds of wrapping a whole U-Net."""
    model = nn.ModuleList([shape.layer() for shape in MODELS["sd15-unet"]()])
    prepare = {"wrap": lambda: pk.unwrap(model) if any(installed_adapters(model)) else None}
    seconds = contest({"wrap": lambda: pk.wrap(model, "lora", rank=16)}, rounds=5, prepare=prepare)
    taken = _digits(Spread.of(seconds["wrap"]).median)
    case = "seconds to wrap the 282 layers of SD 1.5's U-Net with LoRA"
    return Row("shortcuts", "lora", case, values={"seconds": taken})


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    script = Script(__file__, __doc__)
    script.parse()
    script.run([pivots, truncation, wrapping])


if __name__ == "__main__":
    main()
