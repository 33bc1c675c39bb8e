"""Train the base of the demo: a U-Net that has only ever seen the digits 0 to 7.

    python examples/digits/train_base.py            # about two minutes on one core

Writes base.safetensors beside this file (fp16, 1.2 MB).
"""

import copy
from pathlib import Path

import torch
from diffusion import digits, evaluate, loss
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from unet import UNet

BASE = Path(__file__).with_name("base.safetensors")
HELD_OUT = 150


def split() -> tuple[Tensor, Tensor]:
    """Images of 0-7: those to train on, and the held-out ones."""
    images, labels = digits()
    known = images[torch.from_numpy(labels < 8)]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))
    return known[order[HELD_OUT:]], known[order[:HELD_OUT]]


def train(model: nn.Module, images: Tensor, steps: int, lr: float, batch: int = 64, seed: int = 0) -> nn.Module:
    """AdamW with one cycle of the learning rate; returns the exponential moving average of the weights."""
    torch.manual_seed(seed)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in track(range(steps), description=f"training {steps} steps"):
        value = loss(model, images[torch.randint(0, len(images), (batch,))])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        weight = 1 - min(0.99, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, current in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(current, weight)
    return average


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seen, held_out = split()
    model = train(UNet(), seen, steps=1600, lr=2e-3)
    images, labels = digits()
    unseen = images[torch.from_numpy(labels >= 8)]
    print(
        f"held-out loss on 0-7: {evaluate(model, held_out):.4f}   on the unseen 8 and 9: {evaluate(model, unseen):.4f}"
    )
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, BASE)
    print(f"wrote {BASE.name}, {BASE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
