"""LoKr of every size for the programs that infer or configure the sizes of its factors: loaded by the programs."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import create_lycoris_from_weights
from torch import nn

import peftkit as pk
from tests.support.cells import require_same_forward
from tests.support.zoo import train

#: (rows, channels, kernel) -> options; of the first four LyCORIS takes the columns of a factor of D for channels
SIZES = [
    ((32, 4, 3), {"factor": 4, "rank": 2}),
    ((4, 32, 3), {"factor": 4, "rank": 2}),
    ((96, 16, 3), {"factor": 8, "rank": 2}),
    ((32, 64, 3), {"factor": 8, "rank": 2}),
    ((32, 64, 1), {"factor": 8, "rank": 2}),
    ((32, 64, 3), {"factor": (2, 8), "rank": 2}),
    ((32, 64, 0), {"factor": (2, 8), "rank": 2}),
    ((24, 36, 3), {"factor": -1, "rank": 1}),
    ((24, 36, 3), {"factor": 6}),
    ((24, 36, 0), {"factor": (3, 6)}),
]


def layer_of(rows: int, channels: int, kernel: int) -> nn.Module:
    return nn.Conv2d(channels, rows, kernel, padding=kernel // 2) if kernel else nn.Linear(channels, rows)


def require_loaded(size: tuple[int, int, int], options: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Export for LyCORIS and PEFT, load there, and compare. Returns how each went out."""
    _, channels, kernel = size
    torch.manual_seed(0)
    base, x = nn.Sequential(layer_of(*size)), torch.randn(2, channels, *((4, 4) if kernel else ()))
    model = copy.deepcopy(base)
    pk.wrap(model, "lokr", targets="full", **options)
    train(model, size=0.3)
    file, directory = folder / "adapter.safetensors", folder / "adapter"
    (ours,) = pk.export(model, file, "lycoris", overwrite=True).weights
    theirs = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(file), theirs)
    network.apply_to()
    require_same_forward(model(x), theirs(x), base(x))
    (written,) = pk.export(model, directory, "peft", overwrite=True).weights
    require_same_forward(
        model(x), peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory)).eval()(x), base(x)
    )
    return ours.how, written.how


@pytest.mark.parametrize("size, options", SIZES)
@torch.no_grad()
def test_lokr_is_written_in_sizes_that_the_programs_make(
    size: tuple[int, int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    lycoris, written = require_loaded(size, options, tmp_path)
    pair = isinstance(options["factor"], tuple)
    assert lycoris == "exact" or pair
    assert written == ("low rank" if pair else "exact")


@pytest.mark.slow
@torch.no_grad()
def test_lokr_of_many_sizes(tmp_path: Path) -> None:
    sizes = list(itertools.product((4, 6, 8, 12, 16, 24, 32, 64, 96), (4, 6, 8, 12, 16, 24, 32, 64), (0, 1, 3)))
    chosen = random.Random(0).sample(sizes, 25)
    for size, factor, rank in itertools.product(chosen, (-1, 4, 8), (None, 1, 2)):
        require_loaded(size, {"factor": factor, "rank": rank}, tmp_path)
