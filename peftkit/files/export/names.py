"""What the modules of an export are called in the file, and which sets of modules a program does not read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftkit.errors import ExportError, require_choice
from peftkit.files.entries import AdapterEntry
from peftkit.files.export.programs import Target
from peftkit.files.families import names
from peftkit.files.families.names import Family, ModuleSpec

#: what goes under one name of a file: adapters, each with the module of the family it is for, None where there is none
Members = list[tuple[ModuleSpec | None, AdapterEntry]]

#: what programs put before the path of a module, whatever the model
_PREFIXES = ("lycoris_", "lora_unet_", "lora_transformer_", "base_model.model.", "diffusion_model.")


def family_of(items: Sequence[AdapterEntry], asked: str | None, component: str | None) -> Family | None:
    """Return the family of the model that adapters are for.

    Args:
        items: the adapters.
        asked: the family's name where the user gave one.
        component: which part of a pipeline the adapters are for, None where their names say it.

    Returns:
        The family asked for, else one that has all the modules in their shapes, else None.

    Raises:
        OptionError: if there is no family of the name asked for.
    """
    if asked is not None:
        require_choice("family", asked, names.FAMILIES)
        return names.FAMILIES[asked]
    prefix = f"{component}." if component else ""
    shapes = {prefix + item.name: (item.shape.rows, item.shape.columns) for item in items}
    return next(iter(names.guess(shapes)), None)


def named_modules(
    items: Sequence[AdapterEntry], goal: Target, family: Family | None, component: str | None
) -> dict[str, Members]:
    """Name the modules of a file.

    Args:
        items: the adapters.
        goal: the program that reads the file.
        family: of the model, None where it is not known.
        component: which part of a pipeline the adapters are for, None where their names say it.

    Returns:
        By the name in the file: one adapter, or the adapters of the parts of a layer that is fused there.

    Raises:
        ExportError: if the program has no name for a module, or does not read such a set of modules.
    """
    found: dict[str, Members] = {}
    for item in items:
        name, module = (
            (_generic_name(item, None, goal), None) if family is None else _name(item, goal, family, component)
        )
        found.setdefault(name, []).append((module, item))
    modules = [module for members in found.values() for module, _ in members if module is not None]
    components = sorted({_component(module) for module in modules})
    if goal.any_model and len(components) > 1:
        raise ExportError(
            f"{goal.title} loads one model at a time and these are {', '.join(components)}: export each from its own "
            "model"
        )
    require_readable(modules, goal)
    _require_distinct(found)
    return found


def _require_distinct(found: dict[str, Members]) -> None:
    """Refuse several adapters of one name, unless these are the parts of a layer."""
    for name, members in found.items():
        if len(members) > 1 and any(module is None or module.start is None for module, _ in members):
            both = " and ".join(repr(item.name) for _, item in members)
            raise ExportError(f"{both} would both be called {name!r} in the file: rename one of the modules")


def _name(item: AdapterEntry, goal: Target, family: Family, component: str | None) -> tuple[str, ModuleSpec | None]:
    """The name of an adapter's module in the file, and the module; None where the adapter is of several."""
    matches = family.find(f"{component}.{item.name}" if component else item.name) or family.find(item.name)
    fused = _fused_name([module.name for module in matches], goal, family)
    if fused:  # the adapter is of the original network's layer, and so is the target's
        return fused, None
    if len(matches) > 1:
        raise ExportError(
            f"{item.name!r} is {len(matches)} layers of {goal.title} in one: save it, and export that file"
        )
    if not matches:
        raise ExportError(f"{item.name!r} is no module of {family.title}: pass family= or component=")
    (module,) = matches
    if not goal.t5 and ".encoder.block." in module.name:
        name = item.path or item.name
        raise ExportError(
            f"{name!r} is of T5, for which no pipeline of {goal.title} loads an adapter; leave it out, or export for "
            "comfyui"
        )
    if not goal.looks_for(module.name):
        raise ExportError(
            f"{item.name}: {goal.title} makes no adapter of this layer, and would ignore it; leave it out (save the "
            f"adapter, and export that file with ignore={item.name + '.*'!r}), or export for comfyui"
        )
    return (_generic_name(item, module, goal) if goal.any_model else _family_name(module, goal, family)), module


def _fused_name(members: Sequence[str], goal: Target, family: Family) -> str:
    """The one name a target has for several layers, "" where it has one for each."""
    style = _style(goal, family)
    if len(members) < 2 or style != "kohya":
        return ""
    spelled = {family.spell(name, style) for name in members}
    return spelled.pop() if len(spelled) == 1 else ""


def _family_name(module: ModuleSpec, goal: Target, family: Family) -> str:
    """The name of a module of a known family."""
    style = _style(goal, family)
    if style is None:
        raise ExportError(
            f"{goal.title} does not load adapters of {family.title} under any name this library writes; export "
            "for comfyui or diffusers"
        )
    return family.spell(module.name, style)


def _style(goal: Target, family: Family) -> str | None:
    return goal.transformer_style if "transformer" in family.components else goal.style


def _generic_name(item: AdapterEntry, module: ModuleSpec | None, goal: Target) -> str:
    """The name of a module by its path, for programs that load adapters of any model."""
    if module is not None:
        path = item.path.removeprefix(f"{_component(module)}.") or module.path
        return (goal.generic or "") + (path.replace(".", "_") if goal.flat else path)
    path = item.path or _bare(item.name, goal)
    if item.sliced:
        raise ExportError(
            f"{path!r} is rows of a parameter and no module of its own, so {goal.title} has no name for it; keep it in "
            "this library's own format, or merge it"
        )
    if not path and not goal.roots:
        raise ExportError(
            f"{goal.title} adapts modules inside a model, and this one is the whole of it; export for lycoris, or "
            "merge it"
        )
    if goal.generic is None:
        raise ExportError(
            f"{goal.title} loads adapters of the models it knows, and {path!r} is of none known here; pass "
            "family= if it is, or export for lycoris, peft or comfyui"
        )
    return goal.generic + (path.replace(".", "_") if goal.flat else path)


def _bare(name: str, goal: Target) -> str:
    """A module's name without what a program put before its path."""
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    path = name.removeprefix(prefix)
    if prefix.endswith("_") and "_" in path and not goal.flat:
        raise ExportError(f"{name!r} does not say where its dots were, which {goal.title} needs: give the base")
    return path


def _component(module: ModuleSpec) -> str:
    return module.name.partition(".")[0]


# -- sets of modules that a program does not read ----------------------------------------------------------------------


def require_readable(modules: Sequence[ModuleSpec], goal: Target, named: str = "diffusers") -> None:
    """Refuse modules that a program does not read, or does not read without others.

    Args:
        modules: the modules of a file.
        goal: the program.
        named: the format of the file.

    Raises:
        ExportError: if the program ignores one of the modules, or fails on the file.
    """
    encoders: dict[str, list[str]] = {}
    for module in modules:
        if module.name.startswith("text_encoder"):
            encoders.setdefault(_component(module), []).append(module.path)
    if not goal.text_projection:
        _refuse_projections(encoders, goal)
    mark = goal.encoder_marks.get(named, goal.encoder_marks.get("", ""))
    for component, paths in encoders.items():
        if not any(mark in path for path in paths):
            raise ExportError(
                f"{component}: {goal.title} does not recognise a text encoder's adapter without attention layers; give "
                "one of them an adapter, or export for comfyui"
            )
    if goal.whole_attentions:
        _require_whole_attentions(modules, goal)


def _refuse_projections(encoders: dict[str, list[str]], goal: Target) -> None:
    for component, paths in encoders.items():
        if "text_projection" in paths:
            name = f"{component}.text_projection"
            raise ExportError(
                f"{name}: {goal.title} does not read an adapter of the text projection; leave it out, or export for "
                "comfyui"
            )


def _require_whole_attentions(modules: Iterable[ModuleSpec], goal: Target) -> None:
    """Refuse an OpenCLIP attention of which not all of q, k, v and the output are in the file."""
    own = {module.name for module in modules}
    for module in modules:
        parent = module.name.rpartition(".")[0]
        open_clip = module.original.endswith("in_proj_weight") or ".attn.out_proj." in module.original
        missing = [p for p in ("q_proj", "k_proj", "v_proj", "out_proj") if open_clip and f"{parent}.{p}" not in own]
        if missing:
            raise ExportError(
                f"{module.name}: {goal.title} applies {parent} only with all of its projections, and {missing[0]} has "
                "no adapter; give it one, or export for another program"
            )
