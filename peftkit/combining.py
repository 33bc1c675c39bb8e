"""Several adapter files as one: sums of ΔW, module by module. Errors are stated."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftkit.converting import Converted, ConvertReport, Source, alpha_of, cast, dense, relative, shown, truncated
from peftkit.delta import Delta, Dense, LowRank
from peftkit.errors import MismatchError, OptionError, about, near
from peftkit.formats import forms, names
from peftkit.formats.patch import Bundle
from peftkit.items import Item, canonical, delta_of, items_of_file
from peftkit.reading import Reading, read
from peftkit.resolving import prefix_of
from peftkit.svd import Keep
from peftkit.wrap import require_strength
from peftkit.writing import write_deltas

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
            f"method={method!r} was given, one of {', '.join(METHODS)} was expected.{near(method, METHODS)}"
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
    files = [
        (canonical(list(items_of_file(path, base, other_base, **reading))), weight) for path, weight in sources.items()
    ]
    with about(out, *sources):
        bundles = [read(path, **reading) for path in sources]
        return _combine(files, bundles, Path(out), method, keep, density, seed, dtype)


def _combine(
    files: Sequence[tuple[dict[str, Item], float]],
    bundles: Sequence[Bundle],
    out: Path,
    method: str,
    keep: Keep | None,
    density: float,
    seed: int,
    dtype: torch.dtype | None,
) -> ConvertReport:
    found = list(dict.fromkeys(name for items, _ in files for name in items))
    own_names = [item.name for item in files[0][0].values()]
    generator = torch.Generator().manual_seed(seed)
    results: list[tuple[Item, str, Delta, Delta]] = []  # what it is, of which kinds, the sum, what is written of it
    for name in found:
        own = [(items[name], weight) for items, weight in files if name in items]
        first = own[0][0]
        for item, _ in own:
            if (item.shape.rows, item.shape.columns) != (first.shape.rows, first.shape.columns):
                raise MismatchError(f"{name} is {first.shape} in one file and {item.shape} in another")
        with torch.no_grad():
            deltas = [delta_of(item).scaled(weight) for item, weight in own]
            result = _combined(deltas, method, density, generator)
            if keep is not None:
                result = truncated(result, keep)
            truth = deltas[0] if len(deltas) == 1 else _sum(deltas, cat=True)
            named = first.name if first.name in own_names else _renamed(first.name, own_names, name)
            kinds = "+".join(item.adapter.kind for item, _ in own)
            results.append((replace(first, name=named), kinds, truth, result))
    alpha = alpha_of(bundles[0], [result for *_, result in results])
    report = tuple(
        Converted(item.name, kinds, shown(result), relative(truth, cast(result, dtype, alpha)))
        for item, kinds, truth, result in results
    )
    written = [(item.name, item.shape, result) for item, _, _, result in results]
    transposed = [item.name for item, *_ in results if item.transposed]
    after = write_deltas(bundles[0], out, written, dtype, transposed)
    return ConvertReport(out, report, sum(bundle.size for bundle in bundles), after)


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
    """Σ ΔW: low-rank factors side by side, unless the matrix itself is smaller."""
    if len(deltas) == 1:
        return deltas[0]
    lows = [forms.low_rank(delta) for delta in deltas]
    m, n = deltas[0].shape
    if cat or sum(low.rank for low in lows) * (m + n) < m * n:
        return LowRank(torch.cat([low.B for low in lows], 1), torch.cat([low.A for low in lows]))
    total = dense(deltas[0]).float()
    for delta in deltas[1:]:
        total = total + delta.dense()
    return Dense(total)


def _renamed(name: str, like: Sequence[str], canonical: str) -> str:
    """A module's name as a file with these other names would have it."""
    family = next((f for f in names.FAMILIES.values() if canonical in f.modules and f.find(like[0])), None)
    if family is not None:
        for style in names.STYLES:
            modules = family.find(like[0])
            if len(modules) == 1 and _spelled(family, modules[0].name, style) == like[0]:
                spelled = _spelled(family, canonical, style)
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


def _spelled(family: names.Family, canonical: str, style: str) -> str:
    try:
        return family.spell(canonical, style)
    except OptionError:  # the style has no name for it
        return ""
