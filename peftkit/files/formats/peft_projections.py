"""PEFT's types with tables that all modules share: VeRA and RandLoRA. Every module takes the first rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from peftkit.errors import require_file
from peftkit.files.formats.kohya import Modules
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.peft_config import number
from peftkit.files.formats.peft_methods import require_roles
from peftkit.geometry import Shape

#: type -> {what a table is: PEFT's name of it}
TABLES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "VERA": {"table_up": "vera_B", "table_down": "vera_A"},
        "RANDLORA": {"table_up": "randlora_B", "table_down": "randlora_A"},
    }
)
#: the tensors, of these types and of the others that are PEFT's alone, to which ΔW is proportional
PROPORTIONAL = frozenset({"lambda_b", "lambdas", "spectrum", "block"})
#: where the tables of all modules are
SHARED = "base_model"
#: how keys end -> what the tensor is
ENDS: Mapping[str, str] = MappingProxyType(
    {
        f".{name}{adapter}": role
        for name, role in (
            ("vera_lambda_b", "lambda_b"),
            ("vera_lambda_d", "lambda_d"),
            ("randlora_lambda", "lambdas"),
            ("randlora_gamma", "gammas"),
            *((name, role) for names in TABLES.values() for role, name in names.items()),
        )
        for adapter in ("", ".default")
    }
)


def tables(modules: Modules) -> tuple[Modules, dict[str, str]]:
    """Take what all modules share out of the modules of a folder: {role: key}. PEFT gives RandLoRA's to each too."""
    roles = modules.get(SHARED, {})
    if not roles or not all(role.startswith("table_") for role in roles):
        return modules, {}
    return {path: own for path, own in modules.items() if path != SHARED}, roles


def _vera(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """Vectors b (m,) and d (r,), of vera_B (rows, r) and vera_A (r, columns)."""
    up, down = _tables(module, t, config, {"lambda_b", "lambda_d"})
    b, d = t["lambda_b"], t["lambda_d"]
    fits = b.dim() == d.dim() == 1 and up.dim() == down.dim() == 2 and up.shape[1] == len(d) == len(down) > 0
    sizes = f"vectors of {tuple(b.shape)} and {tuple(d.shape)}, tables of {tuple(up.shape)} and {tuple(down.shape)}"
    require_file(fits, module, f"{sizes} are no b (m), d (r), vera_B (m, r) and vera_A (r, n)")

    def sized(shape: Shape) -> dict[str, Tensor]:
        return {"left": up[: shape.rows].clone(), "right": down[:, : shape.columns].clone()}

    options, tensors = {"rank": len(d), "save_projection": True}, {"lambda_b": b, "lambda_d": d}
    return Patch("vera", options, Shape(len(b), 0), tensors, False, scale="1: VeRA has no alpha", sized=sized)


def _randlora(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """Scales Λ (r, N) and Γ (N, k), of randlora_B (rows, bases, r) and randlora_A (r, 1, k), paired as by PEFT."""
    up, down = _tables(module, t, config, {"lambdas", "gammas"})
    lambdas, gammas = t["lambdas"], t["gammas"]
    right = lambdas.dim() == gammas.dim() == 2 and up.dim() == down.dim() == 3 and down.shape[1] == 1
    scales = f"scales of {tuple(lambdas.shape)} and {tuple(gammas.shape)}"
    sizes = f"{scales}, tables of {tuple(up.shape)} and {tuple(down.shape)}"
    fits = right and lambdas.shape == (len(down), len(gammas)) and up.shape[2] == len(down) > 0
    require_file(fits, module, f"{sizes} are no Λ (r, N), Γ (N, k), randlora_B (m, N, r) and randlora_A (r, 1, k)")
    (rank, count), short = lambdas.shape, gammas.shape[1]
    alpha = number(config.get("randlora_alpha"), "randlora_alpha", module)

    def sized(shape: Shape) -> dict[str, Tensor]:
        bases = up[: max(shape.rows, shape.columns), :count]
        return {"bases": bases.flatten(1).clone(), "basis": down[:, 0, :short].clone()}

    options = {"rank": rank, "alpha": alpha, "pairing": "peft", "save_projection": True}
    tensors = {"lambdas": lambdas.mT, "gammas": gammas}
    words = f"{alpha / rank:.4g}: alpha {alpha:g} / {rank} by the configuration"
    return Patch("randlora", options, Shape(0, 0), tensors, False, scale=words, sized=sized, least=(short, short))


def _tables(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any], own: set[str]) -> tuple[Tensor, Tensor]:
    """The tables, of which PEFT's configuration says neither the sizes nor the numbers."""
    names = TABLES[config["peft_type"]]
    missing = [name for role, name in names.items() if role not in t]
    remedy = (
        f"{' and '.join(missing)} are not in the file (save_projection is false), and how PEFT draws them depends on "
        "the sizes of all layers it was put on; load the folder with PEFT, and save it with save_projection=True"
    )
    require_file(not missing, module, remedy)
    require_roles(module, t, {*own, *names})
    return t["table_up"], t["table_down"]


#: type -> its reader
READERS: Mapping[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], Patch]] = MappingProxyType(
    {"VERA": _vera, "RANDLORA": _randlora}
)
