"""PEFT's types that multiply the weight: OFT, of its input, and (IA)³."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import require_file
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.peft_config import CONFIG, LARGE, flag
from peftkit.geometry import Shape

#: of OFT on a convolution with a larger kernel, where PEFT's forward and its merge are not the same
_MERGED = (
    "PEFT rotates patches of the input that overlap, which no change of the weight does; the file is read as "
    "merge_and_unload() of PEFT merges it, which is not the forward that PEFT trained"
)


def _oft(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """PEFT's rotation of the input, W·Rᵀ: by its series R(Q), or exactly by the inverse rotation R(−Q)."""
    vectors = _only(module, t, "oft_R")
    listed = f"oft_R of shape {tuple(vectors.shape)}"
    require_file(vectors.dim() == 2, module, f"{listed} is not read: (blocks, entries of a triangle) is")
    b = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    require_file(b * (b - 1) // 2 == vectors.shape[1], module, f"{listed} is no upper triangle of blocks")
    shared = "block_share=True repeats one block over a width the file does not say; it is not read"
    require_file(not flag(config, "block_share"), module, shared)
    if flag(config, "coft"):
        eps = config.get("eps", 6e-5)
        fits = type(eps) in (int, float) and 0 < eps < LARGE
        require_file(fits, CONFIG, f"eps is {eps!r:.40}, a positive number was expected")
        vectors = _projected(vectors, float(eps))
    series = "use_cayley_neumann" not in config or flag(config, "use_cayley_neumann")
    options: dict[str, Any] = {"block_size": b, "side": "in"}
    if series:
        vectors, options["terms"] = _series(vectors, config.get("num_cayley_neumann_terms", 5))
    words = f"1: {'Cayley–Neumann series' if series else 'Cayley transform, of the inverse rotation'}, on the input"
    skew = vectors if series else -vectors
    shape = Shape(0, vectors.shape[0] * b)
    return Patch("oft", options, shape, {"skew": skew}, False, scale=words, on_kernel=_MERGED)


def _series(vectors: Tensor, terms: Any) -> tuple[Tensor, int]:
    """Return what has PEFT's rotation by so many terms: its 2 are I + 2Q, and its 3 are the same as its 4."""
    fits = type(terms) is int and 2 <= terms <= 1000
    require_file(fits, CONFIG, f"num_cayley_neumann_terms is {terms!r:.40}, an integer from 2 to 1000 was expected")
    return (vectors * 2, 2) if terms == 2 else (vectors, max(terms, 4))


def _only(module: str, t: Mapping[str, Tensor], role: str) -> Tensor:
    """The one tensor that a module of this type has."""
    require_file(set(t) == {role}, module, f"{', '.join(sorted(t))} was found, {role} alone was expected")
    return t[role]


def _projected(vectors: Tensor, eps: float) -> Tensor:
    """Constrained OFT: blocks outside a ball are moved to its surface, as PEFT does at every forward."""
    bound = eps / math.sqrt(vectors.shape[0])
    norm = math.sqrt(2) * torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
    return torch.where(norm > bound, vectors * (bound / norm.clamp(min=bound)), vectors.double()).to(vectors.dtype)


def _ia3(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """ia3_l (rows, 1) multiplies the output, bias and all; (1, channels) the input."""
    del config
    gain = _only(module, t, "ia3_l")
    vector = gain.dim() == 2 and 1 in gain.shape
    require_file(vector, module, f"ia3_l of shape {tuple(gain.shape)} is not read: (rows, 1) or (1, channels) is")
    out = gain.shape[0] != 1
    shape = Shape(gain.numel(), 0) if out else Shape(0, gain.numel())
    reason = "PEFT's (IA)³ scales it too, and a change of the weight cannot" if out else ""
    options = {"side": "out" if out else "in"}
    gate = gain.flatten().float() - 1
    words, per = "1: IA3 has no alpha", not out
    return Patch("ia3", options, shape, {"gate": gate}, False, scale=words, bias=reason, per_channel=per)


#: type -> its reader
READERS: Mapping[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], Patch]] = MappingProxyType(
    {"OFT": _oft, "IA3": _ia3}
)
