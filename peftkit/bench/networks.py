"""Whole networks with random weights, each with an input of its own: a U-Net of diffusion and a decoder of text."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: blocks of U-Nets that diffusers builds: SD 1.5's, and one of the same kind in which a step takes milliseconds
_BLOCKS = {"sd15": (320, 640, 1280, 1280), "tiny": (32, 64)}


class Network(nn.Module):
    """A frozen network on one input, which requires a gradient, so that the network has a backward of its own.

    Attributes:
        body: the network.
        inputs: what `body` is called with; the first requires a gradient.
    """

    def __init__(self, body: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.inputs = tuple(inputs)
        self.inputs[0].requires_grad_()

    def forward(self) -> Tensor:
        out = self.body(*self.inputs)
        return out if isinstance(out, Tensor) else out[0]

    def twin(self) -> Network:
        """Return a copy with the very same weights and input."""
        kept = [*self.parameters(), *self.buffers(), *self.inputs]
        return copy.deepcopy(self, {id(tensor): tensor for tensor in kept})


def unet(size: str, latents: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Network:
    """Return a U-Net as diffusers builds it, on one image and 77 tokens of text.

    Args:
        size: "sd15" for Stable Diffusion 1.5's (860M parameters), "tiny" for one to try things on.
        latents: pixels of the latent image each way, (1, 4, latents, latents).
        dtype: of weights and input.
        device: of weights and input.
    """
    condition = importlib.import_module("diffusers.models.unets.unet_2d_condition")
    where = {"dtype": dtype, "device": device}
    options = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": _BLOCKS[size]}
    if size == "tiny":
        options |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    with torch.device(device):  # where 860M numbers are drawn in no time
        body = condition.UNet2DConditionModel(**options).to(dtype)
    inputs = torch.randn(1, 4, latents, latents, **where), torch.tensor([500], device=device)
    return Network(body, (*inputs, torch.randn(1, 77, 768, **where)))


class _Block(nn.Module):
    """A layer of Llama: RMS norm, causal attention, RMS norm, gated MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 8 * width // 3 // 64 * 64
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, tokens, width). cos, sin: (tokens, width/heads)."""
        h = self.norm_1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (each * cos + _turned(each) * sin for each in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def _turned(x: Tensor) -> Tensor:
    """The halves of the last axis exchanged, one of them negated: what rotary position embedding adds."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class _Decoder(nn.Module):
    """Layers of Llama on embedded tokens (batch, tokens, width)."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


def decoder(
    layers: int = 4,
    width: int = 1024,
    heads: int = 16,
    tokens: int = 512,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Network:
    """Return a decoder with the layers of Llama: RMS norms, rotary positions, causal attention, gated MLPs.

    Args:
        layers: how many; each has 7 Linear layers.
        width: of the residual stream; the MLP is 8/3 of it wide, a multiple of 64.
        heads: of the attention.
        tokens: of every sequence.
        batch: sequences.
        dtype: of weights and input.
        device: of weights and input.
    """
    with torch.device(device):
        body = _Decoder(layers, width, heads).to(dtype)
    angles = torch.arange(tokens)[:, None] * 10000 ** -torch.arange(0, 1, 2 * heads / width)
    cos, sin = (f(torch.cat((angles, angles), -1)).to(device, dtype) for f in (torch.cos, torch.sin))
    return Network(body, (torch.randn(batch, tokens, width, device=device, dtype=dtype), cos, sin))
