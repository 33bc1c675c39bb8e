"""The vectors of a model that can be adapted: weights of norms, and biases. They are read where they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from peftkit.adapters import registry
from peftkit.errors import UnsupportedLayerError
from peftkit.geometry import Geometry
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.recurrence import BIAS
from peftkit.wrapping.sites import Site, Slot, sites
from peftkit.wrapping.sites import slots as matrices
from peftkit.wrapping.stacks import stacks
from peftkit.wrapping.walk import dotted, named_modules


class VectorGeometry(Geometry):
    """Reads a norm's weight or a bias, of any shape, as a matrix of one column, (p, 1); there is no layer to run."""

    vector = True

    def __init__(self, shape: torch.Size) -> None:
        super().__init__(torch.Size((shape.numel(), 1)))
        self.own = shape

    def bands(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, -1, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.own)


#: parameters that are biases; in_proj_bias is nn.MultiheadAttention's
_BIASES = ("bias", "in_proj_bias")


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias by its name, be it one of those that a recurrent layer has."""
    return name in _BIASES or BIAS.fullmatch(name) is not None


def slots(module: nn.Module) -> dict[str, Slot]:
    """Return all that can be adapted of a module: its matrices, and its vectors."""
    return {**matrices(module), **vectors(module)}


def vectors(module: nn.Module) -> dict[str, Slot]:
    """Return the weight of a norm as "", and a module's biases by the names of their parameters."""
    if stacks(module):
        return {}
    own = own_parameters(module)
    names = {name: name for name, parameter in own.items() if is_bias(name) and _is_vector(parameter, 1)}
    if is_norm(module):
        names = {"": "weight", **names}
    return {slot: Slot(name, VectorGeometry(p.shape)) for slot, name in names.items() if (p := own[name]) is not None}


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with a weight of its own: any class that is called so, with a vector."""
    weight = own_parameters(module).get("weight")
    named = any("norm" in c.__name__.lower() for c in type(module).__mro__)
    return named and _is_vector(weight, None if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1)


def is_rare_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of another class than LayerNorm and GroupNorm, which LyCORIS knows."""
    return is_norm(module) and not isinstance(module, (nn.LayerNorm, nn.GroupNorm))


def vector_sites(model: nn.Module) -> dict[str, Site]:
    """Return every norm's weight by the name of its module, and every bias by its own, in the order of the modules."""
    found: dict[str, Site] = {}
    for name, module in named_modules(model):
        for slot_name, slot in vectors(module).items():
            full = dotted(name, slot_name)
            found[full] = Site(full, name, module, slot_name, slot, read=True)
    return found


def every_site(model: nn.Module) -> dict[str, Site]:
    """Return every weight that can be adapted, matrices before vectors, by name."""
    return {**sites(model), **vector_sites(model)}


def refusal(site: Site, kind: str, *, decompose: bool = False) -> str | None:
    """Return why a kind cannot adapt a weight because it is a vector, None where it can."""
    if not site.slot.geometry.vector or (registry.get(kind).vectors and not decompose):
        return None
    size = site.slot.geometry.shape.rows
    return f"{kind} adapts matrices, and this is a vector of {size} numbers: use 'full', or leave it out with `exclude`"


def require_kind(site: Site, kind: str, *, decompose: bool = False) -> None:
    """Raise UnsupportedLayerError for a kind that cannot adapt a weight because it is a vector."""
    reason = refusal(site, kind, decompose=decompose)
    if reason is not None:
        raise UnsupportedLayerError(f"{site.label}: {reason}")


def _is_vector(parameter: Tensor | None, dims: int | None) -> bool:
    """Whether a parameter holds ordinary numbers, in so many dimensions."""
    if parameter is None or is_lazy(parameter) or not parameter.numel():
        return False
    plain = parameter.dtype.is_floating_point and parameter.dtype.itemsize >= 2
    return plain and dims in (None, parameter.dim())
