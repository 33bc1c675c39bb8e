"""What the modules of an export are called in the file, and which sets of them a program does not read."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.errors import ExportError, OptionError
from peftkit.files.entries import AdapterEntry
from peftkit.files.export.programs import Target
from peftkit.files.families import names
from peftkit.files.families.names import Family, ModuleSpec

#: what programs put before the path of a module, whatever the model
_SPELLED = ("lycoris_", "lora_unet_", "lora_transformer_", "base_model.model.", "diffusion_model.")


def family_of(items: Sequence[AdapterEntry], asked: str | None, component: str | None) -> Family | None:
    if asked is not None:
        if asked not in names.FAMILIES:
            raise OptionError(f"family={asked!r} was given, one of {', '.join(names.FAMILIES)} was expected")
        return names.FAMILIES[asked]
    prefix = f"{component}." if component else ""
    shapes = {prefix + item.name: (item.shape.rows, item.shape.columns) for item in items}
    return next(iter(names.guess(shapes)), None)


def named_modules(
    items: Sequence[AdapterEntry], goal: Target, family: Family | None, component: str | None
) -> dict[str, list[tuple[ModuleSpec | None, AdapterEntry]]]:
    """Name in the file -> what goes under it: one item, or the parts of a layer that is fused there."""
    found: dict[str, list[tuple[ModuleSpec | None, AdapterEntry]]] = {}
    components = set()
    for item in items:
        module = None
        if family is not None:
            matches = family.find(f"{component}.{item.name}" if component else item.name) or family.find(item.name)
            fused = _fused_name([m.name for m in matches], goal, family)
            if fused:  # the file is of the original network's layer, and so is the target
                found.setdefault(fused, []).append((None, item))
                continue
            if len(matches) > 1:
                raise ExportError(
                    f"{item.name!r} is {len(matches)} layers of {goal.title} in one: save it, and export that file"
                )
            if not matches:
                raise ExportError(f"{item.name!r} is no module of {family.title}: pass family= or component=")
            module = matches[0]
            components.add(module.name.partition(".")[0])
        found.setdefault(_module_name(item, module, goal, family), []).append((module, item))
    if len(components) > 1 and goal.generic in ("lycoris_", "base_model.model."):
        raise ExportError(
            f"{goal.title} loads one model at a time and these are {', '.join(sorted(components))}: export each "
            "from its own model"
        )
    require_readable([module for members in found.values() for module, _ in members if module is not None], goal)
    for name, members in found.items():
        if len(members) > 1 and any(module is None or module.start is None for module, _ in members):
            both = " and ".join(repr(item.name) for _, item in members)
            raise ExportError(f"{both} would both be called {name!r} in the file: rename one of the modules")
    return found


def _fused_name(members: Sequence[str], goal: Target, family: Family) -> str:
    """The one name a target has for several layers, "" where it has one for each."""
    style = goal.transformer_style if "transformer" in family.components else goal.style
    if len(members) < 2 or style != "kohya":
        return ""
    spelled = {family.spell(name, style) for name in members}
    return spelled.pop() if len(spelled) == 1 else ""


def require_readable(modules: Sequence[ModuleSpec], goal: Target, named: str = "diffusers") -> None:
    """Refuse what A1111 ignores of a text encoder, and what makes diffusers fail to recognise one.

    named: the format of the file; in kohya's names diffusers knows the attention by its output.
    """
    if goal.name not in ("a1111", "diffusers"):
        return
    encoders: dict[str, list[str]] = {}
    for module in modules:
        component, _, path = module.name.partition(".")
        if component.startswith("text_encoder"):
            encoders.setdefault(component, []).append(path)
            if path == "text_projection":
                raise ExportError(f"{module.name}: {goal.title} does not read an adapter of the text projection")
    for component, paths in encoders.items():
        known = "attn" if named == "diffusers" else "self_attn.out_proj"
        if goal.name == "diffusers" and not any(known in path for path in paths):
            raise ExportError(
                f"{component}: diffusers does not recognise a text encoder's adapter without attention layers"
            )
    if goal.name == "a1111":
        _require_whole_attentions(modules)


def _require_whole_attentions(modules: Sequence[ModuleSpec]) -> None:
    """A1111 applies an OpenCLIP attention only where q, k, v and the output are all in the file, and says nothing."""
    own = {module.name for module in modules}
    for module in modules:
        parent = module.name.rpartition(".")[0]
        open_clip = module.original.endswith("in_proj_weight") or ".attn.out_proj." in module.original
        missing = [p for p in ("q_proj", "k_proj", "v_proj", "out_proj") if open_clip and f"{parent}.{p}" not in own]
        if missing:
            raise ExportError(
                f"{module.name}: A1111 applies {parent} only with all of its projections, and {missing[0]} has no "
                "adapter; give it one, or export for another program"
            )


def _module_name(item: AdapterEntry, module: ModuleSpec | None, goal: Target, family: Family | None) -> str:
    name = item.path or item.name
    if module is None and not item.path and name.startswith(_SPELLED):
        prefix = next(p for p in _SPELLED if name.startswith(p))
        name = name.removeprefix(prefix)
        if prefix.endswith("_") and "_" in name and goal.generic != "lycoris_":
            raise ExportError(
                f"{item.name!r} does not say where its dots were, which {goal.title} needs: give the base"
            )
    own = name if module is None else item.path.removeprefix(f"{module.name.partition('.')[0]}.") or module.path
    if item.sliced and module is None:
        raise ExportError(
            f"{name!r} is rows of a parameter and no module of its own, so {goal.title} has no name for it"
        )
    if not name and goal.name != "lycoris":
        raise ExportError(f"{goal.title} adapts modules inside a model, and this one is the whole of it")
    if goal.name == "diffusers" and family is not None and module is not None and ".encoder.block." in module.name:
        raise ExportError(f"{name!r} is of T5, for which no pipeline of diffusers loads an adapter")
    if goal.generic in ("lycoris_", "base_model.model."):  # programs that load on any model, by its own paths
        return goal.generic + (own.replace(".", "_") if goal.generic == "lycoris_" else own)
    if module is None or family is None:
        if goal.generic is None:
            raise ExportError(
                f"{goal.title} loads adapters of the models it knows, and {name!r} is of none known here; pass "
                "family= if it is, or export for lycoris, peft or comfyui"
            )
        return goal.generic + name
    transformer = "transformer" in family.components
    style = goal.transformer_style if transformer else goal.style
    if style is None:
        raise ExportError(f"{goal.title} does not load adapters of {family.title} under any name this library writes")
    return family.spell(module.name, style)
