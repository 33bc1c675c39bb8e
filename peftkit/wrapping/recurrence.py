"""The weights of nn.LSTM, nn.GRU, nn.RNN and of their cells, which torch hands to one function."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parameter import is_lazy

from peftkit.geometry import Geometry
from peftkit.kernels.torch_private import own_parameters

RECURRENT: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.RNNCellBase)

#: of a layer and a direction, "weight_ih_l0_reverse", or of a cell, "weight_ih"
WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
BIAS = re.compile(r"bias_(ih|hh)(_l\d+(_reverse)?)?")


def matrices(module: nn.Module) -> dict[str, Geometry]:
    """Return how the matrices of a recurrent layer are read, (gates·hidden, inputs), by their names."""
    if not isinstance(module, RECURRENT):
        return {}
    found = {name: p for name, p in own_parameters(module).items() if p is not None and WEIGHT.fullmatch(name)}
    plain = {n: p for n, p in found.items() if not is_lazy(p) and p.dim() == 2 and p.numel()}
    return {n: Geometry(p.shape) for n, p in plain.items() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
