"""Random kinds, options, layers and programs: what an export writes is what the program reads, or it is refused.

The readers of tests/support/readers stand for the programs. A seed names one case.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError, OptionError, UnsupportedLayerError
from tests.support.cells import TARGETS, require_read
from tests.support.models import tree
from tests.support.zoo import train

Draw = random.Random
Options = dict[str, Any]
SIZES = (8, 12, 16, 24, 32)


def _some(draw: Draw, **choices: tuple[Any, ...]) -> Options:
    """Options with one of their values each, or without it for ...."""
    chosen = {name: draw.choice(values) for name, values in choices.items()}
    return {name: value for name, value in chosen.items() if value is not ...}


def _low_rank(draw: Draw) -> Options:
    return _some(draw, rank=(1, 2, 3, 5), alpha=(..., 0.5, 2, 7))


def _lokr(draw: Draw) -> Options:
    factor = (..., -1, 2, 3, 4, 8, (2, 4), (4, 2))
    return _some(draw, rank=(None, 1, 2, 3), factor=factor, tucker=(..., ..., True), init=(..., "peft"))


def _oft(draw: Draw) -> Options:
    options = _some(draw, block_size=(2, 3, 4, 8), side=("out", "in"), constraint=(..., ..., 0.01))
    return options | _some(draw, rescale=(..., True), terms=(..., ..., 2, 3, 5), path=(..., "geodesic"))


def _dora(draw: Draw) -> Options:
    """Without loldu inside, whose factors of a random matrix may be too large for the bound."""
    inner = draw.choice(("lora", "loha", "lokr"))
    options = {"rank": draw.choice((1, 2))} | ({"factor": draw.choice((2, 4))} if inner == "lokr" else {})
    return options | {"inner": inner} | _some(draw, axis=("in", "out"), detach_norm=(..., False))


#: kind -> options of it
KINDS: dict[str, Callable[[Draw], Options]] = {
    "lora": lambda draw: _low_rank(draw) | _some(draw, rslora=(..., True), tucker=(..., ..., True)),
    "loha": lambda draw: _low_rank(draw) | _some(draw, tucker=(..., ..., True), init=(..., "peft")),
    "lokr": _lokr,
    "loldu": lambda draw: _some(draw, rank=(1, 2, 4), alpha=(..., 2), train_scale=(..., False)),
    "dora": _dora,
    "oft": _oft,
    "boft": lambda draw: _some(draw, block_size=(2, 4, 6), stages=(..., 1, 2), rescale=(..., True)),
    "ia3": lambda draw: _some(draw, side=("in", "out")),
    "glora": _low_rank,
    "full": lambda draw: {},
}


def _of_unet(draw: Draw) -> dict[str, nn.Module]:
    """A Linear, a 1×1 or a 3×3 convolution of Stable Diffusion."""
    rows, columns = draw.choice(SIZES), draw.choice(SIZES)
    return draw.choice(
        (
            lambda: {"down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": nn.Linear(columns, rows)},
            lambda: {"down_blocks.0.attentions.0.proj_in": nn.Conv2d(columns, rows, 1)},
            lambda: {"down_blocks.0.resnets.0.conv1": nn.Conv2d(columns, rows, 3)},
        )
    )()


def _swapped(draw: Draw) -> dict[str, nn.Module]:
    width = draw.choice((8, 12, 16))
    return {"norm_out.linear": nn.Linear(width, 2 * width)}


def _fused(draw: Draw) -> dict[str, nn.Module]:
    """What the original network has as one layer."""
    width, block = draw.choice((8, 16)), draw.choice(("attn.to_{}", "attn.add_{}_proj"))
    return {f"transformer_blocks.1.{block.format(part)}": nn.Linear(width, width) for part in "qkv"}


def _single(draw: Draw) -> dict[str, nn.Module]:
    width = draw.choice((8, 16))
    parts = {f"single_transformer_blocks.1.attn.to_{part}": nn.Linear(width, width) for part in "qkv"}
    return parts | {"single_transformer_blocks.1.proj_mlp": nn.Linear(width, 4 * width)}


#: family -> its component, and layers of it
PLACES: dict[str, tuple[str, tuple[Callable[[Draw], dict[str, nn.Module]], ...]]] = {
    "sd15": ("unet", (_of_unet, _of_unet, _of_unet)),
    "flux": ("transformer", (_swapped, _fused, _single)),
    "sd3": ("transformer", (_swapped, _fused)),
}
#: the programs that the readers stand for
PROGRAMS = tuple(TARGETS)


def outcome(seed: int, folder: Path) -> str:
    """What became of a case: how it was written, "refused", or "none" where there is no such adapter.

    Raises AssertionError if the program reads something else, at strength 1 or, where it is linear, at 0.7.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    family = draw.choice(tuple(PLACES))
    component, makers = PLACES[family]
    layers = draw.choice(makers)(draw)
    kind, target = draw.choice(tuple(KINDS)), draw.choice(PROGRAMS)
    options = KINDS[kind](draw)
    model = tree(layers)
    try:
        pk.wrap(model, kind, targets=list(layers), **options)
    except (OptionError, UnsupportedLayerError):
        return "none"
    train(model, seed)
    out = folder / (f"{seed}" if target == "peft" else f"{seed}.safetensors")
    case = f"seed {seed}: {kind} {options} on {list(layers)} of {family} for {target}"
    try:
        report = pk.export(model, out, target, family=family, component=component)
    except ExportError:
        return "refused, and written" if out.exists() else "refused"
    own = target in ("lycoris", "peft")
    try:
        require_read(out, target, report, model, None if own else family, "" if own else f"{component}.")
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return report.weights[0].how


def test_a_sample_of_kinds_layers_and_programs(tmp_path: Path) -> None:
    found = Counter(outcome(seed, tmp_path) for seed in range(150))
    assert found.keys() == {"exact", "low rank", "baked", "refused", "none"}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 9000, 1000))
def test_a_sweep_of_kinds_layers_and_programs(first: int, tmp_path: Path) -> None:
    wrong: list[str] = []
    for seed in range(first, first + 1000):
        try:
            found = outcome(seed, tmp_path)
        except AssertionError as error:
            wrong.append(str(error))
        else:
            wrong += [f"seed {seed}: {found}"] if "written" in found else []
    assert wrong == []
