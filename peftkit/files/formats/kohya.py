"""Modules as kohya, LyCORIS, diffusers and PEFT write them: one prefix per weight, one suffix per tensor.

The grammar is shared: "<module>.lora_up.weight", "<module>.hada_w1_a", "<module>.alpha", … What differs between
programs is how they name modules (see `names`) and where the scale comes from, which the caller says.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats.oft_parts import OFT_PARTS
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.structures import LOHA_PARTS, LOKR_PARTS, READERS, Scale, decompose

#: how a key may end -> what the tensor is
SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        **{f"{way}.weight": "up" for way in (".lora_up", ".lora_B", "_lora.up", ".lora.up", ".lora_linear_layer.up")},
        **{
            f"{way}.weight": "down"
            for way in (".lora_down", ".lora_A", "_lora.down", ".lora.down", ".lora_linear_layer.down")
        },
        ".lora_B.default.weight": "up",
        ".lora_A.default.weight": "down",
        ".lora_B": "up",
        ".lora_A": "down",
        ".lora_B.bias": "up_bias",
        ".lora_B.default.bias": "up_bias",
        ".lora_mid.weight": "mid",
        ".alpha": "alpha",
        "_lora.alpha": "alpha",
        ".dora_scale": "dora_scale",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector.default.weight": "magnitude",
        **{f".hada_{part}": f"hada_{part}" for part in LOHA_PARTS},
        **{f".lokr_{part}": f"lokr_{part}" for part in LOKR_PARTS},
        ".oft_blocks": "oft_blocks",
        **{f".{part}": part for part in OFT_PARTS},
        ".rescale": "rescale",
        ".oft_R.weight": "oft_R",
        ".oft_R.default.weight": "oft_R",
        ".diff": "diff",
        ".diff_b": "diff_b",
        ".w_norm": "w_norm",
        ".b_norm": "b_norm",
        **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")},
        ".ia3_l": "ia3_l",
        ".on_input": "on_input",
    }
)

#: the tensors that all of a module's ΔW, or its change of a bias or a norm, is proportional to
PROPORTIONAL = frozenset(
    {"up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "a1", "b1", "ia3_weight"}
    | {"up_bias", "diff_b", "w_norm", "b_norm"}
)
#: the tensors beside which no other one scales ΔW
DISPROPORTIONATE = frozenset({"dora_scale", "magnitude", "oft_blocks", *OFT_PARTS, "oft_R", "ia3_l"})

#: the tensors that are no part of a matrix: changes of a bias or a norm, and α
VECTORS = frozenset({"diff_b", "up_bias", "w_norm", "b_norm"})
_BESIDE = VECTORS | {"alpha"}

Modules = dict[str, dict[str, str]]


def split(keys: Iterable[str]) -> tuple[Modules, list[str]]:
    """Sort the keys of a file as {module: {role: key}}, and return the keys that end in nothing known beside it."""
    modules: defaultdict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    for key in keys:
        divided = _divided(key)
        if divided is None:
            unknown.append(key)
            continue
        module, role = divided
        if role in modules[module]:
            raise FileError(
                f"{key} and {modules[module][role]} are both the {role} of {module}: one of them was expected"
            )
        modules[module][role] = key
    for key in list(unknown):  # (IA)³ of LyCORIS calls its vector "weight", known by its companion alone
        module = key.removesuffix(".weight")
        if module != key and "on_input" in modules.get(module, {}):
            modules[module]["ia3_weight"] = key
            unknown.remove(key)
    return dict(modules), unknown


_LONGEST_FIRST = tuple(sorted(SUFFIXES, key=len, reverse=True))
#: XLabs' trainer for Flux has two adapters on one attention, "processor.qkv_lora1" and "processor.qkv_lora2"
_XLABS = re.compile(r"(.+_lora[12])\.(up|down)\.weight")


def _divided(key: str) -> tuple[str, str] | None:
    """A key's module and what its tensor is, None if it ends in nothing known."""
    suffix = next((s for s in _LONGEST_FIRST if key.endswith(s) and len(key) > len(s)), None)
    if suffix is not None:
        return key.removesuffix(suffix), SUFFIXES[suffix]
    xlabs = _XLABS.fullmatch(key)
    return None if xlabs is None else (xlabs[1], xlabs[2])


def patch(module: str, t: Mapping[str, Tensor], scale: Scale, dora_axis: str | None = None) -> Patch | None:
    """Read one module's adapter.

    Args:
        module: its name, for errors.
        t: its tensors by role.
        scale: what gives the factor γ.
        dora_axis: the axis of magnitudes whose shape does not tell it, None where the user gave none.

    Returns:
        The adapter; None if all that changes are vectors (see `vectors`).

    Raises:
        FileError: if the tensors do not make one adapter.
        AmbiguousFileError: if they make two, or their scale can be two.
    """
    t = {role: tensor for role, tensor in t.items() if role not in _BESIDE}
    if not t or ("diff" in t and t["diff"].dim() == 1):
        return None
    decomposed = {role: t.pop(role) for role in ("dora_scale", "magnitude") if role in t}
    reader = next((reader for roles, reader in READERS if roles & set(t)), None)
    if reader is None:
        raise FileError(f"{module}: {', '.join(sorted(decomposed or t))} alone is no adapter: the file is incomplete")
    try:
        found = reader(module, t, scale)
    except (RuntimeError, IndexError) as error:  # shapes that do not go together
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in t.items())
        raise FileError(f"{module}: these tensors do not make one adapter: {shapes}") from error
    return decompose(module, found, decomposed, dora_axis) if decomposed else found


def vectors(module: str, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the changes of a module's bias and of a norm's weight, by "bias" and "weight"."""
    found: dict[str, Tensor] = {}
    for role, name in (("diff_b", "bias"), ("b_norm", "bias"), ("w_norm", "weight"), ("diff", "weight")):
        if role in t and (role != "diff" or t[role].dim() == 1):
            require_file(
                name not in found and t[role].dim() == 1,
                module,
                f"{role} of shape {tuple(t[role].shape)} is not the one change of its {name}",
            )
            found[name] = t[role]
    return found
