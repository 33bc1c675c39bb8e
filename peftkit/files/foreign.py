"""Read files of kohya, LyCORIS, diffusers and the WebUIs: a module for each prefix, its scale where it is said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.adapters.options import rank_scale
from peftkit.errors import AmbiguousFileError, FileError, FullCheckpointError, MismatchError, require_file
from peftkit.files.formats import kohya, oft_parts, peft, peft_config
from peftkit.files.formats.alphas import AlphaOptions, AlphaScale, unsaid
from peftkit.files.formats.kohya import Modules
from peftkit.files.formats.patch import AdapterFile, OnDemand, Patch
from peftkit.files.formats.state_dict import adapters_in
from peftkit.files.formats.structures import Scale
from peftkit.files.source import Source

#: the entry in which diffusers keeps PEFT's configurations, by component
_DIFFUSERS = "lora_adapter_metadata"


def read_foreign(source: Source, dora_axis: str | None, alpha: AlphaOptions) -> AdapterFile:
    """Read every module of a file. alpha: what the user says of α."""
    modules, unknown = kohya.split(source.keys)
    refuse_unknown(source, unknown)
    dotted = any("." in module for module in modules)
    modules = oft_parts.apart(modules)
    alphas = {module: source.number(roles["alpha"]) for module, roles in modules.items() if "alpha" in roles}
    configs = _diffusers_configs(source, modules)
    if configs and alphas:
        raise AmbiguousFileError(
            f"{source.path} says its scales twice, in alpha tensors and in {_DIFFUSERS!r}: ignore='*alpha' reads the "
            "latter"
        )
    _require_scale(source, alphas, unsaid(modules, configs), alpha)
    by_alpha = AlphaScale(alphas, alpha, source.metadata)
    scales = {component: peft_config.scale_of(config) for component, config in configs.items()}

    def scale(module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        component, _, rest = module.partition(".")
        return scales[component](rest, rank) if component in scales else by_alpha(module, rank)

    def tensors(module: str) -> dict[str, Tensor]:
        found = source.factors(modules[module], beside=("alpha", "on_input"))
        _require_upright(module, modules[module], found)
        return found

    def patch(module: str) -> Patch:
        if "oft_blocks" in modules[module]:
            off = alphas.get(module) == 0 and oft_parts.are_in(modules, module)
            require_file(not off, module, "its alpha is 0, which bounds a rotation to none in sd-scripts")
            bound = _constraint(source.path, module, alphas.get(module))
            return _require_patch(module, kohya.patch(module, tensors(module), bound, dora_axis))
        return _require_patch(module, kohya.patch(module, tensors(module), scale, dora_axis))

    with_vectors = [m for m, roles in modules.items() if kohya.VECTORS & set(roles) or "diff" in roles]
    vectors = {f"{m}.{what}": v for m in with_vectors for what, v in kohya.vectors(m, tensors(m)).items()}
    vectors |= {f"{m}.bias": _shift(m, patch(m), tensors(m)) for m in with_vectors if "up_bias" in modules[m]}
    matrices = [
        module
        for module, roles in modules.items()
        if set(roles) - kohya.VECTORS - {"alpha"} and not ("diff" in roles and f"{module}.weight" in vectors)
    ]
    claimed = {*matrices, *with_vectors}
    lonely = [module for module in modules if module not in claimed]
    if lonely:
        raise FileError(f"{source.path}: {lonely[0]} has an alpha and nothing it is the alpha of")
    return AdapterFile(
        "diffusers" if dotted else "kohya",
        OnDemand(source.path, matrices, patch),
        vectors=vectors,
        metadata=source.metadata,
        size=source.size,
        roles={module: frozenset(roles) for module, roles in modules.items()},
        alphas=alphas,
    )


def refuse_unknown(source: Source, unknown: Sequence[str]) -> None:
    """Raise for keys that are no adapter's."""
    path, held = source.path, adapters_in(unknown)
    if held:
        raise FullCheckpointError(
            f"{path} is a full checkpoint: {len(source.keys)} tensors of a whole model, with the adapters "
            f"{', '.join(held)} among them, whose kinds and options it does not say. Wrap a model as that one was and "
            "load(model, …) takes an adapter out of it; save(model, …) then writes the adapter alone"
        )
    if unknown and len(unknown) == len(source.keys) and any(key.endswith(".weight") for key in unknown):
        raise MismatchError(
            f"{path} looks like a checkpoint: all its {len(unknown)} tensors are a model's, as {unknown[0]}, and none "
            "is an adapter's; give it as the base, or name an adapter file"
        )
    if unknown:
        listed = "\n".join(f"  {key}" for key in unknown[:8]) + ("\n  …" if len(unknown) > 8 else "")
        what = f"{path} holds {len(unknown)} tensors that are no adapter's"
        raise MismatchError(f"{what}; pass ignore= with patterns to leave them out, and what they trained:\n{listed}")


# -- parts ----------------------------------------------------------------------------------------------------------


def _require_scale(source: Source, alphas: Mapping[str, float], missing: Sequence[str], alpha: AlphaOptions) -> None:
    """Refuse a file that PEFT wrote without its configuration, unless the user says α. missing: modules without one."""
    alpha.used |= bool(missing)
    if missing and not alphas and alpha.unsaid is None and any(peft.PREFIX in module for module in missing):
        raise AmbiguousFileError(
            f"{source.path} is PEFT's, whose scale is in {peft.CONFIG}: put that file beside it as {peft.WEIGHTS} and "
            "name the folder, or say the scale: alpha='rank' for 1, as diffusers and ComfyUI read it, or the number "
            "that was lora_alpha in training"
        )


def _shift(module: str, patch: Patch, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a bias of lora_B adds to its layer's: the scale is before it as before B·A."""
    require_file("rank" in patch.options and "diff_b" not in tensors, module, "a bias of lora_B is not its one change")
    return scaled_bias(patch, tensors["up_bias"])


def scaled_bias(patch: Patch, bias: Tensor) -> Tensor:
    """Return γ times a bias of lora_B."""
    options = patch.options
    return bias * rank_scale("lora", options["rank"], options.get("alpha"), bool(options.get("rslora")))


def _require_upright(module: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse factors that lie as (in, rank) and (rank, out), as MLX has them, under the names of PEFT's."""
    if not (keys.get("down", "").endswith(".lora_A") and keys.get("up", "").endswith(".lora_B")):
        return
    A, B = tensors["down"].shape, tensors["up"].shape
    upright, transposed = A[0] == B[-1], A[-1] == B[0]
    if len(A) == len(B) == 2 and transposed and not (upright and A[0] <= A[1]):
        raise FileError(
            f"{module}: lora_A {tuple(A)} and lora_B {tuple(B)} are (in, rank) and (rank, out), as MLX has them, and "
            "(rank, in) and (out, rank) were expected: write the file with every matrix transposed, "
            "save_file({key: t.mT.contiguous() if t.dim() == 2 else t for key, t in load_file(path).items()}, out)"
        )


def _constraint(path: Path, module: str, alpha: float | None) -> Scale:
    """OFT's alpha is the bound on ‖Q‖ as a share of the rows, and no scale."""
    if alpha is not None and alpha < 0:
        raise FileError(f"{path}: {module} has the constraint {alpha:g}, a number from 0 was expected")

    def scale(name: str, rank: int | None) -> tuple[dict[str, Any], str]:
        del name, rank
        return ({"constraint": alpha}, f"1: constraint {alpha:g}") if alpha else ({}, "1: no constraint")

    return scale


def _require_patch(module: str, found: Patch | None) -> Patch:
    if found is None:
        raise FileError(f"{module}: there is no matrix in it")
    return found


def _diffusers_configs(source: Source, modules: Modules) -> dict[str, dict[str, Any]]:
    """diffusers' metadata -> {component: PEFT's configuration}."""
    if _DIFFUSERS not in source.metadata:
        return {}
    try:
        entries = json.loads(source.metadata[_DIFFUSERS])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source.path}: its {_DIFFUSERS!r} entry is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise FileError(f"{source.path}: its {_DIFFUSERS!r} entry is damaged: it is no JSON object")
    components = {module.partition(".")[0] for module in modules}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, _, option = str(key).partition(".")
        if component in components and option:
            configs.setdefault(component, {})[option] = value
    return configs
