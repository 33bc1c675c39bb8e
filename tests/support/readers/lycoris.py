"""lycoris_lora 4.1.3: create_lycoris_from_weights (wrapper.py, kohya.py), then the forward of each module.

The forward is what was trained; merge_to of LoHa and LoKr applies alpha/rank a second time (loha.py:231, lokr.py:382).
A module is rebuilt from the shapes in the file and the tensors are copied in, so what does not fit raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import algebra
from .container import by_module, read_tensors
from .model import TEXT, Module, as_is, base_weights, ldm_core, named, own_core, split_components, text_encoder
from .result import Read, Refused, result

Own = Mapping[str, Tensor]


def read(path: Path, weights: Mapping[str, Tensor], family: str | None, strength: float = 1.0) -> Read:
    tensors = read_tensors(path)
    modules = names(weights, family, tensors)
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    used: list[str] = []
    for name, own in by_module({key: tensor for key, tensor in tensors.items() if "." in key}).items():
        if name not in modules:  # ignored silently
            continue
        module = modules[name]
        known, delta_of = _kind(name, own)
        try:
            delta, bias = delta_of(module.weight, own, strength)
        except Refused as error:
            raise Refused(f"{name}: {error}") from error
        deltas.update(module.split(delta))
        if bias is not None:
            biases.update(module.split(bias))
        used += [f"{name}.{key}" for key in known if key in own]
    return result(deltas, biases, tensors, used)


# Names ----------------------------------------------------------------------------------------------------------------


def names(weights: Mapping[str, Tensor], family: str | None, keys: Mapping[str, Tensor]) -> dict[str, Module]:
    """What a file may call each module.

    The generic wrapper walks one model: `lycoris_<path>`, here of the denoiser or of a generic model. The kohya wrapper
    takes the pipeline's parts: lora_unet_ and lora_te_, or lora_te1_, lora_te2_, … where there are several encoders;
    the denoiser may be diffusers' or the trainer's own, whichever the file fits better.
    """
    if family is None:
        return named("lycoris_", as_is(base_weights(weights)))
    components = split_components(weights, family)
    found = named("lycoris_", own_core(components))
    present = {key.partition(".")[0] for key in keys}
    spellings = [named("lora_unet_", own_core(components)), named("lora_unet_", ldm_core(components, family))]
    found.update(max(spellings, key=lambda spelling: len(present & set(spelling))))
    for number, component in enumerate(TEXT, 1):
        prefixes = ["lora_te_"] if family in ("sd15", "sd2") else [f"lora_te{number}_"]
        if family == "flux" and component == "text_encoder_2":
            prefixes.append("lora_te3_")
        for prefix in prefixes:
            found.update(named(prefix, text_encoder(components, component)))
    return found


# Algorithms -----------------------------------------------------------------------------------------------------------

Delta = Callable[[Tensor, Own, float], tuple[Tensor, "Tensor | None"]]


def _kind(name: str, own: Own) -> tuple[Sequence[str], Delta]:
    """The first of MODULE_LIST whose mark is there, as (tensors it takes, its ΔW)."""
    blocks = own.get("oft_blocks")
    if "lora_up.weight" in own:
        return ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"), _locon
    if "hada_w1_a" in own:
        return (*(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")), "alpha", "dora_scale"), _loha
    if "on_input" in own:
        raise Refused("ia3.py:93: make_module_from_state_dict takes one tensor and is given two")
    if "lokr_w1" in own or "lokr_w1_a" in own:
        return (
            *(f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            "alpha",
            "dora_scale",
        ), _lokr
    if "diff" in own:
        return ("diff", "diff_b"), _full
    if "w_norm" in own:
        return ("w_norm", "b_norm"), _norm
    if blocks is not None and blocks.ndim == 3:
        return ("oft_blocks", "rescale", "alpha"), _oft
    if blocks is not None and blocks.ndim == 4:
        return ("oft_blocks", "rescale", "alpha"), _boft
    if "a1.weight" in own:
        return ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"), _glora
    if "lambda_layer" in own:
        return ("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"), _tlora
    raise Refused(f"modules/__init__.py: AttributeError: no module type for the tensors {sorted(own)} of {name}")


def _alpha(own: Own) -> float:
    if "alpha" not in own:
        raise Refused("TypeError: float(None), alpha is missing")
    if own["alpha"].numel() != 1:
        raise Refused("float(alpha) of several elements")
    return own["alpha"].item()


def _scale(own: Own, rank: int) -> float:
    """alpha 0 means rank (locon.py:147)."""
    return (_alpha(own) or rank) / rank


def _copied(shape: Sequence[int], own: Own, name: str) -> Tensor:
    """own[name] copied into a parameter of `shape`, which may broadcast."""
    if name not in own:
        raise Refused(f"{name} is missing")
    try:
        return own[name].expand(tuple(shape))
    except RuntimeError as error:
        raise Refused(f"{name} is {tuple(own[name].shape)}, the module's is {tuple(shape)}") from error


def _layer(weight: Tensor) -> None:
    if weight.ndim < 2:
        raise Refused("ValueError: this algorithm does not support norm layers")


def _has_kernel(weight: Tensor) -> bool:
    return any(size != 1 for size in weight.shape[2:])


def _decomposed(weight: Tensor, delta: Tensor, own: Own, strength: float) -> Tensor:
    """V·(s·(m/‖V‖ − 1) + 1) − W with a magnitude per output row: at s = 0 the ΔW stays (general.py:136)."""
    if "dora_scale" not in own:
        return strength * delta
    magnitude = _copied(algebra.row_norms(weight).shape, own, "dora_scale")  # always built out-axis
    merged = weight + delta
    ratio = magnitude / (algebra.row_norms(merged) + torch.finfo(torch.float32).eps)
    return merged * (strength * (ratio - 1) + 1) - weight


def _locon(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    _layer(weight)
    if "lora_down.weight" not in own:
        raise Refused("AttributeError: lora_down is missing")
    rank = own["lora_down.weight"].shape[0]
    out, into, *kernel = weight.shape
    ones = [1] * len(kernel)
    scale = _scale(own, rank)
    up = _copied((out, rank, *ones), own, "lora_up.weight")
    if "lora_mid.weight" not in own:
        delta = algebra.product(up, _copied((rank, into, *kernel), own, "lora_down.weight")).reshape(weight.shape)
    elif not _has_kernel(weight):
        raise Refused("AttributeError: a layer without a kernel has no lora_mid")
    else:
        down = _copied((rank, into, *ones), own, "lora_down.weight")
        mid = _copied((rank, rank, *kernel), own, "lora_mid.weight")
        delta = algebra.tucker(mid, up.flatten(1), down.flatten(1))
    return _decomposed(weight, scale * delta, own, strength), None


def _loha(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    _layer(weight)
    if "hada_w1_b" not in own:
        raise Refused("AttributeError: hada_w1_b is missing")
    rank = own["hada_w1_b"].shape[0]
    out, into, *kernel = weight.shape
    scale = _scale(own, rank)
    if "hada_t1" in own and not _has_kernel(weight):
        raise Refused("AttributeError: a layer without a kernel has no hada_t1")
    halves = []
    for half in ("1", "2"):
        if "hada_t1" in own:
            core = _copied((rank, rank, *kernel), own, f"hada_t{half}")
            factor_out = _copied((rank, out), own, f"hada_w{half}_a")
            halves.append(algebra.tucker(core, factor_out.mT, _copied((rank, into), own, f"hada_w{half}_b")))
        else:
            factor_out = _copied((out, rank), own, f"hada_w{half}_a")
            halves.append(factor_out @ _copied((rank, into * math.prod(kernel)), own, f"hada_w{half}_b"))
    delta = (halves[0] * halves[1]).reshape(weight.shape)
    return _decomposed(weight, scale * delta, own, strength), None


def _lokr(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    """Rebuilt from one rank and one factor for both sides, so much of what LoKr can be does not load (lokr.py:252)."""
    _layer(weight)
    out, into, *kernel = weight.shape
    w1, w2 = own.get("lokr_w1"), own.get("lokr_w2")
    full = "lokr_w1_a" not in own and "lokr_w2_a" not in own
    rank = 1 if full else own["lokr_w1_a" if "lokr_w1_a" in own else "lokr_w2_a"].shape[1]  # also of a Tucker w2_a
    factor = _factor(_outer_shape(own, "lokr_w1"), _outer_shape(own, "lokr_w2"))
    (a, b), (c, d) = factorization(out, factor), factorization(into, factor)
    is_tucker = "lokr_t2" in own and _has_kernel(weight)
    w1_factored = w1 is None and w2 is None and rank < max(a, c) / 2 and not full
    w2_factored = rank < max(b, d) / 2 and not full
    alpha = _alpha(own)
    scale = (alpha or rank) / rank if w1_factored or w2_factored else 1.0  # both full: alpha is ignored
    if (w1 is None) != w1_factored or (w2 is None) != w2_factored or ("lokr_t2" in own) != (is_tucker and w2_factored):
        raise Refused("AttributeError: the module made from these shapes has other factors than the file")
    if w1_factored:
        first = _copied((a, rank), own, "lokr_w1_a") @ _copied((rank, c), own, "lokr_w1_b")
    else:
        first = _copied((a, c), own, "lokr_w1")
    if not w2_factored:
        second = _copied((b, d, *kernel), own, "lokr_w2")
    elif is_tucker:
        core = _copied((rank, rank, *kernel), own, "lokr_t2")
        second = algebra.tucker(core, _copied((rank, b), own, "lokr_w2_a").mT, _copied((rank, d), own, "lokr_w2_b"))
    else:
        into_second = _copied((rank, d * math.prod(kernel)), own, "lokr_w2_b")
        second = (_copied((b, rank), own, "lokr_w2_a") @ into_second).reshape(b, d, *kernel)
    return _decomposed(weight, scale * algebra.kronecker(first, second), own, strength), None


def _outer_shape(own: Own, name: str) -> tuple[int, int]:
    """Rows and columns of a factor as make_module_from_state_dict reads them: a conv w2_b counts its kernel."""
    if name in own:
        return own[name].shape[0], own[name].shape[1]
    for half in (f"{name}_a", f"{name}_b"):
        if half not in own:
            raise Refused(f"AttributeError: {half} is missing")
    return own[f"{name}_a"].shape[0], own[f"{name}_b"].shape[1]


def _factor(first: tuple[int, int], second: tuple[int, int]) -> int:
    """The one factor the module is built with (lokr.py:287)."""
    out, into = first[0] * second[0], first[1] * second[1]
    if first == (factorization(out, -1)[0], factorization(into, -1)[0]):
        return -1
    for guess in (max(first), max(second)):
        if out % guess == into % guess == 0 and guess in (first[0], second[0]) and guess in (first[1], second[1]):
            return guess
    return min(max(first), max(second))


def factorization(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m·n = size, m ≤ n: the factor if it divides, else the most balanced m up to it (general.py:18)."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    m = max(m for m in range(1, limit + 1) if size % m == 0 and m * m <= size)
    return m, size // m


def _full(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, Tensor | None]:
    _layer(weight)
    bias = _copied((weight.shape[0],), own, "diff_b") if "diff_b" in own else None
    return strength * _copied(weight.shape, own, "diff"), None if bias is None else strength * bias


def _norm(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, Tensor | None]:
    if weight.ndim != 1:
        raise Refused("AttributeError: w_norm on a layer that is no norm")
    bias = _copied(weight.shape, own, "b_norm") if "b_norm" in own else None
    return strength * _copied(weight.shape, own, "w_norm"), None if bias is None else strength * bias


def _rescaled(merged: Tensor, weight: Tensor, own: Own) -> Tensor:
    if "rescale" in own:
        merged = _copied((len(weight), *[1] * (weight.ndim - 1)), own, "rescale") * merged
    return merged - weight


def _oft(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    """rescale∘(W + s(RᵀW − W)) − W: the rescale is not interpolated (diag_oft.py:147). alpha·o is the constraint."""
    _layer(weight)
    out, limit = weight.shape[0], _alpha(own) * weight.shape[0]
    size, count = factorization(out, own["oft_blocks"].shape[1])
    blocks = _copied((count, size, size), own, "oft_blocks")
    rotation = algebra.cayley(algebra.clamp_norm(algebra.skew(blocks), limit))
    merged = weight + strength * (algebra.rotate_rows(rotation, weight) - weight)
    return _rescaled(merged, weight, own), None


def _boft(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    """Each stage (1 − s)I + sB_j; the rescale is not interpolated."""
    _layer(weight)
    out, limit = weight.shape[0], _alpha(own) * weight.shape[0]
    size, count = _even_times_power(out, own["oft_blocks"].shape[2])
    stages = (count - 1).bit_count() + 1
    blocks = _copied((stages, count, size, size), own, "oft_blocks")
    rotation = algebra.cayley(algebra.clamp_norm(algebra.skew(blocks), limit))
    mixed = strength * rotation + (1 - strength) * torch.eye(size, dtype=weight.dtype)
    return _rescaled(algebra.butterfly(mixed, weight), weight, own), None


def _even_times_power(size: int, limit: int) -> tuple[int, int]:
    """(b, n) with b·n = size, b even, n a power of two, b the largest up to the limit (general.py:68)."""
    fitting = [b for b in range(2, limit + 1, 2) if size % b == 0 and (size // b).bit_count() == 1]
    if not fitting:
        raise Refused(f"ValueError: {size} cannot be decomposed with factor {limit} under BOFT constraints")
    return fitting[-1], size // fitting[-1]


def _glora(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    """W·a1·a2 + b1·b2, the first contracted over the inputs."""
    _layer(weight)
    if "a2.weight" not in own:
        raise Refused("AttributeError: a2 is missing")
    if "bm.weight" in own:  # use_tucker asks for a kernel that is 1 and is not 1 (glora.py:96)
        raise Refused("AttributeError: the module has no bm")
    rank = own["a2.weight"].shape[0]
    out, into, *kernel = weight.shape
    ones = [1] * len(kernel)
    a1, a2 = _copied((into, rank, *ones), own, "a1.weight"), _copied((rank, into, *ones), own, "a2.weight")
    b1, b2 = _copied((out, rank, *ones), own, "b1.weight"), _copied((rank, into, *kernel), own, "b2.weight")
    through = torch.einsum("oi...,ir,rj->oj...", weight, a1.flatten(1), a2.flatten(1))
    delta = through + algebra.product(b1, b2).reshape(weight.shape)
    return strength * _scale(own, rank) * delta, None


def _tlora(weight: Tensor, own: Own, strength: float) -> tuple[Tensor, None]:
    """P·λ·Q minus the same of the base's leading singular vectors, all ranks open (tlora.py:372)."""
    if weight.ndim != 2:
        raise NotImplementedError("T-LoRA of a convolution")
    if "q_layer.weight" not in own:
        raise Refused("AttributeError: q_layer is missing")
    rank = own["q_layer.weight"].shape[0]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if rank > len(values):
        raise NotImplementedError("T-LoRA of a rank above the layer's")
    out, into = weight.shape
    q, p = _copied((rank, into), own, "q_layer.weight"), _copied((out, rank), own, "p_layer.weight")
    current = (p * _copied((1, rank), own, "lambda_layer")) @ q
    base = (left[:, :rank] * values[:rank]) @ right[:rank]
    return strength * _scale(own, rank) * (current - base), None
