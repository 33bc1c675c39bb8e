"""The weights of a model that can be adapted, and whether their layer is called or its weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkit import geometry
from peftkit.errors import UnsupportedLayerError
from peftkit.geometry import Geometry, is_layer
from peftkit.kernels.sharding import whole
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.bases.base import Base
from peftkit.wrapping.bases.formats import format_of, matrix_of
from peftkit.wrapping.hooks import present
from peftkit.wrapping.lookup import EMBEDDINGS, Lookup
from peftkit.wrapping.recurrence import matrices
from peftkit.wrapping.stacks import stacks, why_no_stack
from peftkit.wrapping.support import calls_its_weight, refusal, supported
from peftkit.wrapping.walk import dotted, named_modules, unwrapped


@dataclass(frozen=True)
class Slot:
    """One weight matrix of a module: a parameter, or some of its rows.

    base: the format in which the module keeps the weight quantised; None for an ordinary weight.
    """

    parameter: str
    geometry: Geometry
    start: int | None = None
    stop: int | None = None
    base: type[Base] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The slot's part of the parameter, a view."""
        return parameter if self.start is None else parameter[self.start : self.stop]


@dataclass(frozen=True)
class Site:
    """One weight that can be adapted, as "block.attn.to_q"; or "block.attn.q_proj", some rows of in_proj_weight."""

    name: str
    module_name: str
    module: nn.Module
    slot_name: str
    slot: Slot
    read: bool  # the weight is read by code that does not call the layer, as in nn.MultiheadAttention

    @property
    def label(self) -> str:
        """The name for a message; the root of a model has no name of its own."""
        return self.name or "the model"

    @property
    def looks_up(self) -> bool:
        """Whether the weight is an embedding's, whose input is numbers of rows."""
        return isinstance(self.slot.geometry, Lookup)

    @property
    def parameter(self) -> Tensor:
        parameter = own_parameters(self.module)[self.slot.parameter]
        assert parameter is not None
        return parameter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W; of a quantised W, the one that it is dequantised to."""
        return self.parameter.dtype if self.slot.base is None else self.slot.base.of(self.module).dtype

    @property
    def matrix(self) -> Tensor:
        """W (m, n), also where a hook keeps it until the layer is called.

        Of a weight that is divided among processes it is all of it, which every process has to ask for.
        """
        if self.slot.base is not None:
            return matrix_of(self.slot.base.of(self.module))
        weight = present(self.module, self.slot.parameter)
        assert weight is not None
        return self.slot.geometry.matrix(self.slot.of(whole(weight.detach())))


def sites(model: nn.Module) -> dict[str, Site]:
    """Return every weight that can be adapted, by name, in the order of the model's modules."""
    found: dict[str, Site] = {}
    read = _read_by_their_parent(model)
    for name, module in named_modules(model):
        for slot_name, slot in slots(module).items():
            full = dotted(name, slot_name)
            if _adapts(module, slot):  # a weight stays as it was adapted first
                by_other = slot.parameter in cast(Any, module).adapter_state.reads
            elif slot.base is not None:  # its parameter is no weight to whoever reads it
                by_other = id(module) in read
            else:
                by_other = id(module) in read or bool(slot_name) or not calls_its_weight(module)
            found[full] = Site(full, name, module, slot_name, slot, by_other)
    return found


def as_read(site: Site) -> Site:
    """Return the site as one whose weight is read; raises where the layer was adapted before as one that is called."""
    if site.slot.base is not None:
        raise UnsupportedLayerError(
            f"{site.label}: its weight is quantised ({site.slot.base.title}), and other code that reads it reads the "
            "stored numbers: it can be adapted only where its layer is called. Leave out read=True, or exclude it"
        )
    if _adapts(site.module, site.slot) and site.slot.parameter not in cast(Any, site.module).adapter_state.reads:
        raise UnsupportedLayerError(
            f"{site.label} has an adapter that acts where the layer is called, and read=True was given: unwrap it first"
        )
    return replace(site, read=True)


def _adapts(module: nn.Module, slot: Slot) -> bool:
    """Whether the slot's parameter has an adapter."""
    return "adapter_state" in module.__dict__ and cast(Any, module).adapts(slot.parameter)


def slots(module: nn.Module) -> dict[str, Slot]:
    """Return the module's own weight as "", or the matrices of a module that has several, by name."""
    if supported(module):
        base = format_of(module)
        if base is not None:
            return {"": Slot("weight", Geometry(torch.Size(base.of(module).shape)), base=base)}
        return {"": Slot("weight", _geometry(module))}
    if not isinstance(module, nn.MultiheadAttention):
        return {name: Slot(name, own) for name, own in (*stacks(module).items(), *matrices(module).items())}
    names = ("q_proj", "k_proj", "v_proj")
    width = module.embed_dim
    if own_parameters(module)["in_proj_weight"] is not None:
        square = Geometry(torch.Size((width, width)))
        return {name: Slot("in_proj_weight", square, i * width, (i + 1) * width) for i, name in enumerate(names)}
    sizes = (width, module.kdim, module.vdim)
    return {
        name: Slot(f"{name}_weight", Geometry(torch.Size((width, size))))
        for name, size in zip(names, sizes, strict=True)
    }


def _geometry(layer: nn.Module) -> Geometry:
    """How a supported layer reads its weight."""
    if isinstance(layer, EMBEDDINGS):
        return Lookup(cast(Tensor, own_parameters(layer)["weight"]).shape, layer)
    return geometry.of(layer)


def why_not(module: nn.Module) -> str | None:
    """Return why a module has no weight that can be adapted; None if it has one or is only a container."""
    if slots(module):
        return None
    return why_no_stack(module) or (refusal(module) if own_parameters(module) or is_layer(module) else None)


def _read_by_their_parent(model: nn.Module) -> set[int]:
    """Layers whose weight torch reads without calling them.

    nn.MultiheadAttention hands out_proj.weight to one fused function; nn.TransformerEncoderLayer does so with
    linear1 and linear2 when it infers.
    """
    read: set[int] = set()
    for _, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            read.add(id(unwrapped(module.out_proj)))
        elif isinstance(module, nn.TransformerEncoderLayer):
            read.update((id(unwrapped(module.linear1)), id(unwrapped(module.linear2))))
    return read
