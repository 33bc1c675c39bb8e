"""Modules as kohya, LyCORIS, diffusers and PEFT write them: one prefix per weight, one suffix per tensor.

The grammar is shared: "<module>.lora_up.weight", "<module>.hada_w1_a", "<module>.alpha", … What differs between
programs is how they name modules (see `names`) and where the scale comes from, which the caller says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from peftkit.errors import AmbiguousFileError, FileError, require_file
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
    {"up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "w_norm", "b_norm", "a1", "b1", "ia3_weight"}
)
#: the tensors beside which no other one scales ΔW
DISPROPORTIONATE = frozenset({"dora_scale", "magnitude", "oft_blocks", "oft_R", "ia3_l"})

Modules = dict[str, dict[str, str]]


def split(keys: Iterable[str]) -> tuple[Modules, list[str]]:
    """Sort the keys of a file as {module: {role: key}}, and return the keys that end in nothing known beside it."""
    modules: defaultdict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    for key in keys:
        suffix = next((s for s in _LONGEST_FIRST if key.endswith(s) and len(key) > len(s)), None)
        if suffix is None:
            unknown.append(key)
            continue
        module, role = key.removesuffix(suffix), SUFFIXES[suffix]
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
        AmbiguousFileError: if they make two.
    """
    t = {role: tensor for role, tensor in t.items() if role not in ("alpha", "diff_b", "w_norm", "b_norm")}
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


def alpha_scale(alphas: Mapping[str, float], zero: str | None) -> Scale:
    """Return the scale γ = α/r by alpha tensors, 1 for modules without one.

    zero: what α = 0 means, "off" or "rank"; with None such a module raises AmbiguousFileError.
    """

    def scale(module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        alpha = alphas.get(module)
        if rank is None:
            return {}, "1: no factor has a rank"
        if alpha is None:
            return {"alpha": None}, "1: there is no alpha"
        if alpha == 0 and zero is None:
            raise AmbiguousFileError(
                f"{module}: alpha is 0, which A1111, ComfyUI, Forge and diffusers read as 'off' and kohya and LyCORIS "
                "as 'the rank': say which by alpha_zero='off' or alpha_zero='rank'"
            )
        if alpha == 0 and zero == "rank":
            return {"alpha": None}, "1: alpha is 0, read as the rank"
        return {"alpha": alpha}, f"{alpha / rank:.4g}: alpha {alpha:g} / rank {rank}"

    return scale
