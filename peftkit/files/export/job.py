"""The modules of an export: one adapter each, or the parts of a layer that is fused in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftkit.adapters import registry
from peftkit.delta import LowRank
from peftkit.delta.as_low_rank import as_low_rank, as_low_rank_stack, side_by_side
from peftkit.errors import ExportError
from peftkit.files.entries import AdapterEntry
from peftkit.files.export.encode import Encoding, encode
from peftkit.files.export.names import Members
from peftkit.files.export.programs import Target
from peftkit.files.export.tensors import ModuleTensors
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec
from peftkit.geometry import Shape


@dataclass(frozen=True)
class Part:
    """Rows of a fused layer: their adapter, None where they have none, and whether their halves change places."""

    item: AdapterEntry | None
    rows: int
    swapped: bool


@dataclass(frozen=True, eq=False)
class Job:
    """One module to write.

    Attributes:
        piece: what is written.
        kind: of the adapters it is made of, "a+b" for several.
        members: the adapters, with the modules of the family they are for.
        parts: of a layer that is fused in the file, () of any other.
    """

    piece: ModuleTensors
    kind: str
    members: Members
    parts: tuple[Part, ...] = ()


def job(module: str, members: Members, goal: Target, family: Family | None, bake: bool) -> Job:
    """Encode what goes under one name of the file.

    Args:
        module: the name.
        members: one adapter, or the adapters of the parts of a fused layer.
        goal: the program.
        family: of the model, None where it is not known.
        bake: as `export` takes it.

    Raises:
        ExportError: if the program can hold neither an adapter nor its ΔW.
    """
    if not goal.encoder_magnitudes and module.startswith("text_encoder"):
        goal = replace(goal, decomposes=frozenset())
    try:
        (only, item), *others = members
        if family is not None and (others or (only is not None and _is_fused(only, item, goal, family))):
            return _fuse(module, members, goal, family, bake)
        goal = goal.on(embedding=item.embedding, swapped=only is not None and only.swapped)
        spelled, shape = encode(item.adapter, goal, item.shape, item.base, bake=bake), item.shape
        if item.turned:
            assert spelled.form.change is not None  # PEFT has nothing but LoRA of stacks
            form = registry.additive(as_low_rank_stack(spelled.form.change).turned)
            spelled, shape = replace(spelled, form=form), shape.turned
        return Job(ModuleTensors(module, spelled, shape, item.embedding), item.adapter.kind, members)
    except ExportError as error:
        raise ExportError(f"{members[0][1].name}: {error}") from None


def _is_fused(module: ModuleSpec, item: AdapterEntry, goal: Target, family: Family) -> bool:
    """Whether the file's name means the original network's layer, whose rows are others or in another order."""
    if not module.name.startswith("transformer.") or not family.keeps_original(family.style(goal.name)):
        return False
    return module.start is not None or (module.swapped and not family.swaps(item.name))


def _fuse(module: str, members: Members, goal: Target, family: Family, bake: bool) -> Job:
    """The parts of a fused layer as one low-rank ΔW, block by block: rank Σ r, and zero rows for parts without one."""
    by_name = {m.name: item for m, item in members if m is not None}
    unit = next(item.shape.rows // m.share for m, item in members if m is not None)
    columns = members[0][1].shape.columns
    goal = replace(goal, reads=goal.reads & {LowRank.structure}, decomposes=frozenset())
    parts: list[Part] = []
    blocks: list[LowRank | None] = []
    hows: set[str] = set()
    for spec in family.find(module):
        item = by_name.get(spec.name)
        if item is None:
            parts.append(Part(None, spec.share * unit, spec.swapped))
            blocks.append(None)
            continue
        parts.append(Part(item, item.shape.rows, spec.swapped and not family.swaps(item.name)))
        own = encode(item.adapter, goal, item.shape, item.base, bake=bake)
        assert own.form.change is not None
        blocks.append(as_low_rank(own.form.change))
        hows.add("low rank" if own.form.lora is None else own.how)
    layout = [(low, part.rows, part.swapped) for low, part in zip(blocks, parts, strict=True)]
    delta = side_by_side(layout, columns)
    how = next(h for h in ("baked", "low rank", "exact") if h in hows)
    form = registry.additive(delta)
    piece = ModuleTensors(
        module, Encoding(how, form.structure(goal), form), Shape(sum(part.rows for part in parts), columns)
    )
    return Job(piece, "+".join(sorted({item.adapter.kind for _, item in members})), members, tuple(parts))


def jobs(modules: dict[str, Members], goal: Target, family: Family | None, bake: bool) -> Sequence[Job]:
    """Encode all modules of a file. See `job`."""
    return [job(module, members, goal, family, bake) for module, members in modules.items()]
