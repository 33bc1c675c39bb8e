"""AUTOMATIC1111 v1.10.1, extensions-builtin/Lora."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    modules = names(weights, family)
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    used: list[str] = []
    groups = {name: (modules[name], own) for name, own in _split(tensors, family).items() if name in modules}
    kinds = {name: _kind(name, module.weight, own) for name, (module, own) in groups.items()}  # raises before any work
    present = {module.name for module, _ in groups.values()}
    for name, (module, own) in groups.items():
        if not _siblings(module.name, present, family):
            continue
        names_used, delta_of = kinds[name]
        weight = module.weight
        try:
            delta, bias = delta_of(weight, own)
            delta = _finalize(delta, weight, own, names_used) * strength
            delta = _added(delta, weight)
        except RuntimeError:  # networks.py:481: counted in "Networks with errors", the layer stays as it was
            continue
        used += [f"{name}.{own_name}" for own_name in names_used if own_name in own]
        deltas.update(module.split(delta))
        if bias is not None:
            biases[module.name] = bias * strength
    return result(deltas, biases, tensors, used)


# Names ----------------------------------------------------------------------------------------------------------------


def names(weights: Mapping[str, Tensor], family: str | None) -> dict[str, Module]:
    """What a file may call each module: the model's own names, and diffusers' where the conversion knows them."""
    components = split_components(weights, family)
    if family is None or family == "flux":  # no such model
        return {}
    diffusers = own_core(components)
    if family == "sd3":
        return {f"transformer.{p}": module for p, module in diffusers.items() if p.startswith("transformer_blocks.")}
    known = {path: module for path, module in diffusers.items() if not _unknown(path, family)}
    ldm = ldm_core(components, family)
    found = {**named("lora_unet_", known), **named("lora_unet_", ldm), **named("oft_unet_", ldm)}
    first, second = text_encoder(components, "text_encoder"), text_encoder(components, "text_encoder_2")
    if family == "sd15":
        return {**found, **named("lora_te_", _layers(first)), **named("lora_te1_", first)}
    if family == "sd2":
        return {**found, **named("lora_te_", _open_clip(first))}
    return {**found, **named("lora_te1_", first), **named("lora_te2_", _open_clip(second))}


def _unknown(path: str, family: str) -> bool:
    """Diffusers names that networks.py does not convert; it puts the upsampler of decoder block 0 always at 1 (:97)."""
    if path == "conv_norm_out" or path.startswith("add_embedding."):
        return True
    return family == "sdxl" and path == "up_blocks.0.upsamplers.0.conv"


def _layers(modules: Mapping[str, Module]) -> dict[str, Module]:
    return {path: module for path, module in modules.items() if path.startswith("text_model.encoder.layers.")}


def _open_clip(modules: Mapping[str, Module]) -> dict[str, Module]:
    """An OpenCLIP encoder: only the six linear layers of a block have names to convert."""
    known = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    return {path: module for path, module in _layers(modules).items() if path.endswith(known)}


def _split(tensors: Tensors, family: str | None) -> dict[str, Tensors]:
    """Module -> its tensors. With SD3 the last two dots part them, and there must be two (networks.py:185)."""
    if family != "sd3":
        return by_module(tensors)
    grouped: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        if key.count(".") < 2:
            raise Refused(f"networks.py:185: {key} has fewer than two dots")
        module, first, last = key.rsplit(".", 2)
        grouped.setdefault(module, {})[f"{first}.{last}"] = tensor
    return grouped


def _siblings(name: str, present: set[str], family: str | None) -> bool:
    """Fused attention (OpenCLIP's q, k, v, out; SD3's q, k, v) is patched only when the file has them all (:487)."""
    if family in ("sd2", "sdxl") and ".self_attn." in name and name.startswith(_open_clip_encoder(family)):
        group = ("q_proj", "k_proj", "v_proj", "out_proj")
    elif family == "sd3" and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
        group = ("to_q", "to_k", "to_v")
    elif family == "sd3" and name.rpartition(".")[2] in ("add_q_proj", "add_k_proj", "add_v_proj"):
        group = ("add_q_proj", "add_k_proj", "add_v_proj")
    else:
        return True
    stem = name.rpartition(".")[0]
    return all(f"{stem}.{sibling}" in present for sibling in group)


def _open_clip_encoder(family: str) -> str:
    return "text_encoder." if family == "sd2" else "text_encoder_2."


# Algorithms -----------------------------------------------------------------------------------------------------------

Delta = Callable[[Tensor, Tensors], tuple[Tensor, Tensor | None]]
COMMON = ("alpha", "scale", "dora_scale", "bias")


def _kind(name: str, weight: Tensor, own: Tensors) -> tuple[tuple[str, ...], Delta]:
    """The first algorithm that accepts the tensors, as (tensors it uses, its ΔW); none drops the file (:253)."""

    def has(*wanted: str) -> bool:
        return all(tensor in own for tensor in wanted)

    if "alpha" in own and own["alpha"].numel() != 1:
        raise Refused(f"network.py: alpha of {name} has {own['alpha'].numel()} elements")
    if has("lora_up.weight", "lora_down.weight"):
        _check_layer(name, weight)
        return ("lora_up.weight", "lora_down.weight", "lora_mid.weight", *COMMON), _lora
    if has("lora_A.weight", "lora_B.weight"):  # alpha, lora_mid and dora_scale are thrown away (network_lora.py:14)
        _check_layer(name, weight)
        own_pair = {"lora_up.weight": own["lora_B.weight"], "lora_down.weight": own["lora_A.weight"]}
        return ("lora_A.weight", "lora_B.weight"), lambda base, _: _lora(base, own_pair)
    if has("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        return ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", *COMMON), _loha
    if has("weight"):
        if "on_input" not in own:
            raise Refused(f"network_ia3.py: {name} has a weight but no on_input")
        return ("weight", "on_input", *COMMON), _ia3
    if (has("lokr_w1") or has("lokr_w1_a", "lokr_w1_b")) and (has("lokr_w2") or has("lokr_w2_a", "lokr_w2_b")):
        factors = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        return (*factors, *COMMON), _lokr
    if has("diff"):
        return ("diff", "diff_b", *COMMON), lambda _, own: (own["diff"], own.get("diff_b"))
    if has("w_norm", "b_norm"):
        return ("w_norm", "b_norm", *COMMON), lambda _, own: (own["w_norm"], own["b_norm"])
    if has("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"):
        return ("a1.weight", "a2.weight", "b1.weight", "b2.weight", *COMMON), _glora
    if has("oft_blocks"):
        return ("oft_blocks", "rescale", "alpha", "dora_scale", "bias"), _oft
    if has("oft_diag"):
        return ("oft_diag", "rescale", "dora_scale", "bias"), _oft
    raise Refused(f"networks.py:253: no module type accepts the tensors {sorted(own)} of {name}")


def _check_layer(name: str, weight: Tensor) -> None:
    if weight.ndim not in (2, 4):
        raise Refused(f"network_lora.py:40: {name} is neither Linear nor Conv2d")


def _lora(weight: Tensor, own: Tensors) -> tuple[Tensor, None]:
    up, down, mid = own["lora_up.weight"], own["lora_down.weight"], own.get("lora_mid.weight")
    if mid is not None:
        return torch.einsum("mnkl,om,ni->oikl", mid, up.flatten(1), down.flatten(1)), None
    delta = algebra.product(up, down)
    if weight.ndim == 4 and down.ndim == 4:  # a 1×1 delta on a larger kernel stays 1×1
        delta = delta.reshape(up.shape[0], *down.shape[1:])
    return delta, None


def _loha(weight: Tensor, own: Tensors) -> tuple[Tensor, None]:
    halves = []
    for half in ("1", "2"):
        out, into, core = own[f"hada_w{half}_a"], own[f"hada_w{half}_b"], own.get(f"hada_t{half}")
        if core is None:
            halves.append(out @ into)
        else:  # four letters: Conv2d only (network_hada.py:30)
            halves.append(torch.einsum("pqkl,po,qi->oikl", core, out, into))
    return halves[0] * halves[1], None


def _lokr(weight: Tensor, own: Tensors) -> tuple[Tensor, None]:
    first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        second = own["lokr_w2"]
    elif "lokr_t2" in own:
        second = torch.einsum("pqkl,po,qi->oikl", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        second = own["lokr_w2_a"] @ own["lokr_w2_b"]
    if second.ndim not in (2, 4):  # only a 4-D w2 gets a matching w1
        raise RuntimeError("w2 of a Conv1d or Conv3d")
    return algebra.kronecker(first, second), None


def _ia3(weight: Tensor, own: Tensors) -> tuple[Tensor, None]:
    gate = own["weight"] if own["on_input"].item() else own["weight"].reshape(-1, 1)
    return weight * gate, None


def _glora(weight: Tensor, own: Tensors) -> tuple[Tensor, None]:
    """The old layout: a1 (r, i), a2 (i, r), b1 (r, i), b2 (o, r)."""
    a1, a2, b1, b2 = (own[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return (b2 @ b1) + (weight @ a2) @ a1, None


def _oft(weight: Tensor, own: Tensors) -> tuple[Tensor, None]:
    if "oft_blocks" in own:
        limit = own["alpha"].item() * weight.shape[0] if "alpha" in own else 0.0  # network_oft.py:59
        blocks = algebra.cayley(algebra.clamp_norm(algebra.skew(own["oft_blocks"]), limit))
    else:
        blocks = own["oft_diag"]
    merged = algebra.butterfly(blocks, weight) if blocks.ndim == 4 else algebra.rotate_rows(blocks, weight)
    if "rescale" in own:
        merged = algebra.per_row(own["rescale"].flatten(), weight) * merged
    return merged - weight, None


# What happens to every ΔW ---------------------------------------------------------------------------------------------


def _scale(own: Tensors, used: tuple[str, ...]) -> float:
    """`scale` if the file has it, else alpha/dim if both are known, else 1 (network.py:167)."""
    if "scale" not in used:
        return 1.0
    if "scale" in own:
        return own["scale"].item()
    ranks = (
        ("lora_down.weight", "lora_down.weight"),
        ("hada_w1_b", "hada_w1_b"),
        ("lokr_w2", "lokr_w2_b" if "lokr_w2_b" in own else "lokr_w1_b"),
    )
    for marker, tensor in ranks:
        if marker in used and tensor in own and "alpha" in own:
            return own["alpha"].item() / own[tensor].shape[0]
    return 1.0


def _finalize(delta: Tensor, weight: Tensor, own: Tensors, used: tuple[str, ...]) -> Tensor:
    """Bias, shape, scale, DoRA (network.py:197-216). Only the number of elements is checked: a wrong shape garbles."""
    if "bias" in used and "bias" in own:
        delta = (delta.reshape(own["bias"].shape) + own["bias"]).reshape(delta.shape)
    if delta.numel() == weight.numel():
        delta = delta.reshape(weight.shape)
    delta = delta * _scale(own, used)
    if "dora_scale" in used and "dora_scale" in own:  # always per input column of V (network.py:175)
        merged = weight + delta
        delta = merged * (own["dora_scale"] / algebra.column_norms(merged)) - weight
    return delta


def _added(delta: Tensor, weight: Tensor) -> Tensor:
    """What `weight += delta` adds: broadcast if it can, RuntimeError if not; inpainting channels are padded (:471)."""
    if weight.ndim == 4 and weight.shape[1] == 9 and delta.ndim == 4 and delta.shape[1] == 4:
        delta = torch.nn.functional.pad(delta, (0, 0, 0, 0, 0, 5))
    return delta.expand(weight.shape)
