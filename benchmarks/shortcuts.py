"""What exact shortcuts save: LoLDU's pivots over a full LU, truncating a low-rank ΔW over its SVD; and wrapping.

python benchmarks/shortcuts.py [--save]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import peftkit as pk
from peftkit.bench.cases import MODELS
from peftkit.bench.rows import environment
from peftkit.bench.timing import Spread, contest, ratios
from peftkit.delta import LowRank
from peftkit.delta.truncation import Keep, truncate
from peftkit.kernels.ldu import factor, pivot

RESULTS = Path(__file__).parent / "results" / "shortcuts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    W = torch.randn(4096, 4096)
    seconds = contest({"ours": lambda: factor(W, pivot(W, 16)), "full": lambda: torch.linalg.lu_factor(W)}, rounds=3)
    found = {"LoLDU init, 4096×4096 rank 16, over a full LU": ratios(seconds, seconds["full"])["ours"].median}
    B, A = torch.randn(1024, 64), torch.randn(64, 1024)
    seconds = contest(
        {"ours": lambda: truncate(LowRank(B, A), Keep(rank=16)), "full": lambda: torch.linalg.svd(B @ A)}, rounds=3
    )
    found["rank 64 to 16 at 1024×1024, over the SVD"] = ratios(seconds, seconds["full"])["ours"].median
    model = nn.ModuleList([shape.layer() for shape in MODELS["sd15-unet"]()])
    prepare = {"wrap": lambda: pk.unwrap(model) if hasattr(model[0], "adapters") else None}
    seconds = contest({"wrap": lambda: pk.wrap(model, "lora", rank=16)}, rounds=5, prepare=prepare)
    found["seconds to wrap the 282 layers of SD 1.5's U-Net with LoRA"] = Spread.of(seconds["wrap"]).median
    found = {name: float(f"{value:.3g}") for name, value in found.items()}
    print(json.dumps(found, indent=2, ensure_ascii=False))
    if arguments.save:
        RESULTS.write_text(json.dumps({**environment("cpu"), "shortcuts": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
