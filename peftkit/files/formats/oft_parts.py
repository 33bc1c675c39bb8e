"""OFT of sd-scripts for Flux, which has the blocks of a layer as a list: one entry for each part of a fused layer."""

from __future__ import annotations

from collections.abc import Mapping

from peftkit.errors import require_file
from peftkit.files.families.names import FAMILIES

#: the entries of a list, of which linear1 of a single block has the most: q, k, v and the MLP
OFT_PARTS = tuple(f"oft_blocks.{i}" for i in range(4))


def apart(modules: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return the modules of a file with one for each part of a layer, as {module: {role: key}}.

    A layer with one entry keeps its name; the parts of a fused one get those of diffusers' modules, and each has the
    alpha of the layer, which bounds every part by its own rows.

    Raises:
        FileError: entries of a layer that is not fused so, or with other tensors beside them.
    """
    found: dict[str, dict[str, str]] = {}
    for module, roles in modules.items():
        keys = [roles[part] for part in OFT_PARTS if part in roles]
        if not keys:
            found[module] = roles
            continue
        beside = {role: key for role, key in roles.items() if role == "alpha"}
        whole = len(keys) + len(beside) == len(roles) and OFT_PARTS[len(keys) - 1] in roles
        require_file(whole, module, f"{', '.join(sorted(roles))} are not the blocks of one OFT")
        parts = [module] if len(keys) == 1 else [part.name for part in FAMILIES["flux"].find(module)]
        require_file(
            len(parts) == len(keys), module, f"it has blocks of {len(keys)} parts, and is no such layer of Flux"
        )
        for part, key in zip(parts, keys, strict=True):
            require_file((part not in found and part not in modules) or part == module, part, "it is there twice")
            found[part] = {"oft_blocks": key, **beside}
    return found


def are_in(modules: Mapping[str, Mapping[str, str]], module: str) -> bool:
    """Whether a module's blocks are entries of a list, as sd-scripts alone writes them."""
    return any(key.endswith(OFT_PARTS) for key in modules[module].values())
