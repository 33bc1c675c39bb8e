"""Several adapter files as one: sums of ΔW, module by module. Errors are stated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.as_low_rank import as_low_rank, of_matrix, side_by_side
from peftkit.delta.distance import relative
from peftkit.delta.truncation import Keep
from peftkit.errors import MismatchError, OptionError, did_you_mean, error_context
from peftkit.files.convert import Converted, ConvertReport, Source, alpha_of, cast, dense, shown, truncated
from peftkit.files.entries import AdapterEntry, canonical_items, delta_of
from peftkit.files.export.write import write_deltas
from peftkit.files.families import names
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.read import Reading, read_all
from peftkit.files.resolve import prefix_of
from peftkit.geometry import Shape
from peftkit.wrapping.strength import require_strength

if TYPE_CHECKING:
    from typing_extensions import Unpack


METHODS = ("linear", "cat", "svd", "ties", "dare")


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
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write Σ weight·ΔW of several files as one, module by module; each module in as many files as have it.

    method: "linear" is the sum itself, of factors side by side where that is smaller than ΔW; "cat" always side by
    side, of rank Σ r; "svd" the sum's best part of a `rank` or `energy`. "ties" keeps of each file the `density` of
    largest entries, elects a sign per entry and averages those that have it (https://arxiv.org/abs/2306.01708);
    "dare" drops entries at random and scales up the `density` kept (https://arxiv.org/abs/2311.03099), by `seed`. rank,
    energy: truncate the result of any method. The error is against the weighted sum. base, other_base: as in `convert`.
    reading: as in `read`.
    """
    if method not in METHODS:
        raise OptionError(
            f"method={method!r} was given, one of {', '.join(METHODS)} was expected.{did_you_mean(method, METHODS)}"
        )
    if not 0 < density <= 1:
        raise OptionError(f"density={density!r} was given, a number in (0, 1] was expected")
    if len(sources) < 2:
        raise OptionError(f"{len(sources)} file was given to combine, at least two were expected")
    keep = None if rank is None and energy is None else Keep(rank, energy)
    if method == "svd" and keep is None:
        raise OptionError("method='svd' needs rank= or energy=")
    for weight in sources.values():
        require_strength(weight)
    with error_context(out, *sources):
        bundles = list(zip(sources, read_all(list(sources), **reading), strict=True))
        files = list(zip(canonical_items(bundles, base, other_base), sources.values(), strict=True))
        found = _sums(files, method, keep, density, torch.Generator().manual_seed(seed))
        return _written(found, [bundle for _, bundle in bundles], Path(out), dtype)


@dataclass(frozen=True, eq=False)
class _Sum:
    """One module of the result. truth: the weighted sum; result: what is kept of it."""

    name: str  # canonical
    item: AdapterEntry  # of the first file that has it
    kinds: str
    truth: Delta
    result: Delta


@torch.no_grad()
def _sums(
    files: Sequence[tuple[dict[str, AdapterEntry], float]],
    method: str,
    keep: Keep | None,
    density: float,
    generator: torch.Generator,
) -> Iterator[_Sum]:
    for name in dict.fromkeys(name for items, _ in files for name in items):
        own = [(items[name], weight) for items, weight in files if name in items]
        first = own[0][0]
        for item, _ in own:
            if (item.shape.rows, item.shape.columns) != (first.shape.rows, first.shape.columns):
                raise MismatchError(f"{name} is {first.shape} in one file and {item.shape} in another")
        deltas = [delta_of(item).scaled(weight) for item, weight in own]
        result = _combined(deltas, method, density, generator)
        if keep is not None:
            result = truncated(result, keep)
        truth = deltas[0] if len(deltas) == 1 else _sum(deltas, cat=True)
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
    results = [_joined(name, members) for name, members in named.items()]
    alpha = alpha_of(like, [one.result for one in results])
    report = tuple(
        Converted(one.name, one.kinds, shown(one.result), relative(one.truth, cast(one.result, dtype, alpha)))
        for one in results
    )
    written = [(one.name, one.item.shape, one.result) for one in results]
    transposed = [one.name for one in results if one.item.transposed]
    after = write_deltas(like, out, written, dtype, transposed)
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
    scale = first.item.shape.rows / family.modules[first.name].shape[0]
    columns = first.item.shape.columns
    turns = family.swaps(name)
    blocks = [(by_name.get(m.name), round(scale * m.shape[0]), turns and m.swapped) for m in family.find(name)]

    def under(part: Callable[[_Sum], Delta]) -> Delta:
        deltas = [(None if one is None else part(one), rows, turned) for one, rows, turned in blocks]
        if all(delta is None or isinstance(delta, (LowRank, Hadamard, Kron)) for delta, _, _ in deltas):
            lows = [(None if d is None else as_low_rank(d), rows, turned) for d, rows, turned in deltas]
            return side_by_side(lows, columns)
        whole = [(torch.zeros(rows, columns) if d is None else dense(d), turned) for d, rows, turned in deltas]
        return Dense(torch.cat([block.roll(len(block) // 2, 0) if turned else block for block, turned in whole]))

    truth, result = under(lambda one: one.truth), under(lambda one: one.result)
    shape = Shape(truth.shape[0], columns)
    kinds = "+".join(sorted({one.kinds for one in members}))
    return _Sum(name, replace(first.item, shape=shape), kinds, truth, result)


def _combined(deltas: Sequence[Delta], method: str, density: float, generator: torch.Generator) -> Delta:
    if method in ("linear", "cat", "svd"):
        return _sum(deltas, cat=method == "cat")
    changes = torch.stack([dense(delta).float() for delta in deltas])
    if method == "dare":
        kept = torch.rand(changes.shape, generator=generator) < density
        return Dense((changes * kept / density).sum(0))
    count = max(1, math.ceil(density * changes[0].numel()))
    bounds = changes.abs().flatten(1).kthvalue(changes[0].numel() - count + 1).values
    trimmed = changes * (changes.abs() >= bounds[:, None, None])
    sign = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == sign) & (sign != 0)
    return Dense((trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1))


def _sum(deltas: Sequence[Delta], *, cat: bool) -> Delta:
    """Σ ΔW: low-rank factors side by side, unless the matrix is smaller; of LoRAs a LoRA, since not all read others."""
    if len(deltas) == 1:
        return deltas[0]
    lows = [as_low_rank(delta) for delta in deltas]
    m, n = deltas[0].shape
    rank = sum(low.rank for low in lows)
    if cat or rank * (m + n) < m * n:
        return LowRank(torch.cat([low.B for low in lows], 1), torch.cat([low.A for low in lows]))
    total = dense(deltas[0]).float()
    for delta in deltas[1:]:
        total = total + delta.dense()
    return of_matrix(total) if all(isinstance(delta, LowRank) for delta in deltas) else Dense(total)


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
