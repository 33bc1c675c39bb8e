"""The extras of a file, parameters that trained beside its adapters, on a model and on a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from peftkit.delta.addition import MergedWeight
from peftkit.errors import AmbiguousFileError, LossyError, MergeError, TiedWeightsError, did_you_mean
from peftkit.files.base import Base
from peftkit.files.bind import Misfit, alike, shown
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.resolve import HINTS, WEIGHT_PREFIXES
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.wrapping.extras import BaseParameter, base_parameters
from peftkit.wrapping.walk import dotted


@dataclass(frozen=True)
class PlacedExtras:
    """The extras of a file on a model: values by the parameter they go to, and why the others have no place."""

    values: Mapping[BaseParameter, Tensor] = field(default_factory=dict)
    misfit: Misfit = field(default_factory=Misfit)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that get a value."""
        return tuple(own.name for own in self.values)

    def of(self, module: nn.Module, key: str) -> Tensor | None:
        """The value that a module's parameter gets, in its dtype; None where it keeps its own."""
        return next((v for own, v in self.values.items() if own.module is module and own.key == key), None)


def placed(bundle: AdapterFile, model: nn.Module) -> PlacedExtras:
    """Find the parameters of a model that the extras of a file are the values of."""
    known = {own.name: own for own in base_parameters(model, every_name=True)} if bundle.extras else {}
    values: dict[BaseParameter, Tensor] = {}
    taken: dict[int, tuple[str, Tensor]] = {}
    unexpected: list[str] = []
    mismatched: list[str] = []
    non_finite: list[str] = []
    for name, tensor in bundle.extras.items():
        if name not in known:
            hint = did_you_mean(name, known) if len(unexpected) < HINTS else ""
            unexpected.append(f"{name}: the model has no parameter {name!r}.{hint}")
            continue
        own = known[name].tensor
        other, value = taken.setdefault(id(own), (name, tensor))
        if not alike(tensor, own):
            mismatched.append(f"{name}: {shown(tensor)} in the file, {shown(own)} in the model")
        elif not torch.isfinite(tensor.to(own.dtype)).all():
            non_finite.append(name)
        elif other == name:
            values[known[name]] = tensor.to(own.device, own.dtype)
        elif not torch.equal(value, tensor):
            mismatched.append(f"{name}: it is one parameter with {other} in the model, and another one in the file")
    _require_own(bundle, known, values)
    return PlacedExtras(values, Misfit((), tuple(unexpected), tuple(mismatched), tuple(non_finite)))


def _require_own(
    bundle: AdapterFile, known: Mapping[str, BaseParameter], values: Mapping[BaseParameter, Tensor]
) -> None:
    """Refuse values of copies, which modules_to_save of PEFT makes, for parameters that several layers share."""
    copied = bundle.config.get("modules_to_save") or ()
    for own in values:
        module = own.name.rpartition(".")[0]
        if module.rpartition(".")[2] not in copied and module not in copied:
            continue
        other = next((n for n, p in known.items() if p.tensor is own.tensor and n not in bundle.extras), None)
        if other is not None:
            raise TiedWeightsError(
                f"{own.name}: PEFT trained a copy of it (modules_to_save), and the model has one parameter for it and "
                f"{other}. Give it its own first: model.{module} = copy.deepcopy(model.{module}); or pass extras=False"
            )


def under_adapters(bundle: AdapterFile) -> dict[str, str]:
    """Return the adapters of a file that are on one of its extras, and that extra, by name."""
    found: dict[str, str] = {}
    for site in bundle.patches if bundle.extras else ():
        parent, _, own = site.rpartition(".")  # "attn.q_proj" may be rows of "attn.in_proj_weight"
        weights = (dotted(site, "weight"), dotted(parent, "in_proj_weight"), dotted(parent, f"{own}_weight"))
        for weight in (name for name in weights if name in bundle.extras):
            found[site] = weight
    return found


def refuse_extras(bundle: AdapterFile, path: object, what: str) -> None:
    """Raise LossyError for a file with extras, which `what` cannot hold."""
    if bundle.extras:
        raise LossyError(
            f"{path} holds {listed(tuple(bundle.extras))} that trained beside the adapters, and {what}; load the file "
            "and save it with extras=False to leave them out"
        )


def listed(names: Sequence[str]) -> str:
    """Return how many parameters these are, and the first names, for a message."""
    first = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} ({first})"


def key_in(base: Base, name: str) -> str | None:
    """Return the tensor of a checkpoint that a model's parameter is, None where there is none.

    Raises:
        AmbiguousFileError: several of a pipeline's parts have such a tensor.
    """
    if name in base.where:
        return name
    found = [prefix + name for prefix in WEIGHT_PREFIXES if prefix + name in base.where]
    if len(found) > 1:
        raise AmbiguousFileError(f"{name} can be {' or '.join(found)} of {base.path}: merge into one part's folder")
    return found[0] if found else None


@torch.no_grad()
def blend_(weight: Tensor, key: str, extras: Sequence[tuple[str, float, Tensor]]) -> MergedWeight:
    """Make a weight W + Σ λ·(E − W) in place, and say what that did to it. With one E and λ = 1 it is E, bit for bit.

    Args:
        weight: W, of any shape.
        key: its name, for the report.
        extras: file, strength λ and trained value E, each.

    Raises:
        MergeError: the result is not finite in the weight's dtype.
    """
    wide = torch.promote_types(accumulation_dtype(weight.dtype), torch.float32)
    before = weight.to(wide, copy=True)
    change = torch.zeros_like(before)
    for _, strength, value in extras:
        change += strength * (value.to(wide) - before)
    (_, strength, value), *others = extras
    weight.copy_(value if strength == 1 and not others else before + change)
    moved = weight.to(wide) - before
    norm, size, lost = (
        float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (change, moved, change - moved)
    )
    files = tuple(dict.fromkeys(Path(file).name for file, _, _ in extras))
    if not math.isfinite(size):
        raise MergeError(f"{key}: what {', '.join(files)} makes of it is not finite as {weight.dtype}; nothing merged")
    return MergedWeight(key, files, norm, size, lost / norm if norm else 0.0)
