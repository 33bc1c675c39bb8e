"""From adapter file to adapter file: another kind, fewer ranks, another scale, or several in one. Errors are stated.

Modules keep the names they had, and the result the format: what kohya's tools read before, they read after.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor, nn

from peftkit.adapters.lokr import factorize
from peftkit.binding import stand_in
from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.distance import distance
from peftkit.errors import ExportError, FileError, LossyError, MismatchError, OptionError, about, near
from peftkit.exporting import Item, items_of_file
from peftkit.formats import container, forms, kohya, names, native, peft
from peftkit.formats.patch import Bundle
from peftkit.geometry import Shape
from peftkit.reading import Reading, read
from peftkit.resolving import plain, prefix_of
from peftkit.svd import Keep, nearest, nearest_kronecker, truncate
from peftkit.wrap import require_strength
from peftkit.writing import HASHES, write_deltas

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: what `convert` can make, and what it takes: none, or ranks to keep
KINDS = ("lora", "loha", "lokr", "full")
METHODS = ("linear", "cat", "svd", "ties", "dare")

#: relative error that fp32 factors of an exact conversion stay below
EXACT = 1e-5

#: entries of the largest ΔW that is written whole; the embeddings of the largest models have as many
_LARGEST = 2**32

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Converted:
    """One module. before, after: kind and rank. error: ‖ΔW' − ΔW‖/‖ΔW‖, of what was really written."""

    name: str
    before: str
    after: str
    error: float


@dataclass(frozen=True)
class ConvertReport:
    """What became of every module. str(report) is one line, table() all of it."""

    path: Path
    modules: tuple[Converted, ...]
    before: int
    after: int

    @property
    def error(self) -> float:
        """The largest error of a module."""
        return max((m.error for m in self.modules), default=0.0)

    def __str__(self) -> str:
        size = f"{self.before / 1e6:.2f} MB to {self.after / 1e6:.2f} MB"
        return (
            f"{self.path}: {len(self.modules)} modules, {size}, error at most {100 * self.error:.3g} % of a module's ΔW"
        )

    def table(self) -> Table:
        """Every module, for rich to print."""
        table = Table("module", "before", "after", "error")
        for m in self.modules:
            table.add_row(m.name, m.before, m.after, f"{100 * m.error:.3g} %")
        return table


def convert(
    source: Source,
    out: str | os.PathLike[str],
    kind: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    factor: int = 8,
    exact: bool = False,
    base: nn.Module | str | os.PathLike[str] | None = None,
    other_base: bool = False,
    dtype: torch.dtype | None = None,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write the same ΔW as another kind: "lora", "loha", "lokr" or "full".

    rank, energy, threshold: for lora and loha, keep so many ranks, such a share of ‖ΔW‖², or singular values of at
    least that share of the largest; without them every rank there is. factor: the bound on the small factor of lokr,
    the nearest Kronecker product. base: for adapters that read theirs, whose ΔW holds for that base from then on.
    other_base: accept a base that the file was not trained on. reading: as in `read`.
    exact: raise LossyError, with the errors, rather than write a module that differs.
    """
    if kind not in KINDS:
        raise OptionError(f"kind={kind!r} was given, one of {', '.join(KINDS)} was expected.{near(kind, KINDS)}")
    keep = Keep(rank, energy, threshold) if (rank, energy, threshold) != (None, None, None) else None
    if keep is not None and kind in ("lokr", "full"):
        raise OptionError(f"{kind} has no ranks to keep: leave out rank, energy and threshold")

    def change(item: Item) -> Delta:
        delta = delta_of(item)
        if kind == "full":
            return Dense(_dense(delta))
        if kind == "lokr":
            return delta if isinstance(delta, Kron) else _kronecker(item, delta, factor)
        if kind == "loha" and isinstance(delta, Hadamard) and keep is None:
            return delta
        low = forms.low_rank(delta) if keep is None else _truncated(delta, keep)
        return low if kind == "lora" else _loha(low)

    return _rewrite(source, out, change, base, other_base, dtype, exact, reading)


def resize(
    source: Source,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    other_base: bool = False,
    dtype: torch.dtype | None = None,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write every module as a LoRA of fewer ranks, the best of that rank there is. See `convert` for the options."""
    keep = Keep(rank, energy, threshold)
    return _rewrite(source, out, lambda item: _truncated(delta_of(item), keep), base, other_base, dtype, False, reading)


def rescale(source: Source, factor: float | Mapping[str, float], out: str | os.PathLike[str]) -> ConvertReport:
    """Write the file with ΔW times a factor, or factors by patterns over modules; the first that matches counts.

    Every other tensor and entry stays as it is. Adapters whose ΔW does not scale by a tensor of theirs (DoRA, OFT)
    raise ExportError: their strength is given where they are merged.
    """
    with about(source, out):
        return _rescale(source, factor, Path(out))


def _rescale(source: Source, factor: float | Mapping[str, float], target: Path) -> ConvertReport:
    path = _one_file(source)
    file = container.read(path)
    modules = _scaling_keys(path, file)
    used: set[str] = set()
    factors = {module: _factor(factor, module, used) for module in modules}
    if isinstance(factor, Mapping) and set(factor) - used:
        raise OptionError(f"the pattern {sorted(set(factor) - used)[0]!r} matches no module of {path}.")
    tensors = file.tensors()
    for module, keys in modules.items():
        for key in keys:
            tensors[key] = (tensors[key].double() * factors[module]).to(tensors[key].dtype)
            if not torch.isfinite(tensors[key].float()).all():
                raise FileError(f"{path}: {key} times {factors[module]:g} is not finite as {tensors[key].dtype}")
    if not os.path.isdir(source) and target.suffix != ".safetensors":
        raise OptionError(f"{target}: the file is called *.safetensors, {target.suffix or 'no suffix'!r} was given")
    _write_like(source, target, tensors, {k: v for k, v in file.metadata.items() if not k.startswith(HASHES)})
    entries = tuple(Converted(m, "", f"× {f:g}", 0.0) for m, f in factors.items())
    size = sum(info.size for info in file.infos.values())
    return ConvertReport(target, entries, size, size)


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
                result = _truncated(result, keep)
            truth = deltas[0] if len(deltas) == 1 else _sum(deltas, cat=True)
            named = first.name if first.name in own_names else _renamed(first.name, own_names, name)
            kinds = "+".join(item.adapter.kind for item, _ in own)
            results.append((replace(first, name=named), kinds, truth, result))
    alpha = _alpha(bundles[0], [result for *_, result in results])
    report = tuple(
        Converted(item.name, kinds, _shown(result), _relative(truth, cast(result, dtype, alpha)))
        for item, kinds, truth, result in results
    )
    written = [(item.name, item.shape, result) for item, _, _, result in results]
    transposed = [item.name for item, *_ in results if item.transposed]
    after = write_deltas(bundles[0], out, written, dtype, transposed)
    return ConvertReport(out, report, sum(bundle.size for bundle in bundles), after)


# -- ΔW to ΔW ----------------------------------------------------------------------------------------------------------


def delta_of(item: Item) -> Delta:
    """ΔW of an adapter of a file, on its base where it reads one."""
    with torch.no_grad():
        if item.adapter.reads_base and item.base is None:
            raise ExportError(
                f"{item.file}: {item.name}: the ΔW of {item.adapter.kind} depends on the base: give base="
            )
        return item.adapter(stand_in(item.shape) if item.base is None else item.base, 1.0)


def _truncated(delta: Delta, keep: Keep) -> LowRank:
    if isinstance(delta, (LowRank, Hadamard, Kron)):
        low = forms.low_rank(delta)
        if low.rank < min(low.shape):
            return truncate(low, keep)[0]
    return nearest(_dense(delta), keep)[0]


def _dense(delta: Delta) -> Tensor:
    """ΔW itself, where memory can be expected to hold it: small factors can claim any size."""
    m, n = delta.shape
    if m * n > _LARGEST:
        raise ExportError(f"a ΔW of {m}×{n} is larger than any weight, and is not written out")
    return delta.dense()


def _loha(low: LowRank) -> Hadamard:
    """B·A ⊙ 1·1ᵀ: the same matrix, with a second product of ones in its first rank."""
    up, down = torch.zeros_like(low.B), torch.zeros_like(low.A)
    up[:, 0], down[0] = 1, 1
    return Hadamard(low.B, low.A, up, down)


def _kronecker(item: Item, delta: Delta, factor: int) -> Kron:
    outer = factorize(item.shape.rows, factor)[0], factorize(item.shape.channels, factor)[0]
    C, D, _ = nearest_kronecker(_dense(delta), outer)
    return Kron(C, D)


def _combined(deltas: Sequence[Delta], method: str, density: float, generator: torch.Generator) -> Delta:
    if method in ("linear", "cat", "svd"):
        return _sum(deltas, cat=method == "cat")
    dense = torch.stack([_dense(delta).float() for delta in deltas])
    if method == "dare":
        kept = torch.rand(dense.shape, generator=generator) < density
        return Dense((dense * kept / density).sum(0))
    count = max(1, math.ceil(density * dense[0].numel()))
    bounds = dense.abs().flatten(1).kthvalue(dense[0].numel() - count + 1).values
    trimmed = dense * (dense.abs() >= bounds[:, None, None])
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
    total = _dense(deltas[0]).float()
    for delta in deltas[1:]:
        total = total + delta.dense()
    return Dense(total)


def cast(delta: Delta, dtype: torch.dtype | None, alpha: float | None = None) -> Delta:
    """The ΔW that factors kept in a dtype stand for. alpha: the one a file has for all, with the rest in B."""
    if dtype is None:
        return delta

    def kept(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(tensor.dtype)

    if isinstance(delta, LowRank):
        fold = 1.0 if alpha is None else delta.rank / alpha
        return LowRank(kept(delta.B * fold) / fold, kept(delta.A))
    if isinstance(delta, Hadamard):
        return Hadamard(kept(delta.B1), kept(delta.A1), kept(delta.B2), kept(delta.A2))
    if isinstance(delta, Kron):
        return Kron(kept(delta.C), kept(delta.right), None if delta.left is None else kept(delta.left))
    return Dense(kept(delta.dense()))


def _alpha(like: Bundle, deltas: Sequence[Delta]) -> float | None:
    """The alpha that all low-rank modules of a file of this format share; None where they have none."""
    ranks = [delta.rank for delta in deltas if isinstance(delta, LowRank)]
    return float(Counter(ranks).most_common(1)[0][0]) if ranks and like.format == "kohya" else None


def _relative(truth: Delta, written: Delta) -> float:
    gap, norm = distance(truth, written)
    return gap / norm if norm else gap


def _shown(delta: Delta) -> str:
    if isinstance(delta, LowRank):
        return f"lora {delta.rank}"
    if isinstance(delta, Hadamard):
        return f"loha {delta.rank}"
    return "lokr" if isinstance(delta, Kron) else "full"


# -- files -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _rewrite(
    source: Source,
    out: str | os.PathLike[str],
    change: Callable[[Item], Delta],
    base: nn.Module | str | os.PathLike[str] | None,
    other_base: bool,
    dtype: torch.dtype | None,
    exact: bool,
    reading: Reading,
) -> ConvertReport:
    """Write what `change` makes of every module of a file."""
    with about(source, out):
        items = list(items_of_file(source, base, other_base, **reading))
        return _changed(read(source, **reading), Path(out), items, change, dtype, exact)


def _changed(
    like: Bundle,
    out: Path,
    items: Sequence[Item],
    change: Callable[[Item], Delta],
    dtype: torch.dtype | None,
    exact: bool,
) -> ConvertReport:
    deltas: list[tuple[str, Shape, Delta]] = []
    transposed: list[str] = []
    report: list[Converted] = []
    for item in items:
        deltas.append((item.name, item.shape, change(item)))
        transposed += [item.name] if item.transposed else []
    alpha = _alpha(like, [delta for _, _, delta in deltas])
    for item, (_, _, delta) in zip(items, deltas, strict=True):
        rank = item.adapter.options.get("rank")
        before = item.adapter.kind + (f" {rank}" if rank else "")
        error = _relative(delta_of(item), cast(delta, dtype, alpha))
        report.append(Converted(item.name, before, _shown(delta), error))
    lossy = [m for m in report if m.error > EXACT]
    if exact and lossy:
        worst = max(lossy, key=lambda m: m.error)
        raise LossyError(
            f"{len(lossy)} of {len(report)} modules would differ, most of all {worst.name} by {100 * worst.error:.3g} "
            "%; nothing was written. Leave out exact, or keep more ranks"
        )
    size = write_deltas(like, out, deltas, dtype, transposed)
    return ConvertReport(out, tuple(report), like.size, size)


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


def _scaling_keys(path: Path, file: container.Container) -> dict[str, list[str]]:
    """Module -> the tensors that multiply its whole ΔW."""
    if native.KEY in file.metadata:
        header = native.decode(file.metadata, path)
        owned = native.sorted_by_weight(file.infos, header.records)
        found = {w: [k for k in owned.get(w, ()) if k.rpartition(".")[2] in _NATIVE] for w in header.records}
        kinds = {w: record.kind for w, record in header.records.items()}
    else:
        modules, _ = peft.modules(list(file.infos)) if path.name == peft.WEIGHTS else kohya.split(file.infos)
        found = {m: [key for role, key in roles.items() if role in _ROLES] for m, roles in modules.items()}
        bound = ("dora_scale", "magnitude", "oft_blocks", "oft_R", "ia3_l")
        kinds = {m: next((role for role in roles if role in bound), "lora") for m, roles in modules.items()}
    for module, kind in kinds.items():
        if (
            kind in ("dora", "oft", "boft", "loldu", "dora_scale", "magnitude", "oft_blocks", "oft_R", "ia3_l")
            or not found[module]
        ):
            raise ExportError(
                f"{path}: {module} ({kind}) has no tensor that scales its ΔW alone; give its strength where it is "
                "merged, or convert it to lora first"
            )
    return found


#: tensors that are a factor of the whole ΔW, by role in other formats and by name in this library's
_ROLES = frozenset(
    {"up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "w_norm", "b_norm", "a1", "b1", "ia3_weight"}
)
_NATIVE = frozenset({"up", "up1", "outer", "outer_left", "change", "gate", "base_up"})


def _factor(factor: float | Mapping[str, float], module: str, used: set[str]) -> float:
    if not isinstance(factor, Mapping):
        require_strength(factor)
        return float(factor)
    for pattern, value in factor.items():
        if fnmatch.fnmatchcase(module, pattern):
            require_strength(value)
            used.add(pattern)
            return float(value)
    return 1.0


def _one_file(source: Source) -> Path:
    path = Path(source)
    return path / peft.WEIGHTS if os.path.isdir(path) else path


def _write_like(source: Source, out: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    if not os.path.isdir(source):
        container.write(out, tensors, entries)
        return
    with container.atomic_folder(out) as folder:
        (folder / peft.CONFIG).write_bytes((Path(source) / peft.CONFIG).read_bytes())
        with (folder / peft.WEIGHTS).open("xb") as file:
            container.emit(file, tensors, entries)


def canonical(items: Sequence[Item]) -> dict[str, Item]:
    """Items under names that do not depend on who wrote the file."""
    shapes = {item.name: (item.shape.rows, item.shape.columns) for item in items}
    family = next(iter(names.guess(shapes)), None)
    found: dict[str, Item] = {}
    for item in items:
        modules = () if family is None else family.find(item.name)
        name = modules[0].name if len(modules) == 1 else plain(item.name)
        if name in found:
            raise MismatchError(f"{item.file}: {item.name} and {found[name].name} are the same module")
        found[name] = item
    return found
