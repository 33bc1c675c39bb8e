"""What the modules of an export are called in the file, and which sets of modules a program does not read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import product

from peftkit.errors import ExportError, require_choice
from peftkit.files.entries import AdapterEntry
from peftkit.files.export.programs import Target
from peftkit.files.families import names
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec
from peftkit.files.resolve import prefix_of

#: what goes under one name of a file: adapters, each with the module of the family it is for, None where there is none
Members = list[tuple[ModuleSpec | None, AdapterEntry]]

#: what `family` says of a model whose own paths are those of the program
OWN = "own"
#: what comes before the path of a module in the checkpoints that ComfyUI loads, by whose paths it names modules
_CHECKPOINT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")


def family_of(
    items: Sequence[AdapterEntry], known: Sequence[Family], asked: str | None, component: str | None, goal: Target
) -> Family | None:
    """Return the family of the model that adapters are for, with the style of the names to write.

    Args:
        items: the adapters.
        known: the family of the model or the base, () where that is not known.
        asked: the family's name where the user gave one, "own" for a model whose own paths the program reads.
        component: which part of a pipeline the adapters are for, None where their names say it.
        goal: the program.

    Returns:
        The family asked for, else that of the base, else one that has all the modules in their shapes, else None.

    Raises:
        OptionError: if there is no family of the name asked for.
        ExportError: if the modules are of several families, which the program knows by different names.
    """
    if asked is not None:
        require_choice("family", asked, (*names.FAMILIES, OWN) if goal.generic is not None else names.FAMILIES)
        return names.FAMILIES.get(asked)
    prefix = f"{component}." if component else ""
    shapes = {prefix + item.name: (item.shape.rows, item.shape.columns) for item in items}
    return _narrowed(known or names.guess(shapes), list(shapes), goal)


def taken_apart(asked: str | None, foreign: Collection[str], goal: Target, families: Sequence[Family]) -> bool:
    """Whether a program has apart what the original network has fused, in the model that foreign names are of.

    Args:
        asked: the family's name where the user gave one.
        foreign: names in a file.
        goal: the program.
        families: the families that the names may be of.
    """
    known = None if asked is None else names.FAMILIES.get(asked)
    family = known or _narrowed(families, foreign, goal)
    return family is not None and not family.keeps_original(family.style(goal.name))


def _narrowed(families: Sequence[Family], foreign: Collection[str], goal: Target) -> Family | None:
    """The first of the families that foreign names may be of, with the one style to write for a program.

    Where other families are as likely, this is a style in which the program reads the same names in all of them.

    Raises:
        ExportError: if there is no such style.
    """
    family, *others = families or (None,)
    if family is None or goal.name not in family.reads or goal.any_model:
        return family
    others = [other for other in others if goal.name in other.reads and names.as_likely(family, other, foreign)]
    modules = {module.name for name in foreign for module in family.find(name)}

    def common(style: str) -> bool:
        return all(
            style in other.reads[goal.name]
            and other.spelled(name, style) == family.spelled(name, style)
            and family.looked_for(name, goal.name, style)
            for other, name in product(others, modules)
        )

    style = next(filter(common, family.reads[goal.name]), None)
    if style is None:
        every = (family, *others)
        raise ExportError(
            f"these modules are of {' or of '.join(each.title for each in every)}, which {goal.title} knows by other "
            f"names: pass {' or '.join(f'family={each.name!r}' for each in every)}"
        )
    return replace(family, reads={**family.reads, goal.name: (style,)}) if others else family


def named_modules(
    items: Sequence[AdapterEntry],
    goal: Target,
    family: Family | None,
    component: str | None,
    *,
    own: bool = False,
) -> dict[str, Members]:
    """Name the modules of a file.

    Args:
        items: the adapters.
        goal: the program that reads the file.
        family: of the model, None where it is not known.
        component: which part of a pipeline the adapters are for, None where their names say it.
        own: whether the paths of a model of no family known here are those of the program.

    Returns:
        By the name in the file: one adapter, or the adapters of the parts of a layer that is fused there.

    Raises:
        ExportError: if the program has no name for a module, or does not read such a set of modules.
    """
    found: dict[str, Members] = {}
    for item in items:
        name, module = (
            (_generic_name(item, None, goal, own), None) if family is None else _name(item, goal, family, component)
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
    if not family.looked_for(module.name, goal.name):
        raise ExportError(
            f"{item.name}: {goal.title} makes no adapter of this layer, and would ignore it; leave it out (save the "
            f"adapter, and export that file with ignore={item.name + '.*'!r}), or export for comfyui"
        )
    return (_generic_name(item, module, goal, False) if goal.any_model else _family_name(module, goal, family)), module


def _fused_name(members: Sequence[str], goal: Target, family: Family) -> str:
    """The one name a target has for several layers, "" where it has one for each."""
    style = family.style(goal.name)
    if len(members) < 2 or style is None or not family.keeps_original(style):
        return ""
    spelled = {family.spell(name, style) for name in members}
    return spelled.pop() if len(spelled) == 1 else ""


def _family_name(module: ModuleSpec, goal: Target, family: Family) -> str:
    """The name of a module of a known family."""
    style = family.style(goal.name, module.name)
    if style is None:
        raise ExportError(
            f"{goal.title} does not load adapters of {family.title} under any name this library writes; export "
            "for comfyui or diffusers"
        )
    return family.spell(module.name, style)


def _generic_name(item: AdapterEntry, module: ModuleSpec | None, goal: Target, own: bool) -> str:
    """The name of a module by its path, for programs that load adapters of any model."""
    in_checkpoint, path = _relative(item, goal)
    if module is not None:
        path = path.removeprefix(f"{_component(module)}.") or module.path
        return (goal.generic or "") + (path.replace(".", "_") if goal.flat else path)
    path = path or _bare(item.name, goal)
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
            "family= if it is, or export for lycoris or peft"
        )
    theirs = own or in_checkpoint or item.name.startswith(goal.generic)
    if not goal.any_model and not theirs:
        raise ExportError(
            f"{goal.title} knows a module by its path in the checkpoint that {goal.title} loads, and {path!r} is of no "
            "family known here: pass family= if it is of one, base= that checkpoint (one file), or family='own' if the "
            "path is so in it too"
        )
    return goal.generic + (path.replace(".", "_") if goal.flat else path)


def _relative(item: AdapterEntry, goal: Target) -> tuple[bool, str]:
    """Whether a path is of the checkpoint that ComfyUI loads, and the path without what the checkpoint puts before.

    The modules of a model in memory keep all of their own path, which a program that loads on any model looks for.
    """
    if not item.in_checkpoint:
        return False, item.path if goal.any_model else item.path.removeprefix(goal.generic or "")
    prefix = next((own for own in _CHECKPOINT_PREFIXES if item.path.startswith(own)), "")
    return bool(prefix), item.path.removeprefix(prefix)


def _bare(name: str, goal: Target) -> str:
    """A module's name without what a program put before its path."""
    prefix = prefix_of(name)
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
