"""A small denoising U-Net: 20 Conv2d and 20 Linear layers, 0.6 M parameters.

Residual blocks with time scale-shift and self-attention, as in Ho et al., "Denoising Diffusion Probabilistic Models"
(https://arxiv.org/abs/2006.11239), over patches of 2×2 pixels, at a size that trains on one CPU core in minutes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the time step. t: (B,) -> (B, width)."""
    frequencies = torch.exp(torch.arange(width // 2) * (-math.log(1000.0) / (width // 2)))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """x (B, cin, h, w), time (B, e) -> (B, cout, h, w)."""

    def __init__(self, cin: int, cout: int, time_width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self-attention over the pixels. x (B, c, h, w) -> (B, c, h, w)."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).view(b, h * w, self.heads, -1).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.to_out(mixed).transpose(1, 2).view(b, c, h, w)


class UNet(nn.Module):
    """Noise prediction. x (B, 1, h, w), t (B,) integers -> (B, 1, h, w).

    Args:
        width: Channels at the finest level, a multiple of 8; the levels below have twice as many.
        patch: Side of the square of pixels that is one position of the finest level; divides h and w.
    """

    def __init__(self, width: int = 32, patch: int = 2) -> None:
        super().__init__()
        c, e = width, 4 * width
        self.width, self.patch = width, patch
        self.time_mlp = nn.Sequential(nn.Linear(c, e), nn.SiLU(), nn.Linear(e, e))
        self.conv_in = nn.Conv2d(patch**2, c, 3, padding=1)
        self.down1 = ResidualBlock(c, c, e)
        self.shrink1 = nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.down2, self.down2_attn = ResidualBlock(c, 2 * c, e), Attention(2 * c)
        self.shrink2 = nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1)
        self.mid1, self.mid_attn, self.mid2 = (
            ResidualBlock(2 * c, 2 * c, e),
            Attention(2 * c),
            ResidualBlock(2 * c, 2 * c, e),
        )
        self.up2, self.up2_attn = ResidualBlock(4 * c, 2 * c, e), Attention(2 * c)
        self.grow = nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.up1 = ResidualBlock(3 * c, c, e)
        self.norm_out, self.conv_out = nn.GroupNorm(8, c), nn.Conv2d(c, patch**2, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = F.silu(self.time_mlp(time_embedding(t, self.width)))
        h1 = self.down1(self.conv_in(F.pixel_unshuffle(x, self.patch)), time)
        h2 = self.down2_attn(self.down2(self.shrink1(h1), time))
        h = self.mid2(self.mid_attn(self.mid1(self.shrink2(h2), time)), time)
        h = F.interpolate(h, size=h2.shape[-2:])
        h = self.up2_attn(self.up2(torch.cat([h, h2], dim=1), time))
        h = F.interpolate(self.grow(h), size=h1.shape[-2:])
        h = self.up1(torch.cat([h, h1], dim=1), time)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)
