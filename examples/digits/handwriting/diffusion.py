"""The diffusion process: noise prediction, cosine schedule, DDIM sampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 200  # T, the length of the noising process
NOISY = 100  # from this time on the noise outweighs the image, and the model decides which digit it will be


def _cosine_schedule() -> Tensor:
    """ᾱ_t of Nichol & Dhariwal (https://arxiv.org/abs/2102.09672), (STEPS,)."""
    t = torch.linspace(0, 1, STEPS + 1)
    level = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (level / level[0])[1:].clamp(1e-4, 0.9999)


ALPHA_BAR = _cosine_schedule()


def loss(model: nn.Module, x: Tensor, generator: torch.Generator | None = None, first: int = 0) -> Tensor:
    """Mean squared error of the predicted noise at random times from `first` on. x: (B, 1, h, w)."""
    t = torch.randint(first, STEPS, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    level = ALPHA_BAR[t][:, None, None, None]
    return F.mse_loss(model(level.sqrt() * x + (1 - level).sqrt() * noise, t), noise)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, repeats: int = 4, seed: int = 123, first: int = 0) -> float:
    """The loss with fixed times and noise, so that two models are compared on the same draw."""
    generator = torch.Generator().manual_seed(seed)
    return sum(loss(model, x, generator, first).item() for _ in range(repeats)) / repeats


@torch.no_grad()
def sample(model: nn.Module, count: int, size: int = 28, steps: int = 30, seed: int = 7, eta: float = 0.5) -> Tensor:
    """Draw images by DDIM (Song et al., https://arxiv.org/abs/2010.02502), x0 clamped: (count, 1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, size, size, generator=generator)
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
