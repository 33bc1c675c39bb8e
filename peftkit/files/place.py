"""Where the patches of a file go in a base: the tensors, their rows, and the weight they make together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.errors import MismatchError, UnsupportedLayerError
from peftkit.files.base import Base
from peftkit.files.families import layouts, names
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import sample_index
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.files.resolve import Resolver
from peftkit.geometry import Geometry, Shape
from peftkit.wrapping.recurrence import WEIGHT
from peftkit.wrapping.stacks import StackGeometry
from peftkit.wrapping.vectors import is_bias

#: dtypes by the container's names that ΔW can be added to
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def resolver_of(base: Base) -> tuple[Resolver, tuple[names.Family, ...]]:
    """What finds the weights of a base by the names in adapter files, and the base's family where it is known."""
    layout = layouts.of_checkpoint(base.shapes)

    def place(canonical: str) -> Placement | None:
        found = None if layout is None else layout.locate(canonical)
        return found if found is not None and found.weight in base.where else None

    stacks = {key: Placement(key) for key in base.where if _may_be_stack(key, base.info(key).shape)}
    return Resolver({**dict(paths_of(base)), **stacks}, place), () if layout is None else (layout.family,)


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
    info = base.info(key)
    if info.dtype not in FLOATS:
        raise UnsupportedLayerError(
            f"{where}: {key} of {base.path} is {info.dtype}, quantised, and its numbers are not the weight: merge into "
            "the checkpoint that it was made of, or load both into a model and merge there with into="
        )
    if info.dtype.startswith("F8"):
        path = key.removesuffix(".weight")
        scales = [f"{path}.{end}" for end in ("scale_weight", "weight_scale", "weight_scale_inv", "scale")]
        scale = next((s for s in (*scales, "scaled_fp8") if s in base.where), None)
        if scale is not None:
            raise UnsupportedLayerError(
                f"{where}: {key} of {base.path} is {info.dtype} under the scale {scale}: its numbers are not the "
                "weight; merge into the 16-bit checkpoint it was made from"
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
