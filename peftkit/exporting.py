"""Write adapters the way another program reads them: A1111, Forge, ComfyUI, sd-scripts, LyCORIS, diffusers, PEFT.

Every weight goes out in the program's own structure where that says the same ΔW, in another structure of the same ΔW
where it does not, baked against its base where neither is possible, or not at all, with the reason.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from peftkit.adapted import one_name, placed
from peftkit.adapter import Adapter, require_dtype
from peftkit.bases import Base, of_model, open_base
from peftkit.binding import bind, is_of_its_base, misfit, needs_base, require_same_base, stand_in
from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.distance import distance
from peftkit.errors import ExportError, FileError, MismatchError, OptionError, about
from peftkit.formats import container, forms, metadata, names, native, peft, targets
from peftkit.formats.forms import Additive
from peftkit.formats.names import Family, Module
from peftkit.formats.patch import Bundle, Patch
from peftkit.formats.targets import Target
from peftkit.geometry import Shape
from peftkit.placing import resolver_of, samples_of, shape_of, whole
from peftkit.reading import Reading, read
from peftkit.resolving import families_of
from peftkit.spelling import Spelled, spell
from peftkit.writing import Piece, peft_type, shared_alpha, tensors_of, write_peft

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Exported:
    """How one weight went out. error: ‖ΔW in the file − ΔW‖/‖ΔW‖, None where that takes a base that is not at hand.

    bytes: in the file; own: of the adapter's parameters.
    """

    weight: str
    written: str  # the module's name in the file
    kind: str
    how: str
    structure: str
    bytes: int
    own: int
    error: float | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Item:
    """One adapter to write, by the name it has in its file or model.

    base: W (m, n), None where it is not at hand. path: of its module in the base, where that is known. transposed: a
    transposed convolution. sliced: rows of a parameter, which is no module of its own. file: where it is from.
    """

    name: str
    adapter: Adapter
    shape: Shape
    base: Tensor | None
    path: str = ""
    transposed: bool = False
    sliced: bool = False
    file: str = ""


@dataclass(frozen=True, eq=False)
class Job:
    """One module to write, and what it is made of.

    parts: of a layer that is fused in the file, each item or None, its rows, and whether their halves are swapped.
    """

    piece: Piece
    kind: str
    members: list[tuple[Module | None, Item]]
    parts: tuple[tuple[Item | None, int, bool], ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, weight by weight. str(report) is one line, table() all of it."""

    target: str
    path: Path
    weights: tuple[Exported, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing is bound to the base."""
        return all(w.how != "baked" for w in self.weights)

    def __str__(self) -> str:
        counts = Counter(w.how for w in self.weights)
        grown = sum(w.bytes for w in self.weights) / max(1, sum(w.own for w in self.weights))
        worst = max((w.error for w in self.weights if w.error is not None), default=0.0)
        notes = "".join(f"\n{note}" for note in sorted({w.note for w in self.weights if w.note}))
        said = ", ".join(f"{count} {how}" for how, count in counts.items())
        size = f"{grown:.2g} times the adapter's bytes"
        return f"{self.path} for {self.target}: {len(self.weights)} weights: {said}; {size}; error {worst:.2g}{notes}"

    def table(self) -> Table:
        """Every weight, for rich to print."""
        table = Table("weight", "in the file", "kind", "written as", "how", "error")
        for w in self.weights:
            table.add_row(w.weight, w.written, w.kind, w.structure, w.how, "" if w.error is None else f"{w.error:.2g}")
        return table


def export(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    target: str,
    *,
    name: str | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    family: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    bake: bool = False,
    title: str | None = None,
    training: Mapping[str, Any] | None = None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> ExportReport:
    """Write the adapters of a wrapped model, or of any adapter file, for another program.

    target: "a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", or "peft", which gets a folder. name: which of
    several adapters. base: the model or the checkpoint that a file is for, where ΔW or names depend on it.
    family: the model's, for its names and labels ("sd15", "sdxl", "flux", …); found by itself where names and
    shapes say it. component: which part of a pipeline the source is, where its names do not tell ("text_encoder_2").
    dtype: of the tensors. bake: write ΔW itself for adapters that depend on their base. title, training: for the
    metadata; `training` may have any of kohya's ss_ and Stability's modelspec entries. other_base: accept a base that
    the file was not trained on. reading: as in `read`.

    The file is read back before it takes its name. Raises ExportError where the target has no words for an adapter.
    """
    goal = targets.get(target)
    require_dtype(dtype)
    path = Path(path)
    if goal.name != "peft" and path.suffix != ".safetensors":
        raise OptionError(f"{path}: {goal.title} reads *.safetensors, {path.suffix or 'no suffix'!r} was given")
    if isinstance(source, nn.Module):
        return _export(list(_of_model(source, name)), path, goal, family, component, dtype, bake, title, training)
    with about(source):
        items = list(items_of_file(source, base, other_base, **reading))
        return _export(items, path, goal, family, component, dtype, bake, title, training)


def _export(
    items: Sequence[Item],
    path: Path,
    goal: Target,
    family: str | None,
    component: str | None,
    dtype: torch.dtype | None,
    bake: bool,
    title: str | None,
    training: Mapping[str, Any] | None,
) -> ExportReport:
    for item in items:
        if item.transposed:
            raise ExportError(
                f"{item.name}: no other program reads an adapter of a transposed convolution, whose weight is kept as "
                "(in, out); keep it in this library's own format"
            )
    known = _family(items, family, component)
    modules = _modules(items, goal, known, component)
    jobs = [_job(module, members, goal, known, bake) for module, members in modules.items()]
    structures = {job.piece.spelled.structure for job in jobs}
    if goal.name == "diffusers" and "dora" in structures and len(structures) > 1:
        # One magnitude makes diffusers expect one for every module, and leave those without unusable
        plain = replace(goal, decomposes=frozenset())
        jobs = [_job(module, members, plain, known, bake) for module, members in modules.items()]
    if goal.name == "peft":
        return _export_peft(path, jobs, dtype)
    pieces = [job.piece for job in jobs]
    alpha = shared_alpha(pieces)
    tensors = tensors_of(pieces, goal, alpha or 1.0, dtype, path)
    rank = None if alpha is None else int(alpha)
    own = {"kinds": sorted({j.kind for j in jobs}), "baked": [p.module for p in pieces if p.spelled.how == "baked"]}
    header = metadata.build(tensors, goal, known, title or path.stem, rank, alpha, training or {}, own)
    with container.atomic(path) as file:
        container.emit(file, tensors, header)
        file.flush()
        weights = _proven(Path(file.name), jobs, path)
    return ExportReport(goal.name, path, weights)


def _export_peft(path: Path, jobs: Sequence[Job], dtype: torch.dtype | None) -> ExportReport:
    found = peft_type([job.piece for job in jobs])
    if found is None:
        lora = replace(targets.get("peft"), reads=frozenset({"lora"}), decomposes=frozenset())
        jobs = [_job(job.piece.module, job.members, lora, None, bake=False) for job in jobs]
    kind, options = found or ("LORA", {"bias": "none"})
    with container.atomic_folder(path) as folder:
        write_peft(folder, [job.piece for job in jobs], kind, options, dtype)
        weights = _proven(folder, jobs, path)
    return ExportReport("peft", path, weights)


# -- what is to be written ---------------------------------------------------------------------------------------------


def _of_model(model: nn.Module, name: str | None) -> Iterator[Item]:
    for at in placed(model, [one_name(model, name)]):
        geometry = at.slot.geometry
        yield Item(
            at.site,
            copy.deepcopy(at.adapter).eval(),
            geometry.shape,
            at.base,
            at.site,
            geometry.transposed,
            at.slot.parameter != "weight",
        )


def items_of_file(
    path: str | os.PathLike[str],
    base: nn.Module | str | os.PathLike[str] | None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> Iterator[Item]:
    """The adapters of a file. With a base, under its modules' names where these are whole modules."""
    bundle = read(path, **reading)
    with about(path):
        yield from _items(path, bundle, base, other_base)


def _items(
    path: str | os.PathLike[str], bundle: Bundle, base: nn.Module | str | os.PathLike[str] | None, other_base: bool
) -> Iterator[Item]:
    if bundle.vectors:
        raise ExportError(
            f"{path} changes biases or norms ({next(iter(bundle.vectors))}, …), which export does not carry"
        )
    if base is not None:
        opened = of_model(base) if isinstance(base, nn.Module) else open_base(base)
        yield from _on_base(path, bundle, opened, other_base)
        return
    families = families_of(bundle)
    for name, patch in bundle.patches.items():
        where = f"{path}: {name}"
        if not patch.shape.rows or not patch.shape.columns:
            raise ExportError(f"{where}: the file does not say how large its weight is; give the base")
        found = misfit(patch, patch.shape, torch.float32, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        adapter = bind(patch, patch.shape, stand_in(patch.shape), where)
        if adapter.derived() and not bundle.portable:
            raise ExportError(
                f"{where}: {patch.kind} is made of its base's factors, which are not in the file; give the base"
            )
        shape = _unflattened(name, patch, families)
        yield Item(name, adapter, shape, None, transposed=patch.transposed, file=str(path))


def _unflattened(name: str, patch: Patch, families: Sequence[Family]) -> Shape:
    """The shape of a patch's weight, with the kernel its family's module has where the file holds it flattened."""
    shape = patch.shape
    matches = families[0].find(name) if families else ()
    if patch.kernel_known or len(matches) != 1:
        return shape
    _, *inputs = matches[0].shape
    fits = inputs and math.prod(inputs) == shape.columns
    return Shape(shape.rows, inputs[0], tuple(inputs[1:])) if fits else shape


def _on_base(file: object, bundle: Bundle, base: Base, other_base: bool) -> Iterator[Item]:
    resolver, families = resolver_of(base)
    distances: dict[str, float] = {}
    bound: list[str] = []
    items: list[Item] = []
    for name, patch in bundle.patches.items():
        where = f"{file}: {name}"
        parts = resolver(name, families or families_of(bundle))
        if not parts:
            raise MismatchError(f"{where}: the base has no such weight.{resolver.hint(name)}")
        shape, W = shape_of(base, parts, patch), whole(base, parts, patch)
        found = misfit(patch, shape, W.dtype, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        first, *others = parts
        path = "" if others or first.start is not None else first.weight.removesuffix(".weight")
        if name in bundle.base and not others and needs_base(patch, shape, bundle.portable):
            distances[name] = native.distance(samples_of(base, first, patch), bundle.base[name])
            bound += [name] if is_of_its_base(patch, shape) and not bundle.portable else []
        items.append(Item(name, bind(patch, shape, W, where), shape, W, path, patch.transposed, file=str(file)))
    kinds = {item.name: item.adapter.kind for item in items}
    require_same_base(file, str(base.path), distances, kinds, bound, other_base)
    yield from items


def _family(items: Sequence[Item], asked: str | None, component: str | None) -> Family | None:
    if asked is not None:
        if asked not in names.FAMILIES:
            raise OptionError(f"family={asked!r} was given, one of {', '.join(names.FAMILIES)} was expected")
        return names.FAMILIES[asked]
    prefix = f"{component}." if component else ""
    shapes = {prefix + item.name: (item.shape.rows, item.shape.columns) for item in items}
    return next(iter(names.guess(shapes)), None)


def _modules(
    items: Sequence[Item], goal: Target, family: Family | None, component: str | None
) -> dict[str, list[tuple[Module | None, Item]]]:
    """Name in the file -> what goes under it: one item, or the parts of a layer that is fused there."""
    found: dict[str, list[tuple[Module | None, Item]]] = {}
    components = set()
    for item in items:
        module = None
        if family is not None:
            matches = family.find(f"{component}.{item.name}" if component else item.name) or family.find(item.name)
            fused = _fused_name([m.name for m in matches], goal, family)
            if fused:  # the file is of the original network's layer, and so is the target
                found.setdefault(fused, []).append((None, item))
                continue
            if len(matches) != 1:
                raise ExportError(f"{item.name!r} is no module of {family.title}: pass family= or component=")
            module = matches[0]
            components.add(module.name.partition(".")[0])
        found.setdefault(_module_name(item, module, goal, family), []).append((module, item))
    if len(components) > 1 and goal.generic in ("lycoris_", "base_model.model."):
        raise ExportError(
            f"{goal.title} loads one model at a time and these are {', '.join(sorted(components))}: export each "
            "from its own model"
        )
    if goal.name in ("a1111", "diffusers"):
        modules = [module for members in found.values() for module, _ in members if module is not None]
        _require_readable_text_encoders(modules, goal)
        if goal.name == "a1111":
            _require_whole_attentions(modules)
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


def _require_readable_text_encoders(modules: Sequence[Module], goal: Target) -> None:
    """Refuse what A1111 ignores of a text encoder, and what makes diffusers fail to recognise one."""
    encoders: dict[str, list[str]] = {}
    for module in modules:
        component, _, path = module.name.partition(".")
        if component.startswith("text_encoder"):
            encoders.setdefault(component, []).append(path)
            if path == "text_projection":
                raise ExportError(f"{module.name}: {goal.title} does not read an adapter of the text projection")
    for component, paths in encoders.items():
        if goal.name == "diffusers" and not any("attn" in path for path in paths):
            raise ExportError(
                f"{component}: diffusers does not recognise a text encoder's adapter without attention layers"
            )


def _require_whole_attentions(modules: Sequence[Module]) -> None:
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


def _module_name(item: Item, module: Module | None, goal: Target, family: Family | None) -> str:
    name = item.path or item.name
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


# -- how it is written -------------------------------------------------------------------------------------------------


def _job(
    module: str, members: list[tuple[Module | None, Item]], goal: Target, family: Family | None, bake: bool
) -> Job:
    kinds = "+".join(sorted({item.adapter.kind for _, item in members}))
    if goal.name == "diffusers" and module.startswith("text_encoder"):
        goal = replace(goal, decomposes=frozenset())  # it loses the magnitudes of text encoders
    try:
        if len(members) == 1 and (members[0][0] is None or not _fused(members[0][0], goal, family)):
            item = members[0][1]
            spelled = spell(item.adapter, goal, item.shape, item.base, bake=bake)
            return Job(Piece(module, spelled, item.shape), kinds, members)
        assert family is not None
        return _fuse(module, kinds, members, goal, family, bake)
    except ExportError as error:
        raise ExportError(f"{members[0][1].name}: {error}") from None


def _fused(module: Module, goal: Target, family: Family | None) -> bool:
    """Whether the file's name means the original network's layer, whose rows are others or in another order."""
    original = family is not None and "transformer" in family.components and goal.transformer_style == "kohya"
    return original and module.name.startswith("transformer.") and (module.start is not None or module.swapped)


def _fuse(
    module: str, kinds: str, members: list[tuple[Module | None, Item]], goal: Target, family: Family, bake: bool
) -> Job:
    """The parts of a fused layer as one low-rank ΔW, block by block: rank Σ r, and zero rows for parts without one."""
    by_name = {m.name: item for m, item in members if m is not None}
    columns = members[0][1].shape.columns
    blocks: list[LowRank] = []
    parts: list[tuple[Item | None, int, bool]] = []
    hows: set[str] = set()
    for part in family.find(module):
        item = by_name.get(part.name)
        parts.append((item, part.shape[0] if item is None else item.shape.rows, part.swapped))
        if item is None:
            blocks.append(LowRank(torch.zeros(part.shape[0], 0), torch.zeros(0, columns)))
            continue
        own = spell(item.adapter, goal, item.shape, item.base, bake=bake)
        assert isinstance(own.form, Additive)
        low = forms.low_rank(own.form.delta)
        blocks.append(LowRank(low.B.roll(item.shape.rows // 2, 0), low.A) if part.swapped else low)
        hows.add(own.how if own.structure == "lora" else "low rank")
    delta = LowRank(torch.block_diag(*(b.B for b in blocks)), torch.cat([b.A for b in blocks]))
    how = next(h for h in ("baked", "low rank", "exact") if h in hows)
    shape = Shape(sum(rows for _, rows, _ in parts), columns)
    return Job(Piece(module, Spelled(how, "lora", Additive(delta)), shape), kinds, members, tuple(parts))


# -- proof -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _proven(written: Path, jobs: Sequence[Job], path: Path) -> tuple[Exported, ...]:
    """Read the file back and hold what it says against the adapters. Raises FileError if nothing in it is alive."""
    bundle = read(written)
    sizes = _sizes(written)
    alive = False
    entries = []
    for job in jobs:
        piece = job.piece
        patch = bundle.patches[piece.module.removeprefix(peft.PREFIX) if bundle.format == "peft" else piece.module]
        error, norm = _error(patch, job)
        alive = alive or norm is None or norm > 0
        if error is not None and error >= 1 - 1e-9 and norm:
            raise FileError(
                f"{path}: the ΔW of {piece.module} would be zero in the file; nothing was written. Choose a wider dtype"
            )
        own = sum(p.nbytes for _, item in job.members for p in item.adapter.parameters())
        names_ = ", ".join(item.name for _, item in job.members)
        spelled = piece.spelled
        size = sum(size for key, size in sizes.items() if key.startswith(f"{piece.module}."))
        entries.append(
            Exported(names_, piece.module, job.kind, spelled.how, spelled.structure, size, own, error, spelled.note)
        )
    if not alive:
        raise FileError(
            f"{path}: every ΔW would be zero in the file, so loading it would do nothing; nothing was written"
        )
    return tuple(entries)


def _sizes(written: Path) -> dict[str, int]:
    file = container.read(written / peft.WEIGHTS if written.is_dir() else written)
    return {key: info.size for key, info in file.infos.items()}


def _error(patch: Patch, job: Job) -> tuple[float | None, float | None]:
    """‖ΔW read back − ΔW‖/‖ΔW‖, and ‖ΔW‖; None where that takes a base that is not at hand."""
    bases = [item.base for _, item in job.members]
    W = stand_in(job.piece.shape)
    if any(item.adapter.reads_base for _, item in job.members) and not job.parts:
        if bases[0] is None:
            return None, None
        W = bases[0]
    back = bind(patch, job.piece.shape, W, job.piece.module)(W, 1.0)
    truth = _fused_truth(job) if job.parts else job.members[0][1].adapter(W, 1.0)
    gap, norm = distance(truth, back)
    return gap / norm if norm else gap, norm


def _fused_truth(job: Job) -> Delta:
    """ΔW of a fused layer, from the adapters of its parts."""
    blocks = []
    for item, rows, swapped in job.parts:
        if item is None:
            blocks.append(torch.zeros(rows, job.piece.shape.columns))
            continue
        W = stand_in(item.shape) if item.base is None else item.base
        block = item.adapter(W, 1.0).dense()
        blocks.append(block.roll(rows // 2, 0) if swapped else block)
    return Dense(torch.cat(blocks))
