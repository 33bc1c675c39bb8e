"""PEFT's types whose modules train numbers in common: VB-LoRA, with its bank, and TinyLoRA, with its vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.peft_config import number
from peftkit.files.formats.peft_methods import require_roles
from peftkit.geometry import Shape

_ROLES = {
    **{f"vblora_logits_{side}": f"logits_{role}" for side, role in (("B", "up"), ("A", "down"))},
    **{f"vblora_logits_{side}_topk_indices": f"indices_{role}" for side, role in (("B", "up"), ("A", "down"))},
    **{f"vblora_logits_{side}_topk_weights": f"weights_{role}" for side, role in (("B", "up"), ("A", "down"))},
    "vblora_vector_bank": "table_bank",
    "tinylora_B": "left",
    "tinylora_A": "right",
    "tinylora_P": "projections",
    "tinylora_v.0": "table_vector",
}
#: how keys end -> what the tensor is
ENDS: Mapping[str, str] = MappingProxyType(
    {f".{name}{adapter}": role for name, role in _ROLES.items() for adapter in ("", ".default")}
)
#: the tensors among them that are integers
NUMBERS = ("indices_up", "indices_down")
#: how far below the logits of a file that has the largest alone the others are put
_BELOW = 1.0


def require_one_vector(keys: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise FileError for a folder of TinyLoRA with several vectors: it does not say which module has which."""
    vectors = [key for key in keys if ".tinylora_v." in key]
    if config.get("peft_type") == "TINYLORA" and len(vectors) > 1:
        raise FileError(
            f"{len(vectors)} vectors of TinyLoRA are in it (weight_tying={config.get('weight_tying')!r}), and which "
            "module has which depends on the order of PEFT's model: load the folder with PEFT, and convert it to LoRA "
            "there"
        )


def _vb_lora(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """Logits of B (m/b, r, h) and of A (r, n/b, h) for a bank (h, b); or the largest alone, by their numbers."""
    bank, top = t.get("table_bank"), config.get("topk")
    require_file(bank is not None and bank.dim() == 2, module, "there is no vblora_vector_bank (h, b)")
    assert bank is not None
    vectors, length = bank.shape
    if not isinstance(top, int) or not 0 < top <= vectors:
        raise FileError(f"{module}: topk is {top!r:.40}, an integer from 1 to the {vectors} vectors was expected")
    if "indices_up" in t:
        require_roles(module, t, {"table_bank", *(f"{a}_{b}" for a in ("indices", "weights") for b in ("up", "down"))})
        up, down = (_logits(module, t[f"indices_{side}"], t[f"weights_{side}"], vectors) for side in ("up", "down"))
    else:
        require_roles(module, t, {"table_bank", "logits_up", "logits_down"})
        up, down = t["logits_up"], t["logits_down"]
    fits = up.dim() == down.dim() == 3 and up.shape[1] == len(down) and up.shape[2] == down.shape[2] == vectors
    sizes = f"logits of {tuple(up.shape)} and {tuple(down.shape)} for {vectors} vectors"
    require_file(fits, module, f"{sizes} are no (m/b, r, h) and (r, n/b, h)")
    bound = number(config.get("init_vector_bank_bound", 0.02), "init_vector_bank_bound", module)
    options = {"rank": len(down), "vectors": vectors, "length": length, "top": top, "bound": bound}
    # PEFT's ΔW has its start in it: none is taken off
    logits = {"up": up, "down": down}
    none = {f"chosen_{side}": torch.full((*t.shape[:2], top), -1, dtype=torch.int32) for side, t in logits.items()}
    tensors = {"bank": bank, "logits_up": up, "logits_down": down, **none}
    shape, words = Shape(len(up) * length, down.shape[1] * length), "1: VB-LoRA has no alpha"
    return Patch("vb-lora", options, shape, tensors, False, scale=words, common={"bank": "vblora_vector_bank"})


def _logits(module: str, indices: Tensor, weights: Tensor, vectors: int) -> Tensor:
    """Logits that mix the same: of the vectors by their numbers (…, k), under weights (…, k − 1) that add up to 1."""
    fits = indices.dim() == weights.dim() == 3 and indices.shape == (*weights.shape[:2], weights.shape[2] + 1)
    sizes = f"{tuple(indices.shape)} numbers of vectors with {tuple(weights.shape)} weights"
    require_file(fits, module, f"{sizes} are no (…, k) and (…, k − 1)")
    places = indices.long()
    inside = bool(((places >= 0) & (places < vectors)).all()) and bool((places.sort().values.diff() > 0).all())
    require_file(inside, module, f"topk_indices are not different numbers from 0 to {vectors - 1}")
    weights = weights.float()
    whole = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1)
    logits = whole.clamp(min=torch.finfo(torch.float32).tiny).log()
    lowest = logits.amin(-1, keepdim=True) - _BELOW
    return lowest.expand(*places.shape[:2], vectors).scatter(-1, places, logits)


def _tiny_lora(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """B·(Σ v_i·P_i)·A of tinylora_B (m, r), _P (u, r, r) and _A (r, n), as a LoRA of the same ΔW."""
    del config
    unsaved = (
        "tinylora_P is not in the file (save_projection is false), and PEFT draws it by the place of the module among "
        "all that it was put on: load the folder with PEFT, and save it with save_projection=True"
    )
    require_file("projections" in t, module, unsaved)
    require_roles(module, t, {"table_vector", "left", "right", "projections"})
    v, P, up, down = (t[role] for role in ("table_vector", "projections", "left", "right"))
    fits = v.dim() == 1 and up.dim() == down.dim() == 2 and P.shape == (len(v), up.shape[1], len(down))
    sizes = f"v {tuple(v.shape)}, P {tuple(P.shape)}, B {tuple(up.shape)} and A {tuple(down.shape)}"
    require_file(fits, module, f"{sizes} are no (u), (u, r, r), (m, r) and (r, n)")
    core = (v.double()[:, None, None] * P.double()).sum(0)
    tensors = {"up": (up.double() @ core).to(up.dtype), "down": down}
    options = {"rank": len(down), "alpha": float(len(down))}
    return Patch("lora", options, Shape(len(up), down.shape[1]), tensors, False, scale="1: TinyLoRA has no alpha")


#: type -> its reader
READERS: Mapping[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], Patch]] = MappingProxyType(
    {"VBLORA": _vb_lora, "TINYLORA": _tiny_lora}
)
