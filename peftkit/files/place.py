"""Where the patches of a file go in a base: the tensors, their rows, and the weight they make together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.errors import AmbiguousFileError, MismatchError, UnsupportedLayerError
from peftkit.files.base import Base
from peftkit.files.families import layouts, names
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import sample_index
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.files.quantised import unread, unread_modules
from peftkit.files.resolve import TWINS, Resolver
from peftkit.geometry import Geometry, Shape
from peftkit.wrapping.recurrence import WEIGHT
from peftkit.wrapping.stacks import StackGeometry
from peftkit.wrapping.vectors import is_bias

#: dtypes by the container's names that ΔW can be added to
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def resolver_of(base: Base, component: str | None = None) -> tuple[Resolver, tuple[names.Family, ...]]:
    """What finds the weights of a base by the names in adapter files, and the base's family where it is known.

    component: the only part of a pipeline in which they are looked for.
    """
    part = base if component is None else base.part(component)
    layout = layouts.of_checkpoint(part.shapes)
    prefix = "" if part is base else f"{component}."

    def in_base(own: Placement) -> Placement:
        return replace(own, weight=prefix + own.weight, bias=own.bias and prefix + own.bias)

    def place(canonical: str) -> Placement | None:
        found = None if layout is None else layout.locate(canonical)
        if found is None or found.weight not in part.where:
            return None
        _refuse_twin(base, in_base(found).weight, component)
        return in_base(found)

    paths = dict(paths_of(part)) | {
        key: Placement(key) for key in part.where if _may_be_stack(key, part.info(key).shape)
    }
    paths |= {path: Placement(key) for path, key in unread_modules(part)}
    paths = {path: in_base(own) for path, own in paths.items()}
    if component is not None:
        paths |= {f"{component}.{path}": own for path, own in paths.items()}
    return Resolver(paths, place), () if layout is None else (layout.family,)


def _refuse_twin(base: Base, weight: str, component: str | None) -> None:
    """Raise AmbiguousFileError for a weight that both experts of a pipeline have, unless it was said which is meant."""
    own, _, rest = weight.partition(".")
    others = [twin for twin in TWINS if twin != own and f"{twin}.{rest}" in base.where] if own in TWINS else []
    if others and component is None:
        options = " or ".join(f"component={part!r}" for part in sorted({own, *others}))
        raise AmbiguousFileError(f"{rest} is in {' and '.join(sorted({own, *others}))} of {base.path}: pass {options}")


def known_families(base: Base) -> tuple[names.Family, ...]:
    """Return the family of a base whose denoiser is in it, () where that is none known here."""
    layout = layouts.of_checkpoint(base.shapes)
    if layout is None or not any(name.startswith(f"{layout.family.components[0]}.") for name in layout.places):
        return ()
    return (layout.family,)


def _may_be_stack(key: str, sizes: Sequence[int]) -> bool:
    """Whether a tensor may hold a matrix for each of several experts: of three dimensions, and no convolution's."""
    return len(sizes) == 3 and 0 not in sizes and key.rpartition(".")[2] != "weight"


def stack_of(base: Base, part: Placement, patch: Patch) -> StackGeometry:
    """Return how the stack of experts that a patch is of lies in a base.

    Raises:
        MismatchError: the tensor is no stack of so many experts, or the patch does not say which way its matrices lie.
    """
    sizes, one = base.info(part.weight).shape, patch.shape.one
    if len(sizes) != 3 or sizes[0] != patch.shape.experts or part.start is not None:
        raise MismatchError(f"{part.weight} of {base.path} is {sizes}, and the file adapts {patch.shape}")
    if patch.transposed or patch.convention is not None:
        return StackGeometry(sizes, patch.transposed)
    if one.rows == one.columns:
        raise MismatchError(
            f"{part.weight} of {base.path} is {sizes}, and the file does not say which way these square matrices lie: "
            "load it onto the model and save it as this library's own file, which says it"
        )
    return StackGeometry(sizes, transposed=tuple(sizes[1:]) != (one.rows, one.columns))


def nowhere(resolver: Resolver, name: str, bundle: AdapterFile, patch: Patch) -> str:
    """Return what may help where a base has no weight of the name that a patch has here, for a message."""
    if patch.shape.experts == 1:
        return resolver.hint(name, bundle.name_in_file(name))
    return (
        " It is of a stack of experts, and the base has none of that name (checkpoints of transformers may have a "
        "tensor for each expert): load the file onto the model, pk.merge(model, backup=None) and save the model"
    )


def paths_of(base: Base) -> Iterator[tuple[str, Placement]]:
    """Module path -> its weight, and the projections of an nn.MultiheadAttention."""

    def bias(key: str) -> str | None:
        return key if key in base.where else None

    for key in base.where:
        path, _, last = key.rpartition(".")
        prefix = key.removesuffix(last)
        if last == "weight":
            yield path, Placement(key, bias(f"{prefix}bias"))
        elif len(base.info(key).shape) == (2 if WEIGHT.fullmatch(last) else 1 if is_bias(last) else None):
            yield key, Placement(key)
        elif last == "in_proj_weight" and len(base.info(key).shape) == 2:
            rows = base.info(key).shape[0] // 3
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                yield f"{prefix}{name}", Placement(key, bias(f"{prefix}in_proj_bias"), i * rows, (i + 1) * rows)
        elif last in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield key.removesuffix("_weight"), Placement(key)


def require_addable(base: Base, key: str, where: str) -> None:
    """Refuse weights whose numbers are not what the layer computes with."""
    info, foreign = base.info(key), unread(base, key)
    if foreign:
        raise UnsupportedLayerError(f"{where}: {foreign}")
    if info.dtype not in FLOATS:
        raise UnsupportedLayerError(
            f"{where}: {key} of {base.path} is {info.dtype}, quantised in a format that is not read: merge into the "
            "16-bit checkpoint that it was made of, or load both into a model and merge there with into="
        )


def shape_of(base: Base, parts: Sequence[Placement], patch: Patch) -> Shape:
    """The weight that a patch's parts make together. Raises MismatchError for one that no layer has."""
    for part in parts:
        sizes = base.info(part.weight).shape
        if len(sizes) == 1 and sizes[0] and registry.get(patch.kind).vectors:
            continue
        if not 2 <= len(sizes) <= 5 or 0 in sizes:
            raise MismatchError(f"{part.weight} of {base.path} is {sizes}, and {patch.kind} changes matrices")
    if patch.transposed and patch.shape.kernel and base.info(parts[0].weight).shape[0] % patch.shape.groups:
        raise MismatchError(f"{parts[0].weight} of {base.path} is in no {patch.shape.groups} groups")
    if patch.shape.experts > 1:
        return stack_of(base, parts[0], patch).shape
    info, rows = base.info(parts[0].weight), sum(rows_of(base, part) for part in parts)
    if len(info.shape) == 1:
        return Shape(rows, 1)
    if parts[0].transposed:
        return Shape(rows, info.shape[0])
    kernel = info.shape[2:]
    if patch.transposed and kernel:
        return Geometry.of_weight(info.shape, patch.shape.groups, transposed=True).shape
    return Shape(rows, info.shape[1], kernel, patch.shape.groups)


def oriented(parts: tuple[Placement, ...], patch: Patch) -> tuple[Placement, ...]:
    """Return the places of a patch, kept as (in, out) if it is of a Conv1D of GPT-2."""
    if patch.transposed and not patch.shape.kernel and patch.shape.experts == 1:
        return tuple(replace(part, transposed=True) for part in parts)
    return parts


def rows_of(base: Base, part: Placement) -> int:
    """How many outputs a part is."""
    shape = base.info(part.weight).shape
    if part.start is not None and part.stop is not None:
        return part.stop - part.start
    return shape[1] if part.transposed else next(iter(shape), 1)


@dataclass(frozen=True)
class Span:
    """Rows [start, start + size) of a tensor, which get rows [first, first + size) of what is added."""

    key: str
    start: int
    first: int
    size: int


def spans(base: Base, parts: Sequence[Placement], *, bias: bool = False) -> tuple[Span, ...]:
    """Where the rows of a patch on these parts go; or the entries of a change of their bias."""
    found: list[Span] = []
    first = 0
    for part in parts:
        size, start = rows_of(base, part), part.start or 0
        key = part.bias if bias else part.weight
        assert key is not None
        if part.swapped:
            half = size // 2
            found += [Span(key, start, first + half, half), Span(key, start + half, first, half)]
        else:
            found.append(Span(key, start, first, size))
        first += size
    return tuple(found)


def samples_of(base: Base, part: Placement, patch: Patch) -> np.ndarray:
    """The fingerprint of a weight, read from its file entry by entry."""
    info, shape = base.info(part.weight), shape_of(base, [part], patch)
    index = sample_index(shape.rows * shape.columns)
    row, column = index // shape.columns, index % shape.columns
    if patch.shape.experts > 1:
        m, n = shape.one.rows, shape.columns
        turned = (row // m * n + column) * m + row % m
        index = turned if stack_of(base, part, patch).transposed else index
    elif part.transposed:
        index = column * shape.rows + row
    elif patch.transposed and len(info.shape) > 2:  # (in, out of a group, *kernel)
        outputs = info.shape[1]
        channel, position = column // shape.positions, column % shape.positions
        inputs = row // outputs * shape.channels + channel
        index = (inputs * outputs + row % outputs) * shape.positions + position
    else:
        index = index + (part.start or 0) * shape.columns
    return base.elements(part.weight, index.tolist()).float().numpy()


def _matrix(base: Base, part: Placement, patch: Patch) -> Tensor:
    """The rows of a weight that a part means, in the patch's order: (rows, n)."""
    weight = as_matrix(base.tensor(part.weight))
    if patch.shape.experts > 1:
        return stack_of(base, part, patch).matrix(weight)
    if part.transposed:
        weight = weight.mT
    elif patch.transposed and weight.dim() > 2:
        return Geometry.of_weight(tuple(weight.shape), patch.shape.groups, transposed=True).matrix(weight)
    rows = weight.flatten(1)[part.start : part.stop]
    return rows.roll(len(rows) // 2, 0) if part.swapped else rows


def as_matrix(weight: Tensor) -> Tensor:
    """Return a norm's weight or a bias as a column (p, 1), a view; any other weight as it is."""
    return weight[:, None] if weight.dim() == 1 else weight


def whole(base: Base, parts: Sequence[Placement], patch: Patch) -> Tensor:
    """W (m, n) of a patch, with fp8 decoded."""
    rows = [_matrix(base, part, patch) for part in parts]
    W = rows[0] if len(rows) == 1 else torch.cat(rows)
    return W.float() if W.itemsize < 2 else W


def require_same_keys(base: Base, origin: Base, parts: Sequence[Placement]) -> None:
    """Raise MismatchError unless the origin has the base's tensors of these parts."""
    for part in parts:
        if part.weight not in origin.where:
            raise MismatchError(f"origin {origin.path} has no {part.weight}: it must have the layout of the base")
        ours, theirs = base.info(part.weight).shape, origin.info(part.weight).shape
        if ours != theirs:
            raise MismatchError(f"{part.weight} is {ours} in {base.path} and {theirs} in the origin {origin.path}")
