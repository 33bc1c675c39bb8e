"""Write adapters the way another program reads them: A1111, Forge, ComfyUI, sd-scripts, LyCORIS, diffusers, PEFT.

Every weight goes out in the program's own structure where that says the same ΔW, in another structure of the same ΔW
where it does not, baked against its base where neither is possible, or not at all, with the reason.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from peftkit.adapted import one_name, placed
from peftkit.adapter import Adapter, require_dtype
from peftkit.bases import Base, of_model, open_base
from peftkit.binding import bind, misfit, stand_in
from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.base import distance
from peftkit.errors import ExportError, FileError, MismatchError, OptionError
from peftkit.formats import container, forms, metadata, names, peft, targets
from peftkit.formats.forms import Additive, Decomposition, Gate, Turn
from peftkit.formats.names import Family, Module
from peftkit.formats.patch import Bundle, Patch
from peftkit.formats.targets import Target
from peftkit.geometry import Shape
from peftkit.placing import resolver_of, shape_of, whole
from peftkit.reading import read
from peftkit.resolving import families_of
from peftkit.spelling import Spelled, spell


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


@dataclass(frozen=True, eq=False)
class Item:
    """One adapter to write. base: W (m, n), None where it is not at hand."""

    name: str
    adapter: Adapter
    shape: Shape
    base: Tensor | None


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
) -> ExportReport:
    """Write the adapters of a wrapped model, or of any adapter file, for another program.

    target: "a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", or "peft", which gets a folder. name: which of
    several adapters. base: the model or the checkpoint that a file is for, where ΔW or names depend on it.
    family: the model's, for its names and labels ("sd15", "sdxl", "flux", …); found by itself where names and shapes say
    it. component: which part of a pipeline the source is, where its names do not tell ("text_encoder_2").
    dtype: of the tensors. bake: write ΔW itself for adapters that depend on their base. title, training: for the
    metadata; `training` may have any of kohya's ss_ and Stability's modelspec entries.

    The file is read back before it takes its name. Raises ExportError where the target has no words for an adapter.
    """
    goal = targets.get(target)
    require_dtype(dtype)
    path = Path(path)
    if goal.name != "peft" and path.suffix != ".safetensors":
        raise OptionError(f"{path}: {goal.title} reads *.safetensors, {path.suffix or 'no suffix'!r} was given")
    items = list(_of_model(source, name) if isinstance(source, nn.Module) else items_of_file(source, base))
    known = _family(items, family, component)
    modules = _modules(items, goal, known, component)
    pieces = [_piece(module, members, goal, known, bake) for module, members in modules.items()]
    if goal.name == "peft":
        return _write_peft(path, pieces, goal, dtype)
    ranks = [p.spelled.rank for p in pieces if p.spelled.rank is not None]
    alpha = float(Counter(ranks).most_common(1)[0][0]) if ranks else None
    tensors = _tensors(pieces, goal, alpha or 1.0, dtype, path)
    rank = None if alpha is None else int(alpha)
    own = {"kinds": sorted({p.kind for p in pieces}), "baked": [p.module for p in pieces if p.spelled.how == "baked"]}
    header = metadata.build(tensors, goal, known, title or path.stem, rank, alpha, training or {}, own)
    with container.atomic(path) as file:
        container.emit(file, tensors, header)
        file.flush()
        weights = _proven(Path(file.name), pieces, path)
    return ExportReport(target, path, weights)


# -- what is to be written ---------------------------------------------------------------------------------------------


def _of_model(model: nn.Module, name: str | None) -> Iterator[Item]:
    for at in placed(model, [one_name(model, name)]):
        geometry = at.slot.geometry
        if geometry.transposed:
            raise ExportError(
                f"{at.site}: no other program reads an adapter of a transposed convolution, whose weight is kept as "
                "(in, out); save it in this library's own format"
            )
        yield Item(at.site, copy.deepcopy(at.adapter).eval(), geometry.shape, at.base)


def items_of_file(path: str | os.PathLike[str], base: nn.Module | str | os.PathLike[str] | None) -> Iterator[Item]:
    """The adapters of a file. With a base, under its modules' names where these are whole modules."""
    bundle = read(path)
    if bundle.vectors:
        raise ExportError(
            f"{path} changes biases or norms ({next(iter(bundle.vectors))}, …), which export does not carry"
        )
    if base is not None:
        yield from _on_base(path, bundle, of_model(base) if isinstance(base, nn.Module) else open_base(base))
        return
    for name, patch in bundle.patches.items():
        where = f"{path}: {name}"
        if not patch.shape.rows or not patch.shape.columns:
            raise ExportError(f"{where}: the file does not say how large its weight is; give the base")
        found = misfit(patch, patch.shape, torch.float32, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        yield Item(name, bind(patch, patch.shape, stand_in(patch.shape), where), patch.shape, None)


def _on_base(path: object, bundle: Bundle, base: Base) -> Iterator[Item]:
    resolver, families = resolver_of(base)
    for name, patch in bundle.patches.items():
        where = f"{path}: {name}"
        parts = resolver(name, families or families_of(bundle))
        if not parts:
            raise MismatchError(f"{where}: the base has no such weight.{resolver.hint(name)}")
        shape, W = shape_of(base, parts, patch), whole(base, parts, patch)
        found = misfit(patch, shape, W.dtype, portable=bundle.portable, where=where)
        if found or patch.transposed:
            raise ExportError(
                f"{where}: {found.first or 'it is of a transposed convolution, which nothing else reads'}"
            )
        own = name if families or len(parts) > 1 else parts[0].weight.removesuffix(".weight")
        yield Item(own, bind(patch, shape, W, where), shape, W)


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
            if len(matches) != 1:
                raise ExportError(f"{item.name!r} is no module of {family.title}: pass family= or component=")
            module = matches[0]
            kernel = module.shape[2:]
            if not item.shape.kernel and math.prod(module.shape[1:]) == item.shape.columns:
                item = replace(item, shape=Shape(item.shape.rows, module.shape[1], kernel))  # the file had it flattened
            components.add(module.name.partition(".")[0])
        found.setdefault(_module_name(item.name, module, goal, family), []).append((module, item))
    if len(components) > 1 and goal.generic in ("lycoris_", "base_model.model."):
        raise ExportError(
            f"{goal.title} loads one model at a time and these are {', '.join(sorted(components))}: export each "
            "from its own model"
        )
    for name, members in found.items():
        if len(members) > 1 and any(module is None or module.start is None for module, _ in members):
            both = " and ".join(repr(item.name) for _, item in members)
            raise ExportError(f"{both} would both be called {name!r} in the file: rename one of the modules")
    return found


def _module_name(name: str, module: Module | None, goal: Target, family: Family | None) -> str:
    own = name if module is None else module.path
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


@dataclass(frozen=True, eq=False)
class Piece:
    """One module of the file. members: what it is made of."""

    module: str
    kind: str
    spelled: Spelled
    shape: Shape
    members: list[tuple[Module | None, Item]]
    parts: tuple[
        tuple[Item | None, int, bool], ...
    ] = ()  # of a fused layer: the item, its rows, whether they are swapped


def _piece(
    module: str, members: list[tuple[Module | None, Item]], goal: Target, family: Family | None, bake: bool
) -> Piece:
    kinds = "+".join(sorted({item.adapter.kind for _, item in members}))
    try:
        if len(members) == 1 and (members[0][0] is None or not _fused(members[0][0], goal, family)):
            item = members[0][1]
            return Piece(
                module, kinds, spell(item.adapter, goal, item.shape, item.base, bake=bake), item.shape, members
            )
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
) -> Piece:
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
    return Piece(module, kinds, Spelled(how, "lora", Additive(delta)), shape, members, tuple(parts))


def _tensors(
    pieces: Sequence[Piece], goal: Target, alpha: float, dtype: torch.dtype | None, path: Path
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        for suffix, tensor in _module_tensors(piece, goal, alpha).items():
            whole = suffix in ("alpha", "on_input")
            tensor = tensor.detach().to("cpu", tensor.dtype if whole or dtype is None else dtype).contiguous()
            if not torch.isfinite(tensor).all():
                raise FileError(f"{path}: {piece.module}.{suffix} is not finite as {tensor.dtype}; nothing was written")
            tensors[f"{piece.module}.{suffix}"] = tensor
    return tensors


def _module_tensors(piece: Piece, goal: Target, alpha: float) -> dict[str, Tensor]:
    form, shape = piece.spelled.form, piece.shape
    if isinstance(form, Additive):
        return _delta_tensors(form.delta, shape, goal, alpha, balance=piece.spelled.how != "exact")
    if isinstance(form, Decomposition):
        tensors = _delta_tensors(form.inner, shape, goal, alpha)
        if goal.name in ("diffusers", "peft"):
            ones = (1,) * len(shape.kernel)
            vector = form.magnitude.reshape(1, -1, *ones) if shape.kernel else form.magnitude
            return tensors | {"lora_magnitude_vector": vector}
        return tensors | {"dora_scale": forms.dora_scale(form, shape)}
    if isinstance(form, Turn):
        return {"oft_R.weight": peft.skew(form)} if goal.name == "peft" else forms.oft(form, shape)
    if isinstance(form, Gate):
        return forms.ia3(form, shape)
    return forms.glora(form, shape, old_layout=piece.spelled.structure == "glora old")


def _delta_tensors(delta: Delta, shape: Shape, goal: Target, alpha: float, balance: bool = False) -> dict[str, Tensor]:
    bare = goal.name in ("diffusers", "peft")  # PEFT's spelling, which has no alpha tensor
    if isinstance(delta, LowRank):
        delta = forms.balanced(delta) if balance else delta
        if not bare:
            return forms.lora(delta, shape, alpha)
        own = forms.lora(delta, shape, float(max(1, delta.rank)))
        return {"lora_A.weight": own["lora_down.weight"], "lora_B.weight": own["lora_up.weight"]}
    if isinstance(delta, Hadamard):
        tensors = forms.loha(delta)
    elif isinstance(delta, Kron):
        tensors = forms.lokr(delta, shape, full=_whole(delta, shape, goal))
    else:
        assert isinstance(delta, Dense)
        tensors = forms.diff(delta, shape)
    return {name: tensor for name, tensor in tensors.items() if not (bare and name == "alpha")}


def _whole(delta: Kron, shape: Shape, goal: Target) -> bool:
    """Whether D is written whole. ComfyUI and Forge misread a whole D of a 1- or 3-dimensional kernel."""
    if delta.left is None:
        return goal.name in ("lycoris", "peft") or len(shape.kernel) in (0, 2)
    v_p, v_q = delta.block[0], delta.block[1] // shape.positions
    return goal.name in ("lycoris", "peft") and delta.right.shape[0] >= max(v_p, v_q) / 2


# -- PEFT's folder -----------------------------------------------------------------------------------------------------


def _write_peft(path: Path, pieces: Sequence[Piece], goal: Target, dtype: torch.dtype | None) -> ExportReport:
    kind, options, pieces = _one_peft_type(pieces)
    tensors = _tensors(pieces, goal, 1.0, dtype, path)
    prefix = peft.PREFIX
    ranks = {p.module.removeprefix(prefix): _peft_rank(p) for p in pieces}
    with container.atomic_folder(path) as folder:
        config = json.dumps(peft.config(kind, ranks, options), indent=2, sort_keys=True)
        (folder / peft.CONFIG).write_text(config + "\n")
        with (folder / peft.WEIGHTS).open("xb") as file:
            container.emit(file, tensors, {"format": "pt"})
        weights = _proven(folder, pieces, path)
    return ExportReport("peft", path, weights)


def _peft_rank(piece: Piece) -> int:
    form = piece.spelled.form
    delta = form.delta if isinstance(form, Additive) else form.inner if isinstance(form, Decomposition) else None
    if isinstance(delta, Kron):
        sizes = delta.block[0], delta.block[1] // piece.shape.positions
        whole = delta.left is None or delta.right.shape[0] >= max(sizes) / 2
        return math.ceil(max(sizes) / 2) if whole else delta.right.shape[0]
    return delta.rank if isinstance(delta, (LowRank, Hadamard)) else 1


def _one_peft_type(pieces: Sequence[Piece]) -> tuple[str, dict[str, Any], list[Piece]]:
    """A folder is of one type with one set of options: what all modules share, or LoRA, which says everything."""
    structures = {p.spelled.structure for p in pieces}
    deltas = [p.spelled.form.delta for p in pieces if isinstance(p.spelled.form, Additive)]
    if structures == {"lora"}:
        return "LORA", {"bias": "none"}, list(pieces)
    if structures == {"dora"}:
        return "LORA", {"bias": "none", "use_dora": True}, list(pieces)
    if structures == {"loha"}:
        return "LOHA", {"use_effective_conv2d": False}, list(pieces)
    if structures == {"lokr"}:
        shapes = [(d, p.shape) for d, p in zip(deltas, pieces, strict=True) if isinstance(d, Kron)]
        factor = peft.decompose_factor([(d.C.shape, (s.rows, s.channels)) for d, s in shapes])
        if factor is not None:
            return "LOKR", {"decompose_factor": factor, "use_effective_conv2d": False}, list(pieces)
    if structures == {"oft in"}:
        turns = [p.spelled.form for p in pieces if isinstance(p.spelled.form, Turn)]
        if len({(turn.Q.shape[1], turn.terms) for turn in turns}) == 1:
            terms = turns[0].terms
            series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
            return "OFT", {"r": 0, "oft_block_size": turns[0].Q.shape[1], "bias": "none", **series}, list(pieces)
    lora = replace(targets.get("peft"), reads=frozenset({"lora"}), decomposes=frozenset())
    return "LORA", {"bias": "none"}, [_piece(p.module, p.members, lora, None, bake=False) for p in pieces]


# -- proof -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _proven(written: Path, pieces: Sequence[Piece], path: Path) -> tuple[Exported, ...]:
    """Read the file back and hold what it says against the adapters. Raises FileError if nothing in it is alive."""
    bundle = read(written)
    sizes = _sizes(written)
    alive = False
    entries = []
    for piece in pieces:
        patch = bundle.patches[piece.module.removeprefix(peft.PREFIX) if bundle.format == "peft" else piece.module]
        error, norm = _error(patch, piece)
        alive = alive or norm is None or norm > 0
        own = sum(p.nbytes for _, item in piece.members for p in item.adapter.parameters())
        names_ = ", ".join(item.name for _, item in piece.members)
        spelled = piece.spelled
        size = sum(size for key, size in sizes.items() if key.startswith(f"{piece.module}."))
        entries.append(
            Exported(names_, piece.module, piece.kind, spelled.how, spelled.structure, size, own, error, spelled.note)
        )
    if not alive:
        raise FileError(
            f"{path}: every ΔW would be zero in the file, so loading it would do nothing; nothing was written"
        )
    return tuple(entries)


def _sizes(written: Path) -> dict[str, int]:
    file = container.read(written / peft.WEIGHTS if written.is_dir() else written)
    return {key: info.size for key, info in file.infos.items()}


def _error(patch: Patch, piece: Piece) -> tuple[float | None, float | None]:
    """‖ΔW read back − ΔW‖/‖ΔW‖, and ‖ΔW‖; None where that takes a base that is not at hand."""
    bases = [item.base for _, item in piece.members]
    W = stand_in(piece.shape)
    if any(item.adapter.reads_base for _, item in piece.members) and not piece.parts:
        if bases[0] is None:
            return None, None
        W = bases[0]
    back = bind(patch, piece.shape, W, piece.module)(W, 1.0)
    truth = _fused_truth(piece) if piece.parts else piece.members[0][1].adapter(W, 1.0)
    gap, norm = distance(truth, back)
    return gap / norm if norm else gap, norm


def _fused_truth(piece: Piece) -> Delta:
    """ΔW of a fused layer, from the adapters of its parts."""
    blocks = []
    for item, rows, swapped in piece.parts:
        if item is None:
            blocks.append(torch.zeros(rows, piece.shape.columns))
            continue
        W = stand_in(item.shape) if item.base is None else item.base
        block = item.adapter(W, 1.0).dense()
        blocks.append(block.roll(rows // 2, 0) if swapped else block)
    return Dense(torch.cat(blocks))
