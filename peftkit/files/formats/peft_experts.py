"""PEFT's `target_parameters`: a LoRA of a stack of experts, whose tensors hold the ranks of all experts side by side.

lora_A is (E·r, in), expert after expert; lora_B is (out, r·E), rank after rank. A second parameter of the same module
is a level further in: `experts.lora_A` is of one, `experts.base_layer.lora_A` of the one that the class declares
before it. PEFT takes a stack for (E, out, in) unless its module says `is_transposed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats.kohya import Modules
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.structures import Scale
from peftkit.geometry import Shape

_LEVEL = ".base_layer"
#: the parameters of modules of experts, in the order in which classes of transformers declare them
_ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


def named(modules: Modules, config: Mapping[str, Any]) -> tuple[Modules, frozenset[str]]:
    """Give the modules of a folder that are parameters the names of these.

    Args:
        modules: {path in the file: {role: key}}.
        config: PEFT's configuration.

    Returns:
        The same by path in the model, and the paths that are parameters.

    Raises:
        FileError: the configuration does not say which tensors are of which parameter.
    """
    given = config.get("target_parameters") or []
    sound = isinstance(given, list) and all(isinstance(name, str) and name for name in given)
    require_file(sound, "adapter_config.json", f"target_parameters is {given!r:.60}, a list of names was expected")
    if not given:
        return modules, frozenset()
    levels: dict[str, list[str]] = {}
    for path in modules:
        levels.setdefault(_bare(path), []).append(path)
    found: Modules = {}
    own: set[str] = set()
    for module, paths in levels.items():
        names = ordered({name for name in map(_split, given) if name is not None and _is_of(module, name[0])})
        if not names:
            found |= {path: modules[path] for path in paths}
            continue
        inner = sorted(paths, key=len, reverse=True)
        require_file(len(inner) == len(names), module, f"{len(inner)} of {', '.join(names)} are in the file")
        for path, name in zip(inner, names, strict=True):
            parameter = module if name == "weight" else f"{module}.{name}"
            found[parameter] = modules[path]
            own.add(parameter)
    return found, frozenset(own)


def _bare(path: str) -> str:
    """The path of the module of the model."""
    while path.endswith(_LEVEL):
        path = path.removesuffix(_LEVEL)
    return path


def _split(target: str) -> tuple[str, str]:
    module, _, name = target.rpartition(".")
    return module, name


def _is_of(module: str, target: str) -> bool:
    """Whether the module of a target, the end of a path, is this one."""
    return not target or module == target or module.endswith(f".{target}")


def ordered(targets: Iterable[tuple[str, str]]) -> list[str]:
    """Return the parameters of one module in the order in which its class declares them, the innermost first."""
    names = sorted({name for _, name in targets})
    unknown = [name for name in names if name not in _ORDER]
    if len(names) > 1 and unknown:
        raise FileError(
            f"{', '.join(names)} of one module are adapted, and the file does not say which tensors are whose: their "
            f"order is known of {', '.join(_ORDER)}. Give a file for each parameter"
        )
    return sorted(names, key=_ORDER.index) if len(names) > 1 else names


def patch(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any], scale: Scale) -> Patch:
    """Read the adapter of one stack of experts, or of one matrix.

    Args:
        module: the path of the parameter.
        t: its tensors by role.
        config: PEFT's configuration.
        scale: `scale_of` the configuration.
    """
    del config
    alone = set(t) == {"up", "down"} and t["up"].dim() == t["down"].dim() == 2
    require_file(alone, module, f"{', '.join(sorted(t))} is not what PEFT has of a parameter: lora_A and lora_B are")
    options, words = scale(module, None)
    rank, total = options["rank"], t["down"].shape[0]
    whole = total % rank == 0 and t["up"].shape[1] == total
    require_file(whole, module, f"its tensors hold {total} and {t['up'].shape[1]} ranks, a multiple of {rank} expected")
    experts, (rows, columns) = total // rank, (t["up"].shape[0], t["down"].shape[1])
    if experts == 1:
        return Patch("lora", options, Shape(rows, columns), dict(t), kernel_known=False, scale=words)
    up = t["up"].unflatten(1, (rank, experts)).permute(2, 0, 1)
    tensors = {"up": up, "down": t["down"].unflatten(0, (experts, rank))}
    return Patch("lora", options, Shape(experts * rows, columns, groups=experts), tensors, scale=words)


# -- writing ---------------------------------------------------------------------------------------------------------


def keys(parameters: Sequence[str]) -> dict[str, str]:
    """Return what PEFT calls the modules of these parameters in a file, by the path of the parameter."""
    by_module: dict[str, list[tuple[str, str]]] = {}
    for path in parameters:
        module, name = _split(path)
        by_module.setdefault(module, []).append((module, name))
    found: dict[str, str] = {}
    for module, names in by_module.items():
        inner = ordered(names)
        found |= {f"{module}.{name}": module + _LEVEL * (len(inner) - 1 - i) for i, name in enumerate(inner)}
    return found
