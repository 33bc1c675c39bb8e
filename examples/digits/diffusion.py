"""The data and the diffusion process: real 8×8 handwritten digits, cosine schedule, DDIM sampling."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

STEPS = 200  # T, the length of the noising process


def digits() -> tuple[Tensor, np.ndarray]:
    """The 1797 images of scikit-learn's digits set: (1797, 1, 8, 8) in [-1, 1], and their labels."""
    flat, labels = load_digits(return_X_y=True)
    images = torch.tensor(flat, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images, np.asarray(labels)


def _cosine_schedule() -> Tensor:
    """ᾱ_t of Nichol & Dhariwal (https://arxiv.org/abs/2102.09672), (STEPS,)."""
    t = torch.linspace(0, 1, STEPS + 1)
    level = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (level / level[0])[1:].clamp(1e-4, 0.9999)


ALPHA_BAR = _cosine_schedule()


def loss(model: nn.Module, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean squared error of the predicted noise at random times. x: (B, 1, 8, 8)."""
    t = torch.randint(0, STEPS, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    level = ALPHA_BAR[t][:, None, None, None]
    return F.mse_loss(model(level.sqrt() * x + (1 - level).sqrt() * noise, t), noise)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, repeats: int = 4, seed: int = 123) -> float:
    """The loss with fixed times and noise, so that two models are compared on the same draw."""
    generator = torch.Generator().manual_seed(seed)
    return sum(loss(model, x, generator).item() for _ in range(repeats)) / repeats


@torch.no_grad()
def sample(model: nn.Module, count: int, steps: int = 40, seed: int = 7, eta: float = 0.5) -> Tensor:
    """DDIM (Song et al., https://arxiv.org/abs/2010.02502) with x0 clamped; (count, 1, 8, 8) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    times = torch.linspace(STEPS - 1, 0, steps).long()
    x0 = x
    for now, after in zip(times, [*times[1:], None], strict=True):
        noise = model(x, now.repeat(count))
        a = ALPHA_BAR[now]
        x0 = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
        if after is None:
            break
        b = ALPHA_BAR[after]
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0).sqrt()
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = b.sqrt() * x0 + (1 - b - sigma**2).clamp(min=0).sqrt() * noise
        x = x + sigma * torch.randn(x.shape, generator=generator)
    return x0
