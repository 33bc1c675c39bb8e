"""PEFT's types with tensors of their own for every module: AdaLoRA, MiSS and FourierFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from peftkit.adapters.fourierft import places
from peftkit.errors import require_file
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.peft_config import number
from peftkit.geometry import Shape

#: how keys end -> what the tensor is
ENDS: Mapping[str, str] = MappingProxyType(
    {
        f".{name}{adapter}": role
        for name, role in (("lora_E", "gate"), ("miss_block", "block"), ("fourierft_spectrum", "spectrum"))
        for adapter in ("", ".default")
    }
)
#: PEFT's init_weights of MiSS -> what D is
_MODES = {"mini": "mini", "bat": "bat"}


def _adalora(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """lora_B·diag(lora_E)·lora_A under α/init_r, whatever ranks are left."""
    require_roles(module, t, {"up", "gate", "down"})
    up, gate, down = (t[role] for role in ("up", "gate", "down"))
    rank = gate.shape[0]
    fits = up.dim() == down.dim() == gate.dim() == 2 and gate.shape[1] == 1 and up.shape[1] == down.shape[0] == rank > 0
    sizes = ", ".join(f"{role} {tuple(t[role].shape)}" for role in ("up", "gate", "down"))
    require_file(fits, module, f"{sizes} are no B (m, r), E (r, 1) and A (r, n)")
    alpha, first = (number(config.get(name), name, module) for name in ("lora_alpha", "init_r"))
    require_file(first > 0, module, f"init_r is {first:g}, a number above 0 was expected")
    gamma = alpha / (first + 1e-5)  # so PEFT divides
    tensors = {"up": up, "gate": gate.flatten(), "down": down}
    options = {"rank": rank, "alpha": gamma * rank}
    words = f"{gamma:.4g}: alpha {alpha:g} / {first} by the configuration"
    return Patch("svdlora", options, Shape(up.shape[0], down.shape[1]), tensors, False, scale=words)


def _miss(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """miss_block, D, of the mode that init_weights names."""
    require_roles(module, t, {"block"})
    block = t["block"]
    mode = _MODES.get(str(config.get("init_weights")), "plain")
    fits = block.dim() == (3 if mode == "bat" else 2) and block.numel() > 0
    require_file(fits, module, f"miss_block of shape {tuple(block.shape)} is none of init_weights={mode!r}")
    if mode == "bat":
        square = block.shape[1] == block.shape[2]
        require_file(square, module, f"miss_block of shape {tuple(block.shape)} has blocks that are not square")
        options: dict[str, Any] = {"rank": block.shape[1], "bat": True}
        shape = Shape(block.shape[0] * block.shape[1], 0)
    elif mode == "mini":
        options, shape = {"rank": block.shape[0], "mini": block.shape[1]}, Shape(0, 0)
    else:
        options, shape = {"rank": block.shape[0]}, Shape(block.shape[1], 0)
    return Patch("miss", options, shape, {"block": block}, False, scale="1: MiSS has no alpha")


def _fourierft(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """fourierft_spectrum, at the places that random_loc_seed draws of the weight's m·n."""
    require_roles(module, t, {"spectrum"})
    spectrum, seed = t["spectrum"], config.get("random_loc_seed", 777)
    require_file(
        spectrum.dim() == 1 and len(spectrum) > 0, module, f"{tuple(spectrum.shape)} is no list of frequencies"
    )
    sound = type(seed) is int and abs(seed) < 2**63
    require_file(sound, module, f"random_loc_seed is {seed!r:.40}, an integer was expected")
    scaling, count = number(config.get("scaling", 150.0), "scaling", module), len(spectrum)
    options = {"frequencies": count, "scaling": scaling, "seed": seed}
    words = f"{scaling:g}: scaling by the configuration"

    def sized(shape: Shape) -> dict[str, Tensor]:
        return {"indices": places(shape.rows, shape.columns, count, seed).clone()}

    return Patch("fourierft", options, Shape(0, 0), dict(t), False, scale=words, sized=sized, least=(1, count))


def require_roles(module: str, t: Mapping[str, Tensor], roles: set[str]) -> None:
    """Raise FileError unless a module has these tensors, and no others."""
    said = f"{', '.join(sorted(t))} was found, {', '.join(sorted(roles))} was expected"
    require_file(set(t) == roles, module, said)


#: type -> its reader
READERS: Mapping[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], Patch]] = MappingProxyType(
    {"ADALORA": _adalora, "MISS": _miss, "FOURIERFT": _fourierft}
)
