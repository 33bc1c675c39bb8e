"""The adapted layer: what wrapping makes of a module, and how it computes.

A module keeps its identity: its class becomes a subclass made once per class, as torch's own parametrize and FSDP2
do. Its `weight`, its place in the model, references to it, its hooks and its state_dict keys stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta import Delta
from peftkit.errors import MergeStateError, UnsupportedLayerError
from peftkit.geometry import Geometry
from peftkit.kernels.sharding import sharded
from peftkit.kernels.torch_private import compiling, eager, own_modules, own_parameters
from peftkit.wrapping.bases.formats import matrix_of
from peftkit.wrapping.lookup import Lookup, adapted_output, require_size
from peftkit.wrapping.routes import changed, choose, choose_compiled, choose_lookup, dense
from peftkit.wrapping.sites import Slot
from peftkit.wrapping.state import Acting, AdapterState

#: the key of the adapter of a module's weight where the module's bias has one of the same name beside it
WEIGHT = "weight"
#: how many different calls of a layer have their route remembered
_CALLS = 64


class Adapted(nn.Module):
    """Mixed into the class of an adapted module. `adapters.<name>` is an Adapter, or one per projection."""

    adapters: nn.ModuleDict
    adapter_state: AdapterState
    #: the class that the module had
    _base: ClassVar[type[nn.Module]]

    def parameter_of(self, slot: Slot) -> nn.Parameter:
        """The parameter that the slot is part of."""
        parameter = own_parameters(self).get(slot.parameter)
        if parameter is None:
            raise UnsupportedLayerError(
                f"an adapted {base_class(self).__name__} has no parameter {slot.parameter!r} any more (weight_norm, "
                "parametrize or pruning took it): undo that, or call it before wrapping, which then refuses the layer"
            )
        return parameter

    def weight_of(self, slot: Slot) -> Tensor:
        """The slot's own part of its parameter, merged or not: a view that writes through."""
        return slot.of(self.parameter_of(slot))

    def base_of(self, slot_name: str) -> Tensor:
        """The slot's weight without what is merged into it, as a matrix (m, n)."""
        slot, merged = self.adapter_state.slots[slot_name], self.adapter_state.merged
        if slot.base is not None and merged is None:
            return matrix_of(slot.base.of(self))
        parameter = self.parameter_of(slot)
        return slot.geometry.matrix(
            slot.of(parameter) if merged is None else merged.original(slot_name, slot, parameter)
        )

    def adapter(self, name: str, slot_name: str) -> Adapter | None:
        """The adapter called `name` on one of the module's weights, if there is one."""
        held = own_modules(cast(nn.Module, own_modules(self)["adapters"])).get(name)
        if isinstance(held, nn.ModuleDict):
            return cast("Adapter | None", own_modules(held).get(slot_name or WEIGHT))
        return None if slot_name else cast("Adapter | None", held)

    def adapts(self, parameter: str) -> bool:
        """Whether a parameter, or a part of it, has an adapter."""
        slots = [name for name, slot in self.adapter_state.slots.items() if slot.parameter == parameter]
        return any(self.adapter(name, slot_name) is not None for name in self.adapters for slot_name in slots)

    def deltas(self, slot_name: str, acting: Acting | None = None) -> list[Delta]:
        """λ·ΔW of every acting adapter on one weight; `acting`, if known, is what acts in this call."""
        strengths = (acting or self.adapter_state.now()).strengths
        found = ((self.adapter(name, slot_name), strength) for name, strength in strengths.items())
        adapters = [(adapter, strength) for adapter, strength in found if adapter is not None]
        reads_base = any(adapter.reads_base for adapter, _ in adapters)
        # Where nobody looks at its values, spare the copy that a matrix of a channels_last weight is
        W = self.base_of(slot_name) if reads_base else self.weight_of(self.adapter_state.slots[slot_name])
        return [adapter(W, strength) for adapter, strength in adapters]

    def effective(self, parameter_name: str) -> Tensor:
        """The parameter with every acting adapter's ΔW, in the parameter's dtype and shape."""
        parameter, state = cast(Tensor, own_parameters(self)[parameter_name]), self.adapter_state
        acting = state.now()
        if not acting.strengths or (eager() and sharded(parameter)):  # fully_shard reads its own part, before forward
            return parameter
        state.answer(seen=eager())
        return self._changed(parameter_name, parameter, acting)

    def _changed(self, parameter_name: str, parameter: Tensor, acting: Acting) -> Tensor:
        """The parameter with Σ ΔW on each of its slots."""
        parts = []
        for slot_name, slot in self.adapter_state.slots.items():
            if slot.parameter == parameter_name:
                weight, deltas = slot.of(parameter), self.deltas(slot_name, acting)
                parts.append(changed(weight, deltas, slot.geometry) if deltas else weight)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As torch's, without the adapters that are merged: their ΔW is in the weight, and would count twice."""
        found = super().state_dict(*args, **kwargs)
        merged = self.adapter_state.merged
        for name in () if merged is None else merged.names:
            prefix = f"{kwargs.get('prefix', '')}adapters.{name}."
            for key in [key for key in found if key.startswith(prefix)]:
                del found[key]
        return found

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedLayerError(
            "nn.DataParallel copies the model to several devices at every call, and an adapted layer has no parameters "
            "in such a copy: use DistributedDataParallel, or one device (device_ids=[0])"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.adapter_state.merged
        if merged is not None:
            raise MergeStateError(
                f"{', '.join(merged.names)} is merged into a weight that load_state_dict would overwrite: "
                "restore(model) first, or unwrap(model, keep_merged=True)"
            )
        super()._load_from_state_dict(*args, **kwargs)


class AdaptedLayer(Adapted):
    """An adapted layer that is called: its output with every acting adapter's."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: whatever the layer takes."""
        state = self.adapter_state
        acting = state.now()
        if not acting.strengths:
            return super().forward(input, *args, **kwargs)
        g, base = state.slots[""].geometry, state.slots[""].base
        if base is not None:
            base.prepare(self, input)
        g = g.sized_for(self, input, *args, **kwargs)
        deltas = self.deltas("", acting)
        if not deltas:  # it is the bias that is adapted
            return super().forward(input, *args, **kwargs)
        drops = self._drops(acting) if self.training else [0.0] * len(deltas)
        device = input.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        narrow = compute.itemsize < 4
        plain = eager() and type(input) is Tensor
        if self._route(acting, deltas, drops, g, input, narrow) == "dense":
            if narrow or base is not None:
                out = super().forward(input, *args, **kwargs) + dense(input, g, None, None, deltas)
            else:
                out = dense(input, g, self.weight_of(state.slots[""]), cast("Tensor | None", self.bias), deltas)
            state.answer(out, seen=plain)
            return out
        # A Linear of tokens is one of rows: what torch makes of it is then a tensor of its own, which can be added to
        rows = plain and not g.spatial and input.dim() > 2 and input.is_contiguous()
        x = input.flatten(0, -2) if rows else input
        forward = super().forward
        y = forward(x, *args, **kwargs) if base is None else base.run(self, forward, x, *args, **kwargs)
        bias = cast("Tensor | None", self.bias)
        inputs = [(delta, F.dropout(x, p) if p else x) for delta, p in zip(deltas, drops, strict=True)]
        inputs.sort(key=lambda each: not each[0].reads_output)  # these come first: the others may write over y
        out = y
        for delta, own in inputs:
            # a tracer or a transform follows the definition, not what writes in place
            add = type(delta).apply_onto if plain else Delta.apply_onto
            out = add(delta, out, own, y, bias, g)
        out = out.unflatten(0, input.shape[:-1]) if rows else out
        state.answer(out, seen=plain)
        return out

    def _drops(self, acting: Acting) -> list[float]:
        """The dropout of the input of each adapter of the weight."""
        own = (self.adapter(name, "") for name in acting.strengths)
        return [adapter.input_dropout for adapter in own if adapter is not None]

    def _route(
        self, acting: Acting, deltas: Sequence[Delta], drops: Sequence[float], g: Geometry, x: Tensor, narrow: bool
    ) -> str:
        state = self.adapter_state
        dropping = any(drops)
        if state.merged is not None and any(delta.reads_output for delta in deltas):
            # The layer's output is that of the merged weight, and these need the base's
            if dropping:
                raise MergeStateError(
                    "input dropout cannot act while other adapters are merged into the base that this one reads: "
                    "restore before training, or call eval()"
                )
            return "dense"
        # An input with holes goes through the factors; the dense route would dequantise a weight at every call
        if dropping or state.slots[""].base is not None:
            return "factored"
        if state.route != "auto":
            return state.route
        call = g.outputs(x), torch.is_grad_enabled(), narrow
        if compiling():
            return choose_compiled(deltas, g.shape, *call)
        if not eager():
            return choose(deltas, g.shape, *call)
        chosen = acting.chosen.get(call)
        if chosen is None:
            if len(acting.chosen) >= _CALLS:
                acting.chosen.clear()
            chosen = acting.chosen[call] = choose(deltas, g.shape, *call)
        return chosen


class AdaptedLookup(Adapted):
    """An adapted embedding: its output with the rows of every acting adapter that are looked up."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: indices of rows, and what else the layer takes."""
        state = self.adapter_state
        acting = state.now()
        if not acting.strengths:
            return super().forward(input, *args, **kwargs)
        g = cast(Lookup, state.slots[""].geometry)
        if args or kwargs:
            g = g.of_call(*args, **kwargs)
        route = choose_lookup(g.shape, g.outputs(input)) if state.route == "auto" else state.route
        weight = self.parameter_of(state.slots[""])
        require_size(weight, g)
        y = super().forward(input, *args, **kwargs) if g.additive else None
        out = adapted_output(y, input, weight, self.deltas("", acting), g, route)
        state.answer(out, seen=eager() and type(input) is Tensor)
        return out


class AdaptedParameters(Adapted):
    """An adapted module whose weights are read, not called: reading one gives W + ΔW."""

    @property
    def _old_forward(self) -> Any:
        """Where a hook of accelerate that was there first keeps the forward of its module."""
        if "_old_forward" in vars(self):
            return vars(self)["_old_forward"]
        raise AttributeError("_old_forward")

    @_old_forward.setter
    def _old_forward(self, forward: Any) -> None:
        del forward
        raise UnsupportedLayerError(
            f"hooks of accelerate move the weight that they read, which of this {base_class(self).__name__} is "
            "W + ΔW: put the hooks on first, then wrap or load"
        )

    @_old_forward.deleter
    def _old_forward(self) -> None:
        del vars(self)["_old_forward"]


def base_class(module: Adapted) -> type[nn.Module]:
    """The class the module had before it was adapted."""
    return type(module)._base
