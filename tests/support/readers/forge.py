"""Forge dfdcbab6: backend/patcher/lora.py and packages_3rdparty/comfyui_lora_collection/lora.py.

The same loader as ComfyUI's, older: no OFT, no BOFT, fewer names; an error in a layer is not caught, so the
generation fails; and a file with more than twelve tensors that fit nothing is refused (sd_forge_lora/networks.py:25).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import comfyui
from .comfyui import Diff, Unpatched
from .container import read_tensors
from .model import Module, dotted, ldm_core, named, split_components
from .result import Read, Refused, result
from .unet_names import UNETS

MAX_LEFTOVERS = 12


def read(path: Path, weights: Mapping[str, Tensor], family: str | None, strength: float = 1.0) -> Read:
    tensors = read_tensors(path)
    patches, loaded = comfyui.load(tensors, names(weights, family), ADAPTERS, Diff(padded_kernel, turns=False))
    leftovers = sorted(set(tensors) - loaded)
    if len(leftovers) > MAX_LEFTOVERS:
        raise Refused(f"networks.py:25: {len(leftovers)} tensors fit nothing: {leftovers}")
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    used: list[str] = []
    for patch in patches:
        try:
            change = patch.delta(patch.module.weight, strength)
        except Unpatched:
            continue
        except RuntimeError as error:
            raise Refused(f"the generation fails: {error}") from error
        (biases if patch.of_bias else deltas).update(patch.module.split(change))
        used += patch.keys
    return result(deltas, biases, tensors, used)


def names(weights: Mapping[str, Tensor], family: str | None) -> dict[str, Module]:
    """ComfyUI's names but `text_encoders.` and, for SD3, any in diffusers' spelling (:363); no generic models."""
    if family is None:
        return {}
    components = split_components(weights, family)
    ldm, diffusers = ldm_core(components, family), comfyui.slices(weights, family)
    found = {**named("lora_unet_", ldm), **named("diffusion_model.", ldm, dotted)}
    if family in UNETS:
        found.update(comfyui.unet_names(diffusers))
    if family == "flux":
        found.update(named("lora_transformer_", diffusers))
        found.update(named("transformer.", diffusers, dotted))
    if family != "sd3":
        found.update(named("lycoris_", diffusers))
    return {**found, **comfyui.text_names(components, family)}


def padded_columns(delta: Tensor, weight: Tensor) -> Tensor:
    """Of the same number of elements: reshaped. A Linear with more or fewer inputs: padded with zeros (lora.py:163)."""
    if delta.numel() == weight.numel():
        return delta.reshape(weight.shape)
    if delta.ndim == weight.ndim == 2 and delta.shape[0] == weight.shape[0]:
        return _grown(delta, weight)
    raise RuntimeError(f"a delta of {tuple(delta.shape)} for a weight of {tuple(weight.shape)}")


def padded_kernel(diff: Tensor, weight: Tensor) -> Tensor:
    """A Conv2d diff of another size is padded with zeros (lora.py:127); anything else is printed and skipped."""
    if diff.shape == weight.shape:
        return diff
    if diff.ndim == weight.ndim == 4 and diff.shape[2:] == weight.shape[2:]:
        return _grown(diff, weight)
    raise Unpatched("shape mismatch, weight not merged")


def _grown(delta: Tensor, weight: Tensor) -> Tensor:
    if any(more > has for more, has in zip(delta.shape, weight.shape, strict=True)):
        raise Refused("the weight is padded to the larger shape of the delta, which its layer cannot take")
    padded = torch.zeros_like(weight)
    padded[tuple(slice(size) for size in delta.shape)] = delta
    return padded


ADAPTERS = [comfyui.lora(comfyui.PAIRS, False, padded_columns), comfyui.loha, comfyui.lokr, comfyui.glora]
