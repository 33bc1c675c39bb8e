"""Adapter files as other programs spell them, and the ΔW that loading them installs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.wrapping.installed import installed_adapters
from tests.support.files import State, keyed, write
from tests.support.models import conv_net


def randomized(parameters: Iterator[tuple[str, Tensor]], size: float = 0.3) -> None:
    """Draw parameters that start at zero or at one anew, around where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


POINTWISE = ("block.point", "heads.0", "heads.1")


def separate_outputs(unet: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
    """Of the U-Net, given states; and of the text encoder."""
    torch.manual_seed(3)
    x, states, ids = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8), torch.tensor([[0, 3, 7, 1]])
    return unet(x, torch.tensor([37]), states).sample, text_encoder(ids).last_hidden_state


UP, DOWN = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)), torch.arange(48.0).reshape(3, 16) / 48
PRODUCT = UP @ DOWN


def delta_of(model: nn.Module, weight: str) -> Tensor:
    """ΔW (m, n) of the one adapter on a weight, in float64."""
    (found,) = [at for at in installed_adapters(model, ["default"]) if at.site == weight]
    with torch.no_grad():
        return copy.deepcopy(found.adapter).double().eval()(found.base.double(), 1.0).dense()


def require_delta(model: nn.Module, weight: str, expected: Tensor) -> None:
    found = delta_of(model, weight)
    expected = expected.double().flatten(1)
    assert found.shape == expected.shape
    error = float((found - expected).norm())
    assert error <= 1e-6 * float(expected.norm()), f"{weight}: an error of {error:.2e}"


SD15_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
XL_Q = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"


def factors(rows: int, channels: int, kernel: tuple[int, ...], rank: int = 2) -> tuple[Tensor, Tensor]:
    """Of a LoRA in kohya's shapes."""
    ones = (1,) * len(kernel)
    return torch.randn(rows, rank, *ones), torch.randn(rank, channels, *kernel)


# Layers that are one in the file and several in the model
QKV = tuple(f"transformer_blocks.2.attn.to_{part}" for part in "qkv")

HEAD = {"lora_up.weight": UP, "lora_down.weight": DOWN}


def loaded_on_head(tensors: Mapping[str, Tensor], folder: Path, **options: Any) -> nn.Module:
    """The small model with these tensors on heads.0."""
    model, _ = conv_net()
    pk.load(model, write(folder / "a.safetensors", keyed("lora_unet_heads_0", tensors)), **options)
    return model


def decomposed(W: Tensor, V: Tensor, magnitude: Tensor, axis: str) -> Tensor:
    """m·(W + V)/‖W + V‖ − W per row, or per input channel over rows and kernel."""
    W, whole = W.double(), W.double() + V.double().reshape(W.shape)
    dims = tuple(range(1, W.dim())) if axis == "out" else (0, *range(2, W.dim()))
    shape = (-1, *(1,) * (W.dim() - 1)) if axis == "out" else (1, -1, *(1,) * (W.dim() - 2))
    norms = torch.linalg.vector_norm(whole, dim=dims, keepdim=True)
    return whole * magnitude.double().reshape(shape) / norms - W


def dora_file(layer: nn.Module, axis: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    W: Tensor = layer.weight.detach()  # type: ignore[assignment,operator]
    up, down = factors(W.shape[0], W.shape[1], tuple(W.shape[2:]))
    magnitude = torch.rand(W.shape[0] if axis == "out" else W.shape[1]) + 0.5
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude.reshape(shape)}
    return tensors, decomposed(W, up.flatten(1) @ down.flatten(1), magnitude, axis)
