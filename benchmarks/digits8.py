"""The digits of the measurements: 8×8 images of scikit-learn's set, and a U-Net that has only seen the digits 0 to 7.

    python benchmarks/digits8.py                    # trains the base again: about two minutes on one core

Sixteen times fewer pixels than in examples/digits, whose U-Net and diffusion process these are: what is measured over
many runs is measured here. Writes digits8.safetensors beside this file (fp16, 1.2 MB).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

import peftkit as pk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "digits"))

from handwriting import base
from handwriting.diffusion import evaluate
from handwriting.images import IMAGES
from handwriting.recipes import RECIPES
from handwriting.unet import UNet

FILE = Path(__file__).with_suffix(".safetensors")
BATCH = 20  # images a step, when an adapter is trained
HELD_OUT = 150  # of the digits 0 to 7
LR = {"locon": 4e-3, "loha": 1e-2, "lokr": 4e-3, "loldu": 3e-3, "dora": 4e-3, "oft": 1e-2}
#: kind -> rules that cover all 40 layers; conv_out has one row and so one pivot, conv_in has nine columns
RULES: dict[str, list[pk.Rule]] = {kind: RECIPES[kind].rules for kind in LR} | {
    "loldu": [
        pk.Rule("conv_out", "loldu", rank=1),
        pk.Rule("conv_in", "loldu", rank=9),
        pk.Rule("full", "loldu", rank=32),
    ]
}


def digits() -> tuple[Tensor, Tensor]:
    """Read every image, (1797, 1, 8, 8) in [-1, 1], and its label, (1797,)."""
    flat, labels = load_digits(return_X_y=True)
    return torch.tensor(flat, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.as_tensor(labels)


def base_model() -> UNet:
    """Build the U-Net in fp32, with the weights of the committed file."""
    return base.base_model(FILE, patch=1)


def few_and_others(digit: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten images of a digit, drawn by a seed, and the others of it."""
    images, labels = digits()
    own = images[labels == digit]
    own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
    return own[:IMAGES], own[IMAGES:]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = digits()
    known = images[labels < 8]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))
    seen, held_out = known[order[HELD_OUT:]], known[order[:HELD_OUT]]
    model = base.train(UNet(patch=1), seen, steps=1600, lr=2e-3, batch=64, decay=0.99)
    unseen = evaluate(model, images[labels >= 8])
    print(f"held-out loss on 0-7: {evaluate(model, held_out):.4f}   on the unseen 8 and 9: {unseen:.4f}")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, FILE)
    print(f"wrote {FILE.name}, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
