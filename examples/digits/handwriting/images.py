"""Real handwriting: 5000 digits of MNIST (LeCun et al., http://yann.lecun.com/exdb/mnist), 28×28, 500 of each."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).resolve().parents[3] / ".assets" / "mnist_5k.csv.gz"
SIZE = 28
DIGIT, IMAGES = 9, 10  # the digit that adapters learn, and from how many images
HELD_OUT = 400  # of the digits 0 to 7


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Read every image, (5000, 1, 28, 28) in [-1, 1] with ink at 1, and its label, (5000,)."""
    if not FILE.is_file():
        raise SystemExit(f"{FILE} is not there yet: run `python scripts/fetch_assets.py digits` once (1.4 MB)")
    with gzip.open(FILE, "rt", encoding="ascii") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return rows[:, :-1].view(-1, 1, SIZE, SIZE) / 127.5 - 1, rows[:, -1].long()


def known_digits() -> tuple[Tensor, Tensor]:
    """Images of the digits 0 to 7, shuffled: 3600 to train the base on, and 400 held out."""
    images, labels = digits()
    known = images[labels < 8]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))
    return known[order[HELD_OUT:]], known[order[:HELD_OUT]]


def new_digit() -> tuple[Tensor, Tensor]:
    """Ten images of the digit to learn, and the 490 others of it, held out."""
    images, labels = digits()
    own = images[labels == DIGIT]
    own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(5))]
    return own[:IMAGES], own[IMAGES:]
