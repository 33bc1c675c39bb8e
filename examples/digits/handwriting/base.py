"""The base of the demo: the file of its weights, and how they were trained."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from .diffusion import loss
from .unet import UNet

FILE = Path(__file__).resolve().parents[1] / "base.safetensors"


def base_model(path: Path = FILE, patch: int = 2) -> UNet:
    """Build the U-Net in fp32 with the weights of a file, ready to sample from."""
    model = UNet(patch=patch)
    model.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    return model.eval()


def train(
    model: nn.Module,
    images: Tensor,
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int = 0,
    decay: float = 0.995,
    shown: bool = True,
) -> nn.Module:
    """Train all weights by AdamW with one cycle of the learning rate, and return their average over the steps.

    Args:
        model: The U-Net, changed in place.
        images: Images to train on, `(n, 1, h, w)`.
        steps: Steps of the optimiser.
        lr: The highest learning rate.
        batch: Images a step, drawn with replacement.
        seed: Of the images, times and noise drawn.
        decay: Of the moving average, per step; it is faster in the beginning.
        shown: Whether a progress bar is.
    """
    torch.manual_seed(seed)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in track(range(steps), description=f"training {steps} steps", disable=not shown):
        value = loss(model, images[torch.randint(0, len(images), (batch,))])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        weight = 1 - min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, current in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(current, weight)
    return average
