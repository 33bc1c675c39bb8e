"""Join a patch to a weight: check that it fits, and make the adapter it describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.errors import FileError, OptionError, UnknownAdapterError, WrongBaseError, error_context
from peftkit.files.formats import native
from peftkit.files.formats.patch import Patch
from peftkit.geometry import Shape

_SAMPLES = 32


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

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched or self.non_finite)


def misfit(patch: Patch, shape: Shape, dtype: torch.dtype, *, portable: bool, where: str) -> Misfit:
    """What is wrong with putting this patch on a weight of that shape and dtype. where: file and weight, for errors."""
    if not fits(patch, shape):
        return Misfit(mismatched=(f"{where}: the file adapts a {described(patch)} weight, the model's is {shape}",))
    # Built without memory first: a file is free to ask for any rank
    sketch = make(patch, shape, torch.empty(shape.rows, shape.columns, dtype=dtype, device="meta"), where)
    expected = {key: sketch.state_dict()[key] for key in stored_keys(sketch, portable)}
    found = patch.tensors
    both = [(key, found[key], e) for key, e in expected.items() if key in found]
    unlike = [(key, t, e) for key, t, e in both if not alike(t, e)]
    return Misfit(
        missing=tuple(key for key in expected if key not in found and key not in sketch.from_base),
        unexpected=tuple(key for key in found if key not in expected),
        mismatched=tuple(f"{key}: {shown(t)} in the file, {shown(e)} expected" for key, t, e in unlike),
        non_finite=tuple(key for key, t, e in both if not torch.isfinite(t.to(e.dtype)).all()),
    )


def bind(patch: Patch, shape: Shape, weight: Tensor, where: str) -> Adapter:
    """The adapter a patch describes, on a weight it fits. weight: W (m, n)."""
    adapter = make(patch, shape, weight, where)
    with error_context(where):
        fill(adapter, weight, patch.tensors)
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
    if registry.get(patch.kind).reads_base:
        return True
    return not portable and is_of_its_base(patch, shape)


def is_of_its_base(patch: Patch, shape: Shape) -> bool:
    """Whether its ΔW is made of factors of the base it was trained on."""
    weight = torch.empty(shape.rows, shape.columns, device="meta")
    return bool(make(patch, shape, weight, patch.kind).derived())


def require_same_base(
    file: object,
    base: str,
    distances: Mapping[str, float],
    kinds: Mapping[str, str],
    bound: Collection[str],
    told: bool,
) -> None:
    """Raise WrongBaseError if a file's fingerprints are of other weights than the base's.

    distances: weight -> how far it is from its fingerprint. kinds: weight -> kind. bound: the weights whose ΔW is made
    of factors of their base. told: whether the user said other_base=True, which does not help those.
    """
    far = [name for name, distance in distances.items() if distance > native.SAME_BASE]
    if not far or (told and not set(bound) & set(far)):
        return
    lost = [name for name in far if name in bound]
    worst = max(far, key=lambda name: distances[name])
    meaning = "; ".join(f"{k} {registry.get(k).on_another_base}" for k in sorted({kinds[n] for n in lost or far}))
    advice = "" if lost else " To use it there on purpose, pass other_base=True."
    raise WrongBaseError(
        f"{file} was trained on another base than {base}: {len(far)} of {len(distances)} weights differ, most of all "
        f"{worst or 'its own'} by {100 * distances[worst]:.3g} %. On another base, {meaning}.{advice}"
    )


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
    return ours.shape == expected.shape and ours.is_floating_point() == expected.is_floating_point()


def shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} {tensor.dtype}"


def sample_index(size: int) -> Tensor:
    """Where a fingerprint looks in a weight of that many entries, row by row."""
    return torch.linspace(0, size - 1, _SAMPLES, dtype=torch.float64).long()


def samples(weight: Tensor) -> np.ndarray:
    """Entries of W (m, n) spread evenly over it, in float32: a fingerprint that survives a cast."""
    index = sample_index(weight.numel()).to(weight.device)
    return weight.detach()[index // weight.shape[1], index % weight.shape[1]].float().cpu().numpy()


def take_rows(patch: Patch, rows: Tensor, where: str) -> Patch:
    """The patch of some rows of its weight, the same ΔW row by row. rows: (k,) their numbers.

    Exact for every kind but those that mix rows, which raise FileError; a Kronecker product becomes its dense rows.
    """
    t = patch.tensors
    shape = Shape(len(rows), patch.shape.channels, patch.shape.kernel)
    if patch.kind in ("lora", "loha"):
        by_row = ("up",) if patch.kind == "lora" else ("up1", "up2")
        return replace(patch, shape=shape, tensors={k: v[rows] if k in by_row else v.clone() for k, v in t.items()})
    if patch.kind == "full":
        return replace(patch, shape=shape, tensors={"change": t["change"][rows]})
    if patch.kind == "ia3" and patch.options.get("side") == "out":
        return replace(patch, shape=shape, tensors={"gate": t["gate"][rows]})
    if patch.kind == "dora" and patch.options["axis"] == "out":
        inner = take_rows(inner_of(patch), rows, where)
        same = inner.kind == patch.options["inner"]
        options = patch.options if same else {"inner": inner.kind, "axis": "out"}
        tensors = {f"inner.{k}": v for k, v in inner.tensors.items()}
        tensors |= {k: v[rows] for k, v in t.items() if not k.startswith("inner.")}
        return replace(patch, options=options, shape=shape, tensors=tensors)
    if patch.kind == "lokr":
        base = placeholder_weight(patch.shape)
        change = bind(patch, patch.shape, base, where).delta(base).dense().detach()
        return Patch("full", {}, shape, {"change": change[rows]})
    raise FileError(
        f"{where}: {patch.kind} mixes the rows of its weight, which this model keeps in several layers; merge the file "
        "into the checkpoint it was made for, or export it as low rank against its base first"
    )


def inner_of(patch: Patch) -> Patch:
    """The adapter inside a DoRA."""
    options = {k: v for k, v in patch.options.items() if k not in ("inner", "axis", "detach_norm")}
    tensors = {k.removeprefix("inner."): v for k, v in patch.tensors.items() if k.startswith("inner.")}
    return replace(patch, kind=patch.options["inner"], options=options, tensors=tensors, convention=None)


def placeholder_weight(shape: Shape) -> Tensor:
    """A weight (m, n) for adapters that never look at it: one zero, seen everywhere."""
    return torch.zeros(()).expand(shape.rows, shape.columns)
