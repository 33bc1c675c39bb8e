"""The adapted experts: what wrapping makes of a module that holds stacks of experts."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.adapters.stacked import Stacked
from peftkit.kernels.torch_private import eager, own_parameters
from peftkit.wrapping.layer import AdaptedParameters, base_class
from peftkit.wrapping.routing import of_some, routed
from peftkit.wrapping.stacks import StackGeometry
from peftkit.wrapping.state import Acting

#: what was read of adapted stacks of experts in the call of a module that runs now
_READ: ContextVar[dict[tuple[int, str, bool], Tensor] | None] = ContextVar("peftkit_read_stacks", default=None)


class AdaptedExperts(AdaptedParameters):
    """Adapted stacks of experts: a call changes each of them once, and where few experts run, only theirs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """args, kwargs: whatever the module takes."""
        state = self.adapter_state
        if not eager() or not state.now().strengths:
            return super().forward(*args, **kwargs)
        few = routed(self, args, kwargs)
        if few is not None:
            base = base_class(self)
            module = of_some(self, base, few.experts, partial(self._some, few.experts))
            return base.forward(module, *few.args, **few.kwargs)
        token = _READ.set({})
        try:
            return super().forward(*args, **kwargs)
        finally:
            _READ.reset(token)

    def effective(self, parameter_name: str) -> Tensor:
        """The parameter with every acting adapter's ΔW; read again in the same call, the same tensor."""
        if not eager() or (read := _READ.get()) is None:
            return super().effective(parameter_name)
        key = id(self), parameter_name, torch.is_grad_enabled()
        if key not in read:
            read[key] = super().effective(parameter_name)
        return read[key]

    def _changed(self, parameter_name: str, parameter: Tensor, acting: Acting) -> Tensor:
        geometry = cast(StackGeometry, self.adapter_state.slots[parameter_name].geometry)
        return geometry.changed(parameter, self.deltas(parameter_name, acting))

    def _some(self, experts: Tensor, parameter_name: str) -> Tensor:
        """A parameter for some experts: W + Σ ΔW (k, …) where it is an adapted stack."""
        parameter, state = cast(Tensor, own_parameters(self)[parameter_name]), self.adapter_state
        slot, merged = state.slots.get(parameter_name), state.merged
        if slot is None:
            return parameter[experts]
        state.answer()
        geometry, weight = cast(StackGeometry, slot.geometry), parameter[experts]
        strengths = state.now().strengths.items()
        own = [(adapter, s) for name, s in strengths if (adapter := self.adapter(name, parameter_name)) is not None]
        base = weight
        if merged is not None and any(adapter.reads_base for adapter, _ in own):
            base = merged.original(parameter_name, slot, parameter)[experts]
        deltas = [cast(Stacked, adapter).some(experts)(geometry.bands(base), s) for adapter, s in own]
        return geometry.changed(weight, deltas)
