"""kohya sd-scripts 48d368fa: networks/lora.py (and lora_flux.py), networks/oft.py, as they merge into the base.

SD1.5 and SD2 U-Nets have diffusers' names, SDXL, SD3 and Flux their own. A file of oft_blocks goes to networks/oft.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import algebra
from .container import by_module, read_tensors
from .model import Module, ldm_core, named, own_core, split_components, text_encoder
from .result import Read, Refused, result

Tensors = dict[str, Tensor]


def read(path: Path, weights: Mapping[str, Tensor], family: str | None, strength: float = 1.0) -> Read:
    tensors = read_tensors(path)
    if any(key.endswith(".oft_blocks") for key in tensors):
        return _oft(tensors, names(weights, family, "oft_unet_"), strength)
    return _lora(tensors, names(weights, family, "lora_unet_"), strength)


def names(weights: Mapping[str, Tensor], family: str | None, prefix: str) -> dict[str, Module]:
    """What a file may call each module."""
    if family is None:
        return {}
    components = split_components(weights, family)
    own, diffusers = ldm_core(components, family), own_core(components)
    own = {path: module for path, module in own.items() if made(module.name, family)}
    diffusers = {path: module for path, module in diffusers.items() if made(module.name, family)}
    encoders = [
        {path: module for path, module in text_encoder(components, name).items() if made(module.name, family)}
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    ]
    if family in ("sd15", "sd2"):
        return {**named(prefix, diffusers), **named("lora_te_", encoders[0])}
    found = named(prefix, own)
    if family == "sdxl" and prefix == "lora_unet_":  # converted (lora.py:758)
        found = {**named(prefix, diffusers), **found}
    if family == "flux":  # CLIP-L and T5
        return {**found, **named("lora_te1_", encoders[0]), **named("lora_te3_", encoders[1])}
    for number, encoder in enumerate(encoders, 1):
        found.update(named(f"lora_te{number}_", encoder))
    return found


#: the classes inside which a module is made, by what diffusers calls their modules: lora.py:867, lora_flux.py:708,
#: lora_sd3.py:231; then the layers outside the blocks that are added for a file that has them (in_dims, emb_dims)
UNET = re.compile(r"unet\..*\.(attentions|resnets|downsamplers|upsamplers)\.\d+\..+")
CLIP = re.compile(r"text_encoder(_\d)?\.(.*\.)?(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
T5 = re.compile(r"text_encoder_\d\.encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w.*)")
FLUX = re.compile(r"transformer\.((single_)?transformer_blocks\..+|x_embedder|context_embedder|time_text_embed\..+)")
SD3 = re.compile(r"transformer\..+")


def made(name: str, family: str) -> bool:
    """Whether create_network_from_weights makes a module for a layer, by its canonical name."""
    kinds = {"flux": (FLUX, CLIP, T5), "sd3": (SD3, CLIP, T5)}.get(family, (UNET, CLIP))
    return any(kind.fullmatch(name) for kind in kinds)


def _lora(tensors: Tensors, modules: Mapping[str, Module], strength: float) -> Read:
    """scale·up·down. lora_mid and dora_scale are never read, so their modules come out wrong."""
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():  # by substring: a path with "alpha" or "lora_down" in it is lost (:829)
        name = key.partition(".")[0]
        if "alpha" in key:
            alphas[name] = tensor.flatten()[0].item()
        elif "lora_down" in key:
            ranks[name] = tensor.shape[0]
    groups = by_module(tensors)
    deltas: dict[str, Tensor] = {}
    used: list[str] = []
    for name, rank in ranks.items():
        own = groups[name]
        if name not in modules or "lora_up.weight" not in own or "lora_down.weight" not in own:
            continue
        weight = modules[name].weight
        try:
            delta = _up_down(own["lora_up.weight"], own["lora_down.weight"], weight).expand(weight.shape)
        except (RuntimeError, IndexError) as error:
            raise Refused(f"networks/lora.py: {name}: {error}") from error
        scale = (alphas.get(name) or rank) / rank  # alpha 0 means rank, as does a missing one (:71, :836)
        deltas.update(modules[name].split(delta * scale * strength))
        used += [f"{name}.{key}" for key in ("lora_up.weight", "lora_down.weight", "alpha") if key in own]
    return result(deltas, {}, tensors, used)


def _up_down(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """Linear: 2-D factors. Conv2d: a 1×1 down gives a 1×1 delta, which broadcasts over a larger kernel."""
    if weight.ndim == 2:
        return up @ down
    if weight.ndim != 4:
        raise RuntimeError("neither Linear nor Conv2d")
    if down.shape[2:4] == (1, 1):
        return (up.squeeze(3).squeeze(2) @ down.squeeze(3).squeeze(2))[..., None, None]
    return torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)


def _oft(tensors: Tensors, modules: Mapping[str, Module], strength: float) -> Read:
    """One number of blocks and one alpha for the whole file: the first (create_network_from_weights)."""
    groups = {name: own for name, own in by_module(tensors).items() if "oft_blocks" in own}
    count = next(iter(groups.values()))["oft_blocks"].shape[0]
    alphas = [tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")]
    if not alphas:
        raise Refused("networks/oft.py: KeyError: alpha")
    deltas: dict[str, Tensor] = {}
    used: list[str] = []
    for name, own in groups.items():
        if name not in modules:
            continue
        weight, blocks = modules[name].weight, own["oft_blocks"]
        out = weight.shape[0]
        if blocks.shape != (count, out // count, out // count):
            raise Refused(f"networks/oft.py: {name}: {count} blocks of {out // count} expected: {tuple(blocks.shape)}")
        skewed = algebra.skew(blocks)
        norm = skewed.norm()
        limited = skewed * ((norm.clamp(max=alphas[0] * out) + 1e-8) / (norm + 1e-8))  # alpha 0: nothing is left
        delta = algebra.rotate_rows(algebra.cayley(limited), weight) - weight
        deltas.update(modules[name].split(strength * delta))
        used += [f"{name}.{key}" for key in ("oft_blocks", "alpha") if key in own]
    return result(deltas, {}, tensors, used)
