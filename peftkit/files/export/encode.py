"""Encode one adapter for one program: in its own structure if the program has it, in another exact one, or ΔW baked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter, placeholder_weight
from peftkit.adapters.form import Form
from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.as_low_rank import as_low_rank, as_low_rank_stack
from peftkit.errors import ExportError
from peftkit.files.export.programs import Target
from peftkit.geometry import Shape


@dataclass(frozen=True)
class Encoding:
    """What is written for one weight.

    Attributes:
        how: "exact", "low rank" (another structure, the same ΔW on any base) or "baked" (right for one base).
        structure: the name of what is written.
        form: its numbers.
        note: what a user should know of it.
    """

    how: str
    structure: str
    form: Form
    note: str = ""

    @property
    def rank(self) -> int | None:
        """The rank of the low-rank product that is written, None for other structures."""
        low = self.form.lora
        return None if low is None else low.rank


def form_of(adapter: Adapter, shape: Shape) -> Form | None:
    """Return an adapter without its base, in fp32; None if it reads its base and no file has a form for it."""
    with torch.no_grad():
        weight = placeholder_weight(shape)
        own = adapter.form(weight)
        return None if own is None and adapter.reads_base else own or registry.additive(adapter.delta(weight))


def encode(adapter: Adapter, target: Target, shape: Shape, base: Tensor | None, *, bake: bool = False) -> Encoding:
    """Encode an adapter for a program.

    Args:
        adapter: of one weight.
        target: the program.
        shape: of the weight.
        base: W (m, n), None if it is not at hand.
        bake: write ΔW itself where the adapter reads its base.

    Raises:
        ExportError: if the program can hold neither the adapter nor its ΔW, with the reason.
    """
    spelled = _encode(adapter, target, shape, base, bake=bake)
    if adapter.linear:
        return spelled
    path = f"path='geodesic' is this library's own: at a strength s {target.title} adds s·ΔW"
    return replace(spelled, note="; ".join(filter(None, (spelled.note, path))))


def _encode(adapter: Adapter, target: Target, shape: Shape, base: Tensor | None, *, bake: bool) -> Encoding:
    reason = f"{adapter.kind} is to be baked"
    if not (bake and adapter.reads_base):
        form = form_of(adapter, shape)
        if form is None:
            reason = f"{target.title} has no {adapter.kind} of this form"
        elif not (reason := form.refusal(target, shape)) and not form.is_change:
            return _exact(form, target)
        elif form.change is not None:
            return _additive(form.change, target, shape, adapter.kind)
    if base is None:
        raise ExportError(f"{reason}; give the base to bake ΔW into the file")
    with torch.no_grad():
        delta = adapter.eval()(base, 1.0)
        small = delta.rank is not None and delta.rank < min(delta.shape)
        baked = _additive(delta if small or shape.experts > 1 else Dense(delta.dense()), target, shape)
    why = "as asked" if bake else reason
    return Encoding("baked", baked.structure, baked.form, f"{why}: holds for this base only")


def _exact(form: Form, target: Target) -> Encoding:
    structure = form.structure(target)
    linear = structure not in target.nonlinear
    return Encoding(
        "exact", structure, form, "" if linear else f"{target.title}'s strength is not linear for {structure}"
    )


def _additive(delta: Delta, target: Target, shape: Shape, kind: str = "") -> Encoding:
    """Encode a ΔW in its own structure, else as the smaller of the matrix itself and one product B·A."""
    own = registry.additive(delta)
    if not own.refusal(target, shape):
        structure = own.structure(target)
        return Encoding("exact" if structure == kind else "low rank", structure, own)
    with torch.no_grad():
        low = as_low_rank_stack(delta) if shape.experts > 1 else as_low_rank(delta)
    refusal = registry.additive(low).refusal(target, shape)
    if target.is_dense(shape) and (refusal or low.rank * sum(delta.shape) >= shape.rows * shape.columns):
        return _other(Dense(delta.dense()), target)
    if refusal:
        why = target.refusal(LowRank.structure, shape)
        why = why or f"{target.title} has no structure for {delta.structure or repr(delta)}"
        raise ExportError(f"{why}; export for lycoris, or merge it")
    return _other(low, target)


def _other(delta: Delta, target: Target) -> Encoding:
    form = registry.additive(delta)
    return Encoding("low rank", form.structure(target), form)
