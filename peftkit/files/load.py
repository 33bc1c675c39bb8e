"""A file of adapters onto a model: this library's own, or anybody's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftkit.errors import (
    FullCheckpointError,
    MismatchError,
    TiedWeightsError,
    UnsetAdapterError,
    did_you_mean,
    error_context,
    require_choice,
    require_option,
)
from peftkit.files import full_checkpoint
from peftkit.files.bind import Misfit, misfit, take_rows, turned_patch
from peftkit.files.build import made
from peftkit.files.component import of_component
from peftkit.files.extras import PlacedExtras, placed
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import samples
from peftkit.files.formats import native
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.files.load_report import LoadReport as LoadReport
from peftkit.files.load_shared import everywhere, lone
from peftkit.files.read import Reading, read
from peftkit.files.resolve import HINTS, TWINS, Resolver, common, families_of, names_of
from peftkit.files.trees import at_home
from peftkit.files.unfused import fused
from peftkit.files.vectors import module_of, vector_parts, with_vectors
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.divided import require_not_empty, settle
from peftkit.wrapping.extras import replace_, require_unmerged
from peftkit.wrapping.install import check_install, install
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.plan import refuse_taken
from peftkit.wrapping.select import Selector, patterns, tied_with
from peftkit.wrapping.share import shared_places
from peftkit.wrapping.sites import Site, as_read
from peftkit.wrapping.stacks import turned
from peftkit.wrapping.strength import require_strength
from peftkit.wrapping.vectors import refusal

if TYPE_CHECKING:
    from typing_extensions import Unpack


@of_models
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    strength: float = 1.0,
    strict: bool = True,
    other_base: bool = False,
    tied: str | None = None,
    route: str = "auto",
    component: str | None = None,
    extras: bool = True,
    read_weights: str | Sequence[str] = (),
    **reading: Unpack[Reading],
) -> LoadReport:
    """Wrap a model as an adapter file says, with the tensors of the file.

    Parameters that trained beside the adapters get their values of the file in place and train on; what they were is
    kept, in as much memory again, until `unwrap` gives it back. Strength does not act on them.

    Nothing is changed if anything raises. Nothing is unpickled, unless as data only with allow_pickle=True.

    Args:
        model: any model that has the weights.
        path: as in `read`; or, for a model that is wrapped already with the adapter in it, a full checkpoint, the state
            dict of such a model.
        name: to give the adapter; by default the one it was saved under. Of a full checkpoint: which adapter.
        strength: λ of the adapter.
        strict: raise unless every key of the file goes to the model and every parameter comes from the file. With
            strict=False the weights that fit whole are loaded: read the report.
        other_base: accept a base that is not the one the file was trained on.
        tied: "untie" to give a shared weight a copy of its own, or "share" to put its adapter on all its layers, as in
            `wrap`. A file of `save` says by itself that its adapter is shared.
        route: how ΔW is applied, as in `wrap`.
        component: which part of a pipeline the model is ("unet", "text_encoder", …), where the file is of several; the
            keys of the others are left alone. Or which part of it a file is of, where the model is the pipeline.
        extras: False leaves the parameters that trained beside the adapters as they are on the model; the report names
            them.
        read_weights: patterns, as the targets of `wrap`, of layers to adapt where other code reads their weight, as
            Rule(read=True) does. A file of `save` says it by itself.
        **reading: as in `read`.

    Returns:
        What was loaded, and what was not.

    Raises:
        MismatchError: a file that does not fit the model.
        WrongBaseError: a model that is not the base the file was trained on.
        AmbiguousFileError: a file that can mean two things; the message names the option that decides.
        FullCheckpointError: a full checkpoint, and the model has no adapter of the name that it holds.
        FileError: a file that is no adapter file, or is damaged.
        TiedWeightsError: a weight that is shared with a layer that the file does not adapt.
        OptionError: a value that an option does not have.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> _ = pk.unwrap(model)
        >>> pk.load(model, path).loaded
        ('0',)
    """
    require_choice("tied", tied, (None, "untie", "share"))
    require_strength(strength)
    try:
        bundle = read(path, **reading)
    except FullCheckpointError:
        _require_unplaced(path, tied, route, component, reading.get("rename"))
        pickles = reading.get("allow_pickle", False)
        given = {"strength": strength, "strict": strict, "other_base": other_base, "allow_pickle": pickles}
        return full_checkpoint.take(model, path, name, **given)
    name = bundle.name if name is None else name
    with error_context(path):
        require_not_empty(model)
        settle(model)
        selector = Selector(model)
        ours = selector.all_sites
        bundle = at_home(of_component(bundle, component, ours), paths_in(model, ours), path)
        ours |= {site: as_read(ours[site]) for p in patterns(read_weights) for site in selector.find(p).sites}
        fitting, distances, report = compared(path, name, bundle, ours, component)
        beside = placed(bundle, model) if extras else PlacedExtras()
        report = with_extras(report, bundle, beside, extras)
        if not fitting or (strict and not report.complete):
            what = f"{path} does not fit this model" if fitting else f"nothing in {path} fits this model"
            raise MismatchError(f"{what}\n{report}")
        if tied == "share":
            fitting = everywhere(fitting, shared_places(model, ours, [site.name for site, _ in fitting]), ours, path)
        targeted = [site for site, _ in fitting]
        refuse_taken(targeted, name)
        check_install(targeted, strength, route)
        shared = lone(fitting, tied_with(model, targeted))
        if shared and tied is None:
            site_name, other = next(iter(shared.items()))
            raise TiedWeightsError(
                f"{site_name} shares its weight with {other}: pass tied='share' to put its adapter on both, or "
                "tied='untie' to give it its own copy"
            )
        require_unmerged(beside.values)
        built = made(path, fitting, bundle, beside, distances, extras, other_base)
        install(model, built, name, strength=strength, route=route, untie=set(shared))
        replace_(beside.values, name)
        return report


def _require_loaded(site: Site, matrix: Tensor) -> None:
    """Raise for a weight without values: an adapter has its values in memory, and `to_empty` would drop them."""
    if matrix.is_meta:
        raise UnsetAdapterError(
            f"{site.label}: its weight is on the meta device: give the model its weights first (to_empty and "
            "load_state_dict, or load_state_dict(assign=True)), then load the adapter"
        )


#: why a file that `extract` made of a checkpoint of GPT-2 does not go on the model
_AS_IT_LIES = (
    "the layer keeps its weight as (in, out), and the file's change is of the weight as it lies in a checkpoint: merge "
    "it there with merge_checkpoint"
)


# -- parts ----------------------------------------------------------------------------------------------------------


def _require_unplaced(path: object, tied: str | None, route: str, component: str | None, rename: object) -> None:
    """Refuse options of how adapters are put on a model, for a checkpoint that fills in those that are on it."""
    given = (("tied", tied, None), ("route", route, "auto"), ("component", component, None))
    for option, value, default in (*given, ("rename", rename or None, None)):
        require_option(value == default, option, value, repr(default), f" {path} is a full checkpoint: wrap says it")


def with_extras(report: LoadReport, bundle: AdapterFile, beside: PlacedExtras, extras: bool) -> LoadReport:
    """The report on the adapters and on what trained beside them."""
    return replace(
        report,
        unexpected=report.unexpected + beside.misfit.unexpected,
        mismatched=report.mismatched + beside.misfit.mismatched,
        non_finite=report.non_finite + beside.misfit.non_finite,
        extras=beside.names,
        left_out=() if extras else tuple(bundle.extras),
    )


def compared(
    path: object, name: str, bundle: AdapterFile, ours: Mapping[str, Site], component: str | None
) -> tuple[list[tuple[Site, Patch]], dict[str, float], LoadReport]:
    """The weights whose patches fit whole, how far each is from the file's base, and the report on all of them."""
    misfits: list[Misfit] = []
    distances: dict[str, float] = {}
    fitting: list[tuple[Site, Patch]] = []
    bundle, apart = fused(path, with_vectors(bundle), ours)
    targets, unresolved = _resolve(bundle, ours, component)
    for patch_name, hint in unresolved.items():
        keys = [f"{patch_name}.{key}".strip(".") for key in bundle.patches[patch_name].tensors] or [patch_name]
        misfits.append(Misfit(unexpected=tuple(f"{k}: the model has no weight {patch_name!r}.{hint}" for k in keys)))
    used: dict[tuple[str, int | None], str] = {}
    for patch_name, parts in targets.items():
        patch = bundle.patches[patch_name]
        taken = [part.weight for part in parts if (part.weight, part.start) in used]
        used |= {(part.weight, part.start): patch_name for part in parts}
        if taken:
            misfits.append(Misfit(unexpected=(f"{patch_name}: it is the second adapter of {taken[0]} in the file",)))
            continue
        for site, part in _pieces(patch, parts, ours, f"{path}: {patch_name}"):
            shape, matrix = site.slot.geometry.shape, site.matrix.detach()
            _require_loaded(site, matrix)
            if bundle.format == "peft" and turned(site.slot.geometry) and not part.transposed:
                part = turned_patch(part)
            where = f"{path}: {site.label}"
            found = misfit(part, shape, matrix.dtype, portable=bundle.portable, where=where)
            if site.slot.geometry.transposed and bundle.format == "native" and not (patch.transposed or shape.kernel):
                found = replace(found, mismatched=(*found.mismatched, f"{where}: {_AS_IT_LIES}"))
            if (reason := refusal(site, part.kind)) is not None:
                found = replace(found, mismatched=(*found.mismatched, f"{where}: {reason}"))
            if part.bias and own_parameters(site.module).get("bias") is not None:
                found = replace(found, mismatched=(*found.mismatched, f"{where} has a bias, and {part.bias}"))
            if found:
                misfits.append(found.named(site.name))
                continue
            fitting.append((as_read(site) if patch.read or site.read else site, part))
            distances |= {site.name: apart[patch_name]} if patch_name in apart else {}
            if patch_name in bundle.base:
                distances[site.name] = native.distance(samples(matrix), bundle.base[patch_name])
    stray = [f"{key}: no adapter in the header has it." for key in bundle.unclaimed]
    merged = Misfit(
        tuple(key for found in misfits for key in found.missing),
        (*(key for found in misfits for key in found.unexpected), *stray),
        tuple(key for found in misfits for key in found.mismatched),
        tuple(key for found in misfits for key in found.non_finite),
    )
    problems = (merged.missing, merged.unexpected, merged.mismatched, merged.non_finite)
    loaded = tuple(site.name for site, _ in fitting)
    return fitting, distances, LoadReport(name, loaded, *problems, max(distances.values(), default=0.0))


def paths_in(model: nn.Module, sites: Iterable[str]) -> Iterator[str]:
    """Yield the paths of a model's layers and parameters."""
    yield from sites
    yield from (name for name, _ in model.named_parameters())


def _resolve(
    bundle: AdapterFile, ours: Mapping[str, Site], component: str | None
) -> tuple[dict[str, tuple[Placement, ...]], dict[str, str]]:
    """Patch -> parts of the model, and the hints for patches that have no part."""
    if bundle.format == "native":
        targets = {name: (Placement(name),) for name in bundle.patches if name in ours}
        lost = [name for name in bundle.patches if name not in ours]
        return targets, {name: did_you_mean(name, ours) if i < HINTS else "" for i, name in enumerate(lost)}
    families = families_of(bundle, [name for name in bundle.patches if name not in bundle.vectors])
    # Of a model that is a whole pipeline, the part that is asked for
    prefix = f"{component}." if any(name.startswith(f"{component}.") for name in ours) else ""
    known = {name.removeprefix(prefix): Placement(name) for name in ours if name.startswith(prefix)}

    def place(canonical: str) -> Placement | None:
        own, _, rest = canonical.partition(".")
        if canonical in known:
            return known[canonical]
        if rest not in known:  # transformers 5 leaves out a level of its text encoders
            rest = rest.removeprefix("text_model.")
        asked = own == component or (own in TWINS and component in TWINS)
        clear = component is None and any(own in [part.name for part in family.alone] for family in families)
        return known.get(rest) if asked or clear else None

    resolver = Resolver(known | {f"{component}.{n}": p for n, p in known.items() if component is not None}, place)
    modules = {name: module_of(bundle, name) for name in bundle.patches}
    mine = set(modules.values()) if component is None else names_of(component, modules.values(), families) | {*known}
    targets, unresolved = {}, {}
    for name, module in modules.items():
        if module not in mine:
            continue
        parts = vector_parts(bundle, name, resolver(module, families), ours)
        if parts:
            targets[name] = parts
        else:
            own = common(families, module)
            own_name = bundle.name_in_file(name)
            unresolved[name] = f" It is of the {own}: load it there." if own else resolver.hint(name, own_name)
    return targets, unresolved


def _pieces(patch: Patch, parts: Sequence[Placement], ours: Mapping[str, Site], where: str) -> list[tuple[Site, Patch]]:
    """The patch, or its rows where they belong to several layers or come in another order."""
    if len(parts) == 1 and not parts[0].swapped:
        return [(ours[parts[0].weight], patch)]
    pieces, start = [], 0
    for part in parts:
        site = ours[part.weight]
        rows = torch.arange(start, start + site.slot.geometry.shape.rows)
        start += len(rows)
        if start > patch.shape.rows:
            raise MismatchError(f"{where}: a patch of {patch.shape.rows} rows is too short for {part.weight}")
        pieces.append((site, take_rows(patch, rows.roll(len(rows) // 2) if part.swapped else rows, where)))
    return pieces
