"""Several adapter files as one: sums of ΔW, module by module. Errors are stated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.as_low_rank import as_low_rank, of_matrix, side_by_side
from peftkit.delta.distance import relative
from peftkit.delta.truncation import Keep
from peftkit.errors import MismatchError, OptionError, error_context, require_choice, require_option
from peftkit.files.convert import Converted, ConvertReport, Source, alpha_of
from peftkit.files.entries import AdapterEntry, canonical_items, delta_of
from peftkit.files.export.write import write_deltas
from peftkit.files.extras import refuse_extras
from peftkit.files.families import names
from peftkit.files.formats.disk import require_output
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.kinds import by_expert, cast, computing, dense, keep_of, shown, truncated
from peftkit.files.read import Reading, read_all
from peftkit.files.resolve import prefix_of
from peftkit.geometry import Shape
from peftkit.wrapping.strength import require_strength

if TYPE_CHECKING:
    from typing_extensions import Unpack


def combine(
    sources: Mapping[Source, float],
    out: str | os.PathLike[str],
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: nn.Module | str | os.PathLike[str] | None = None,
    other_base: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool | None = None,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write Σ weight·ΔW of several adapter files as one file, module by module, in the format of the first.

    Args:
        sources: {file: weight}. A module is the sum over the files that have it.
        out: the file or the folder to write.
        method: "linear" is the sum itself, of factors side by side where that is smaller than ΔW; "cat" always side by
            side, of rank Σ r; "svd" the sum's best part of a `rank` or `energy`. "ties" keeps of each file the share
            `density` of largest entries, elects a sign per entry and averages those that have it
            (https://arxiv.org/abs/2306.01708); "dare" drops entries at random and scales up the `density` kept
            (https://arxiv.org/abs/2311.03099).
        rank: how many ranks to keep of the result of any method.
        energy: the share of ‖·‖² to keep of the result of any method.
        density: the share of entries that "ties" and "dare" keep, in (0, 1].
        seed: of what "dare" drops.
        base: for adapters that read theirs, whose ΔW holds for that base from then on.
        other_base: accept a base that a file was not trained on.
        dtype: of the tensors, by default that of the factors.
        overwrite: replace what is at `out`, as `require_output` says; by default a file that is not an input.
        **reading: as in `read`.

    Returns:
        A report of every module, with the error of what was written against the weighted sum.

    Raises:
        OptionError: an unknown method, fewer than two files, a density or a weight that is none.
        LossyError: a file with parameters that trained beside its adapters, of which there is no sum.
        MismatchError: modules that differ in shape, or that the first file's names cannot tell apart.
        ExportError: a ΔW that depends on a base that is not given, or that memory cannot hold.
        FileError: a source that is no adapter file, or whose ΔW is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> _ = pk.rescale(path, -1, "opposite.safetensors")
        >>> _ = pk.combine({path: 1, "opposite.safetensors": 0.5}, "both.safetensors")
        >>> pk.inspect("both.safetensors").modules[0].norm
        2.0
    """
    way = _way(method, keep_of(rank, energy, None), density, seed)
    require_option(isinstance(sources, Mapping), "sources", sources, "{file: weight}")
    if len(sources) < 2:
        raise OptionError(f"{len(sources)} file was given to combine, at least two were expected")
    for weight in sources.values():
        require_strength(weight)
    path = require_output(out, [base, *sources], overwrite)
    with error_context(out, *sources):
        bundles = list(zip(sources, read_all(list(sources), **reading), strict=True))
        for file, bundle in bundles:
            refuse_extras(bundle, file, "combine sums ΔW alone")
        files = list(zip(canonical_items(bundles, base, other_base), sources.values(), strict=True))
        return _written(_sums(files, way), [bundle for _, bundle in bundles], path, dtype)


# -- sums of ΔW --------------------------------------------------------------------------------------------------------


def _side_by_side(deltas: Sequence[Delta], density: float, generator: torch.Generator) -> Delta:
    """Σ ΔW as one product of Σ r ranks."""
    del density, generator
    return deltas[0] if len(deltas) == 1 else _stacked([as_low_rank(delta) for delta in deltas])


def _stacked(lows: Sequence[LowRank]) -> LowRank:
    return LowRank(torch.cat([low.B for low in lows], 1), torch.cat([low.A for low in lows]))


def _smaller(deltas: Sequence[Delta], density: float, generator: torch.Generator) -> Delta:
    """Σ ΔW, side by side unless the matrix is smaller; of LoRAs a LoRA, since not all programs read others."""
    del density, generator
    if len(deltas) == 1:
        return deltas[0]
    lows, (m, n) = [as_low_rank(delta) for delta in deltas], deltas[0].shape
    if sum(low.rank for low in lows) * (m + n) < m * n:
        return _stacked(lows)
    total = dense(deltas[0]).float()
    for delta in deltas[1:]:
        total = total + dense(delta)
    return of_matrix(total) if {delta.structure for delta in deltas} == {LowRank.structure} else Dense(total)


def _dare(deltas: Sequence[Delta], density: float, generator: torch.Generator) -> Delta:
    changes = torch.stack([dense(delta).float() for delta in deltas])
    kept = torch.rand(changes.shape, generator=generator) < density
    return Dense((changes * kept / density).sum(0))


def _ties(deltas: Sequence[Delta], density: float, generator: torch.Generator) -> Delta:
    del generator
    changes = torch.stack([dense(delta).float() for delta in deltas])
    count = max(1, math.ceil(density * changes[0].numel()))
    bounds = changes.abs().flatten(1).kthvalue(changes[0].numel() - count + 1).values
    trimmed = changes * (changes.abs() >= bounds[:, None, None])
    sign = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == sign) & (sign != 0)
    return Dense((trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1))


Method = Callable[[Sequence[Delta], float, torch.Generator], Delta]
METHODS: Mapping[str, Method] = MappingProxyType(
    {"linear": _smaller, "cat": _side_by_side, "svd": _smaller, "ties": _ties, "dare": _dare}
)


@dataclass(frozen=True)
class _Way:
    """How ΔW are combined, and which ranks are kept of the result."""

    method: Method
    density: float
    generator: torch.Generator
    keep: Keep | None

    def __call__(self, deltas: Sequence[Delta]) -> Delta:
        result = self.method(deltas, self.density, self.generator)
        return result if self.keep is None else truncated(result, self.keep)


def _way(method: str, keep: Keep | None, density: float, seed: int) -> _Way:
    require_choice("method", method, METHODS)
    require_option(0 < density <= 1, "density", density, "a number in (0, 1]")
    if method == "svd" and keep is None:
        raise OptionError("method='svd' needs rank= or energy=")
    return _Way(METHODS[method], density, torch.Generator().manual_seed(seed), keep)


# -- modules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sum:
    """One module of the result. truth: the weighted sum; result: what is kept of it."""

    name: str  # canonical
    item: AdapterEntry  # of the first file that has it
    kinds: str
    truth: Delta
    result: Delta


@torch.no_grad()
def _sums(files: Sequence[tuple[dict[str, AdapterEntry], float]], way: _Way) -> Iterator[_Sum]:
    for name in dict.fromkeys(name for items, _ in files for name in items):
        own = [(items[name], weight) for items, weight in files if name in items]
        first = own[0][0]
        for item, _ in own:
            turned = item.shape.experts > 1 and item.shape.turned == item.shape and item.transposed != first.transposed
            if (item.shape.rows, item.shape.columns) != (first.shape.rows, first.shape.columns) or turned:
                raise MismatchError(f"{name} is {first.shape} in one file and {item.shape} in another")
        with computing(" + ".join(item.file for item, _ in own), name):
            deltas = [delta_of(item).scaled(weight) for item, weight in own]
            truth = by_expert(lambda own, _: _side_by_side(own, way.density, way.generator), deltas, first.shape)
            # no kind but full adapts a norm or a bias
            result = Dense(truth.dense()) if first.vector else by_expert(lambda own, _: way(own), deltas, first.shape)
        yield _Sum(name, first, "+".join(item.adapter.kind for item, _ in own), truth, result)


@torch.no_grad()
def _written(
    sums: Iterable[_Sum], bundles: Sequence[AdapterFile], out: Path, dtype: torch.dtype | None
) -> ConvertReport:
    """Write the sums as the first file names its modules, and say what that is worth."""
    like = bundles[0]
    own_names = list(like.patches)
    named: dict[str, list[_Sum]] = {}
    for one in sums:
        name = one.item.name if one.item.name in own_names else _renamed(one.item.name, own_names, one.name)
        named.setdefault(name, []).append(one)
    results: list[_Sum] = []
    for name, members in named.items():
        with computing(out, name):
            results.append(_joined(name, members))
    alpha = alpha_of(like, [one.result for one in results])
    report = tuple(
        Converted(one.name, one.kinds, shown(one.result), relative(one.truth, cast(one.result, dtype, alpha)))
        for one in results
    )
    written = [(one.name, one.item.shape, one.result) for one in results]
    transposed = [one.name for one in results if one.item.transposed]
    embeddings = [one.name for one in results if one.item.embedding]
    after = write_deltas(like, out, written, dtype, transposed, embeddings)
    return ConvertReport(out, report, sum(bundle.size for bundle in bundles), after)


def _joined(name: str, members: Sequence[_Sum]) -> _Sum:
    """What goes under one name of the file: one sum, or those of the layers that are fused or turned there."""
    first = members[0]
    family = next((f for f in names.FAMILIES.values() if first.name in f.modules and f.find(name)), None)
    if family is None or (len(family.find(name)) == 1 and not family.swaps(name)):
        if len(members) > 1:
            both = " and ".join(one.item.name for one in members)
            raise MismatchError(f"{both} would both be called {name!r} in the file: export them to one format first")
        return replace(first, name=name)
    by_name = {one.name: one for one in members}
    scale = first.item.shape.rows / family.modules[first.name].share
    columns = first.item.shape.columns
    turns = family.swaps(name)
    blocks = [(by_name.get(m.name), round(scale * m.share), turns and m.swapped) for m in family.find(name)]

    def under(part: Callable[[_Sum], Delta]) -> Delta:
        deltas = [(None if one is None else part(one), rows, turned) for one, rows, turned in blocks]
        if all(delta is None or delta.factored for delta, _, _ in deltas):
            lows = [(None if d is None else as_low_rank(d), rows, turned) for d, rows, turned in deltas]
            return side_by_side(lows, columns)
        whole = [(torch.zeros(rows, columns) if d is None else dense(d), turned) for d, rows, turned in deltas]
        return Dense(torch.cat([block.roll(len(block) // 2, 0) if turned else block for block, turned in whole]))

    truth, result = under(lambda one: one.truth), under(lambda one: one.result)
    shape = Shape(truth.shape[0], columns)
    kinds = "+".join(sorted({one.kinds for one in members}))
    return _Sum(name, replace(first.item, shape=shape), kinds, truth, result)


def _renamed(name: str, like: Sequence[str], canonical: str) -> str:
    """A module's name as a file with these other names would have it."""
    family = next((f for f in names.FAMILIES.values() if canonical in f.modules and f.find(like[0])), None)
    if family is not None:
        for style in names.STYLES:
            modules = family.find(like[0])
            if modules and family.spelled(modules[0].name, style) == like[0]:
                spelled = family.spelled(canonical, style)
                if spelled:
                    return spelled
    prefix, path = prefix_of(like[0]), name.removeprefix(prefix_of(name))
    if all("." not in own.removeprefix(prefix) for own in like) and prefix.endswith("_"):
        return prefix + path.replace(".", "_")
    if "_" in path and prefix_of(name).endswith("_"):
        raise MismatchError(
            f"{name} does not say where its dots were, which the first file's {like[0]!r} has: name it first"
        )
    return prefix + path
