"""Join a patch to a weight: check that it fits, and make the adapter it describes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter, Stored
from peftkit.adapters.base import placeholder_weight as placeholder_weight
from peftkit.errors import FileError, MergedFormWarning, OptionError, UnknownAdapterError, error_context
from peftkit.files.formats.patch import Patch
from peftkit.geometry import Shape
from peftkit.kernels.blocks import all_finite
from peftkit.wrapping.walk import dotted


@dataclass(frozen=True)
class Misfit:
    """Why a patch does not fit a weight, key by key."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        """One reason, for a message."""
        for what in ("mismatched", "missing", "unexpected", "non_finite"):
            if getattr(self, what):
                return f"{what.replace('_', '-')}: {getattr(self, what)[0]}"
        return ""

    def named(self, site_name: str) -> Misfit:
        """Return the same with the weight's name before each key."""

        def named(keys: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(dotted(site_name, key) for key in keys)

        unexpected = tuple(f"{key}: its adapter has no such parameter here" for key in named(self.unexpected))
        mismatched = tuple(
            k if ": " in k and site_name in k.partition(": ")[2] else dotted(site_name, k) for k in self.mismatched
        )
        return Misfit(named(self.missing), unexpected, mismatched, named(self.non_finite))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched or self.non_finite)


def misfit(
    patch: Patch, shape: Shape, dtype: torch.dtype, *, portable: bool, where: str, numbers: bool = True
) -> Misfit:
    """What is wrong with putting this patch on a weight of that shape and dtype.

    where: file and weight, for errors. numbers: whether to read them, for those that are not finite.
    """
    if not fits(patch, shape):
        return Misfit(mismatched=(f"{where}: the file adapts a {described(patch)} weight, the model's is {shape}",))
    # Built without memory first: a file is free to ask for any rank
    sketch = make(patch, shape, torch.empty(shape.rows, shape.columns, dtype=dtype, device="meta"), where)
    expected = {key: sketch.state_dict()[key] for key in stored_keys(sketch, portable)}
    found = patch.on(shape).tensors
    both = [(key, found[key], e) for key, e in expected.items() if key in found]
    unlike = [(key, t, e) for key, t, e in both if not alike(t, e)]
    mismatched = [f"{key}: {shown(t)} in the file, {shown(e)} expected" for key, t, e in unlike]
    if numbers and not mismatched and len(both) == len(expected) and (why := sketch.refused(found)):
        mismatched.append(why)
    return Misfit(
        missing=tuple(key for key in expected if key not in found and key not in sketch.from_base),
        unexpected=tuple(key for key in found if key not in expected),
        mismatched=tuple(mismatched),
        non_finite=tuple(key for key, t, e in both if numbers and not all_finite(t.to(e.dtype))),
    )


def bind(patch: Patch, shape: Shape, weight: Tensor, where: str) -> Adapter:
    """The adapter a patch describes, on a weight it fits. weight: W (m, n)."""
    adapter = make(patch, shape, weight, where)
    if patch.on_kernel and shape.positions > 1:
        warnings.warn(patch.on_kernel, MergedFormWarning, stacklevel=2)
    with error_context(where):
        fill(adapter, weight, patch.on(shape).tensors)
    return adapter.eval()


def make(patch: Patch, shape: Shape, weight: Tensor, where: str) -> Adapter:
    """A fresh adapter as a patch describes it. weight: W (m, n)."""
    try:
        adapter = registry.build(patch.kind, shape, weight, None, **patch.options)
    except (OptionError, UnknownAdapterError, TypeError, RuntimeError) as error:  # a rank of 10¹⁸ is a RuntimeError
        raise FileError(f"{where}: {str(error).splitlines()[0]}") from error
    if patch.convention is not None and adapter.convention != patch.convention:
        raise FileError(
            f"{where} was written under the convention {patch.convention!r}, {patch.kind} is now "
            f"{adapter.convention!r}: the numbers would mean something else"
        )
    return adapter


def fill(adapter: Adapter, weight: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Give a file's tensors to an adapter, and derive from W what the file does not hold. weight: W (m, n)."""
    own = adapter.state_dict()
    given = {key: tensor.to(own[key].device, own[key].dtype) for key, tensor in tensors.items() if key in own}
    adapter.load_state_dict({**own, **given}, assign=True)  # a large file is not held twice
    if not set(adapter.derived()) <= set(tensors):
        adapter.rebase_(weight)


def needs_base(patch: Patch, shape: Shape, portable: bool) -> bool:
    """Whether ΔW depends on the base: by what the adapter does, or because the file leaves out its base's factors."""
    if registry.get(patch.kind).needs_base(patch.options):
        return True
    return not portable and is_of_its_base(patch, shape)


def is_of_its_base(patch: Patch, shape: Shape) -> bool:
    """Whether its ΔW is made of factors of the base it was trained on."""
    weight = torch.empty(shape.rows, shape.columns, device="meta")
    return bool(make(patch, shape, weight, patch.kind).derived())


def stored_keys(adapter: Adapter, portable: bool) -> list[str]:
    """The tensors a file holds: all of the adapter's, without what its base can give again unless portable."""
    derived = adapter.derived()
    return [key for key in adapter.state_dict() if portable or key not in derived]


def fits(patch: Patch, shape: Shape) -> bool:
    """Whether the patch is of such a weight, as far as its file says. A 1×1 kernel and none are the same."""
    ours = patch.shape
    if patch.per_channel:
        return ours.channels == shape.channels and ours.rows in (0, shape.rows)
    if ours.rows not in (0, shape.rows) or ours.columns not in (0, shape.columns):
        return False
    if not patch.kernel_known or ours.positions == shape.positions == 1:
        return True
    return ours.kernel == shape.kernel


def described(patch: Patch) -> str:
    """The shape of the weight a patch is for, in words."""
    if patch.per_channel:
        return f"{patch.shape.channels}-channel"
    if not patch.shape.rows:
        return f"fan-in-{patch.shape.columns}"
    return str(patch.shape) if patch.shape.columns else f"{patch.shape.rows}-row"


def alike(ours: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have one shape, and are both of floating point or both not."""
    return ours.shape == expected.shape and ours.is_floating_point() == expected.is_floating_point()


def shown(tensor: Tensor) -> str:
    """Return a tensor's shape for a message, with the dtype where it is not of floating point."""
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} {tensor.dtype}"


def turned_patch(patch: Patch) -> Patch:
    """Return the low-rank patch of the transposed matrices of a stack of experts."""
    tensors = {"up": patch.tensors["down"].mT, "down": patch.tensors["up"].mT}
    return replace(patch, tensors=tensors, shape=patch.shape.turned)


def take_rows(patch: Patch, rows: Tensor, where: str) -> Patch:
    """Make the patch of some rows of its weight, with the same ΔW row by row.

    Args:
        patch: the patch of the whole weight.
        rows: (k,) the numbers of the rows.
        where: file and weight, for errors.

    Raises:
        FileError: the algorithm mixes rows, so that no adapter of its kind has these rows alone.
    """
    try:
        taken = registry.get(patch.kind).of_rows(Stored(patch.kind, patch.options, patch.tensors), patch.shape, rows)
    except (OptionError, TypeError, RuntimeError) as error:
        raise FileError(f"{where}: {str(error).splitlines()[0]}") from error
    if taken is None:
        raise FileError(
            f"{where}: {patch.kind} mixes the rows of its weight, which this model keeps in several layers; merge the "
            "file into the checkpoint it was made for, or export it as low rank against its base first"
        )
    shape = Shape(len(rows), patch.shape.channels, patch.shape.kernel)
    if taken.kind != patch.kind:  # what describes the other kind does not describe this one
        return Patch(taken.kind, taken.options, shape, taken.tensors)
    # Parts of a shared parameter are parameters of their own
    return replace(patch, options=taken.options, tensors=taken.tensors, shape=shape, common={})
