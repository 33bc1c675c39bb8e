"""Merge into quantised weights: an ordinary weight in their place, or the same format quantised again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkit.adapters.options import require_dtype
from peftkit.delta import Delta
from peftkit.delta.addition import MergedWeight, overflows
from peftkit.errors import (
    MergeError,
    OptionError,
    QuantisedMergeError,
    WrongBaseError,
    require_choice,
    require_option,
)
from peftkit.kernels.blocks import row_blocks
from peftkit.kernels.sharding import whole
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.bases.base import Base
from peftkit.wrapping.bases.formats import format_of, matrix_of
from peftkit.wrapping.classes import adapted_class, become_
from peftkit.wrapping.layer import Adapted, base_class
from peftkit.wrapping.routes import total
from peftkit.wrapping.sites import Slot
from peftkit.wrapping.walk import dotted, named_modules

INTO = ("dequantised", "requantised")

#: a ΔW of which less than this share survives quantisation is not in the weight
_LEAST = 0.5
#: what a weight and its quantised form differ by, relative to its norm: 0.09 to 0.12 at 4 bits, 0.5 at 2 bits
_SAME_ORIGIN = 0.6

_SUPPORTED = "into='dequantised' puts ordinary layers in place of the quantised ones, with their memory"


@dataclass(frozen=True, eq=False)
class Replaced:
    """What a layer had before a merge replaced its quantised weight. Implements `Backup`.

    Attributes:
        attributes: the layer's parameters and attributes that were replaced, by name.
        kind: the class of the layer, without adapters.
        slot: how its weight was read.
        base: the stored numbers.
        parameter: the parameter that stands there since the merge.
    """

    attributes: dict[str, Any]
    kind: type[nn.Module]
    slot: Slot
    base: Base
    parameter: nn.Parameter

    def original(self, merged: Tensor) -> Tensor:
        del merged
        return matrix_of(self.base)

    def is_in(self, host: Adapted) -> bool:
        """Return whether the layer has the parameter that the merge gave it."""
        return own_parameters(host).get(self.slot.parameter) is self.parameter

    def give_back(self, host: Adapted) -> None:
        """Make the layer what it was."""
        _exchange(host, self.attributes)
        become_(host, adapted_class(self.kind, host.adapter_state.reads, False))
        host.adapter_state.slots[""] = self.slot


@dataclass(frozen=True, eq=False)
class Replacement:
    """A new weight for a quantised layer, and what the merge does to it.

    Attributes:
        attributes: the parameters and attributes to give to the layer, by name.
        kind: the class that the layer gets, without adapters.
        slot: how its weight is then read.
        result: what the report says.
    """

    attributes: dict[str, Any]
    kind: type[nn.Module]
    slot: Slot
    result: MergedWeight

    def put(self, host: Adapted) -> Replaced:
        """Give the new weight to the layer, and return what it had."""
        slot, kind = host.adapter_state.slots[""], base_class(host)
        assert slot.base is not None
        base = slot.base.of(host)
        before = _exchange(host, self.attributes)
        become_(host, adapted_class(self.kind, host.adapter_state.reads, False))
        host.adapter_state.slots[""] = self.slot
        return Replaced(before, kind, slot, base, self.attributes[slot.parameter])


@dataclass(frozen=True, eq=False)
class Quantised:
    """How the quantised weights of a model are merged: `into`, `origin` and `dtype` of `merge`."""

    model: nn.Module
    into: str | None
    origin: nn.Module | Mapping[str, Tensor] | None
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        require_choice("into", self.into, (None, *INTO))
        require_dtype(self.dtype)
        for option, value, into in (("origin", self.origin, INTO[1]), ("dtype", self.dtype, INTO[0])):
            require_option(value is None or self.into == into, option, value, f"None unless into={into!r}")

    def require(self, affected: Mapping[str, tuple[Adapted, Collection[str]]]) -> None:
        """Raise QuantisedMergeError where there are quantised weights and it was not said what to make of them."""
        held = {at or "the model": state for at, (host, _) in affected.items() if (state := _format(host)) is not None}
        if held and self.into is None:
            at, form = next(iter(held.items()))
            raise QuantisedMergeError(
                f"{at}: its weight is quantised ({form.title}), as {len(held)} of {len(affected)} are, and the steps "
                f"of its grid are larger than most of a ΔW. {_SUPPORTED}; into='requantised' with origin= the weights "
                "before quantisation keeps the format; or keep the adapter applied"
            )

    @torch.no_grad()
    def replacement(
        self, host_name: str, host: Adapted, names: tuple[str, ...], deltas: Sequence[Delta]
    ) -> Replacement:
        """Return the new weight of one quantised layer, which stays as it is."""
        slot, site = host.adapter_state.slots[""], host_name or "the model"
        assert slot.base is not None
        base = slot.base.of(host)
        W = base.rows(0, base.shape[0]).float()
        change = total([delta.upcast() for delta in deltas]).to(W.dtype) if deltas else torch.zeros_like(W)
        norm = float(torch.linalg.vector_norm(change))
        if not math.isfinite(norm):
            raise MergeError(f"{site}: the ΔW of {', '.join(names)} is not finite; nothing was merged")
        result = MergedWeight(site, names, norm, 0.0, 0.0)
        if self.into == "dequantised":
            dtype = self.dtype or base.original_dtype or self._dtype_of_the_rest() or base.dtype
            merged = W + change
            if overflows(merged, dtype):
                raise MergeError(f"{site}: W + ΔW overflows {dtype}; nothing was merged")
            new = merged.to(dtype)
            parameter = nn.Parameter(new, requires_grad=False)
            attributes = {slot.parameter: parameter, **dict.fromkeys(slot.base.beside)}
            plain = replace(slot, base=None)
            measured = _measured(result, W.to(dtype).float(), new, change)
            return Replacement(attributes, nn.Linear, plain, replace(measured, survived=None))
        origin = W if self.origin is None else self._original(host_name, site, W)
        attributes = slot.base.requantised(host, origin + change)
        now = _quantised(host, slot.base, attributes)
        return Replacement(attributes, base_class(host), slot, _measured(result, W, matrix_of(now), change))

    def refuse_lost(self, weights: Sequence[MergedWeight]) -> None:
        """Raise QuantisedMergeError for a ΔW of which too little survives."""
        lost = [w for w in weights if w.survived is not None and w.norm > 0 and not w.survived >= _LEAST]
        if lost:
            worst = min(lost, key=lambda w: cast(float, w.survived))
            advice = "" if self.origin is not None else "give the weights before quantisation as origin=; "
            raise QuantisedMergeError(
                f"{worst.site}: {100 * cast(float, worst.survived):.2g} % of ΔW would survive its quantisation, and at "
                f"least {100 * _LEAST:.0f} % was expected, in {len(lost)} of {len(weights)} weights. Nothing was "
                f"merged; {advice}{_SUPPORTED}; or keep the adapter applied"
            )

    def _dtype_of_the_rest(self) -> torch.dtype | None:
        """The dtype of most numbers in the model's ordinary parameters, None without any."""
        sizes: dict[torch.dtype, int] = {}
        for _, module in named_modules(self.model):
            for parameter in own_parameters(module).values() if format_of(module) is None else ():
                if parameter is not None and parameter.is_floating_point() and parameter.itemsize > 1:
                    sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=None)

    def _original(self, host_name: str, site: str, W: Tensor) -> Tensor:
        """The weight that W was quantised from, in float32."""
        name = dotted(host_name, "weight")
        if isinstance(self.origin, nn.Module):
            module = dict(named_modules(self.origin)).get(host_name)
            found = None if module is None or format_of(module) else own_parameters(module).get("weight")
        else:
            found = cast("Mapping[str, Tensor]", self.origin).get(name)
        if found is None or not found.is_floating_point() or found.shape != W.shape:
            what = "no such weight" if found is None else f"one of {tuple(found.shape)}, {found.dtype}"
            raise OptionError(
                f"origin: the weight {name!r} of {tuple(W.shape)} before quantisation was expected, and it has {what}"
            )
        original = whole(found.detach()).to(W.device, torch.float32)
        gap = float(torch.linalg.vector_norm(original - W) / torch.linalg.vector_norm(W))
        if not gap <= _SAME_ORIGIN:
            raise WrongBaseError(
                f"{site}: origin's weight differs from the quantised one by {100 * gap:.3g} %, more than quantisation "
                "explains: it is of another model"
            )
        return original


def _format(host: Adapted) -> type[Base] | None:
    return next((slot.base for slot in host.adapter_state.slots.values() if slot.base is not None), None)


def _exchange(module: nn.Module, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Give a module parameters and attributes, and return what it had under these names."""
    before: dict[str, Any] = {}
    for name, value in attributes.items():
        holder = cast("dict[str, Any]", own_parameters(module)) if name in own_parameters(module) else module.__dict__
        before[name] = holder.get(name)
        holder[name] = value
    return before


def _quantised(host: Adapted, form: type[Base], attributes: Mapping[str, Any]) -> Base:
    """The stored numbers that the layer would have with these attributes."""
    before = _exchange(host, attributes)
    try:
        return form.of(host)
    finally:
        _exchange(host, before)


def _measured(result: MergedWeight, before: Tensor, after: Tensor, change: Tensor) -> MergedWeight:
    """The result with what the weight moved by, what of ΔW is not in it, and the share <W' − W, ΔW>/‖ΔW‖² that is."""
    sums = torch.zeros(3, dtype=torch.float64)
    for block in row_blocks(*change.shape):
        moved, rows = after[block].float() - before[block], change[block]
        sums += torch.stack([moved.square().sum(), (moved - rows).square().sum(), (moved * rows).sum()]).cpu().double()
    moved, lost = sums[:2].sqrt().tolist()
    share = float(sums[2]) / result.norm**2 if result.norm else 1.0
    return replace(result, change=moved, lost=lost / result.norm if result.norm else 0.0, survived=share)
