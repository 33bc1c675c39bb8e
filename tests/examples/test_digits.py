"""The parts of examples/digits: its base, its U-Net at any size, its adapters on all layers, its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.monitor import EarlyStopping
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def parts() -> Iterator[SimpleNamespace]:
    """The modules of the demo, found where `python examples/digits/demo.py` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "digits")
        from handwriting import base, diffusion, pictures, recipes, unet

        yield SimpleNamespace(base=base, diffusion=diffusion, pictures=pictures, recipes=recipes, unet=unet)


def test_the_base_is_small_and_samples_ink_on_white(parts: SimpleNamespace) -> None:
    assert parts.base.FILE.stat().st_size < 2_000_000
    images = parts.diffusion.sample(parts.base.base_model(), 4, steps=10)
    assert images.shape == (4, 1, 28, 28)
    ink = (images > 0).float().mean((1, 2, 3))
    assert ((ink > 0.02) & (ink < 0.4)).all()
    assert (images[..., :2, :] < -0.8).float().mean() > 0.95  # the margin of MNIST


@pytest.mark.parametrize("size, patch", [(28, 2), (8, 1), (12, 3)])
def test_a_prediction_has_the_shape_of_its_image(parts: SimpleNamespace, size: int, patch: int) -> None:
    x = torch.randn(2, 1, size, size)
    assert parts.unet.UNet(width=8, patch=patch)(x, torch.tensor([0, 199])).shape == x.shape


def test_every_recipe_covers_all_layers(parts: SimpleNamespace) -> None:
    assert len(parts.recipes.RECIPES) >= 11
    for recipe in parts.recipes.RECIPES.values():
        plan = pk.plan(parts.base.base_model(), rules=recipe.rules)
        assert len(plan.entries) == 40
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in parts.unet.UNet().modules()) == 40


def test_training_lowers_the_loss_and_keeps_the_draw_of_an_evaluation(parts: SimpleNamespace) -> None:
    torch.manual_seed(0)
    model, images = parts.unet.UNet(width=8), torch.full((8, 1, 8, 8), -1.0)
    before = parts.diffusion.evaluate(model, images)
    assert before == parts.diffusion.evaluate(model, images)
    average = parts.base.train(model, images, steps=40, lr=1e-2, batch=8)
    assert parts.diffusion.evaluate(average, images) < 0.8 * before


def test_the_pictures(parts: SimpleNamespace, tmp_path: Path) -> None:
    parts.pictures.draw_samples(
        {"base": torch.zeros(3, 1, 28, 28), "real": torch.zeros(2, 1, 28, 28)}, tmp_path / "a.png"
    )
    model = nn.Sequential(nn.Linear(4, 4))
    pk.wrap(model, "lora", rank=2)
    optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=2, log=tmp_path / "run.jsonl")
    for _ in range(12):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    stopper.note(held_out_loss=1.0)
    parts.pictures.draw_runs(dict.fromkeys("abcd", tmp_path / "run.jsonl"), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 5_000
