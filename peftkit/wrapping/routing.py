"""Which experts a call runs, and a module of these alone.

The experts of transformers take (hidden_states, top_k_index, top_k_weights), and use those that `top_k_index` (tokens,
k) names and no others, whichever of their implementations is chosen. A number that is no expert's means none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftkit.kernels.sharding import sharded
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.stacks import COUNTS

#: with so many choices for each expert nearly all of them run, and to find out would wait for the device
_MANY = 3


class Routed(NamedTuple):
    """The experts of a call, and its arguments with their numbers in place of the module's.

    Attributes:
        experts: (k,) their numbers in the module, in order.
        args: of the call.
        kwargs: of the call.
    """

    experts: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def routed(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routed | None:
    """Return the experts that a call runs; None where that is not known, or where they are all or nearly all."""
    own, parameters = vars(module), [p for p in own_parameters(module).values() if p is not None]
    count = own.get("num_experts")
    known = all(isinstance(own.get(mark), bool) for mark in ("is_transposed", "has_gate"))
    if not known or own.get("_is_expert_parallel") or any(sharded(p) or p.shape[0] != count for p in parameters):
        return None
    at = _choices(args, kwargs)
    index = None if at is None else args[at] if isinstance(at, int) else kwargs[at]
    if at is None or index is None or count is None or index.numel() >= _MANY * count:
        return None
    experts = index[index < count].unique()
    if not 0 < len(experts) < count:
        return None
    numbers = torch.full((count + 1,), len(experts), dtype=index.dtype, device=index.device)
    numbers[experts] = torch.arange(len(experts), dtype=index.dtype, device=index.device)
    own_index = numbers[index.clamp(max=count)]
    if isinstance(at, int):
        return Routed(experts, (*args[:at], own_index, *args[at + 1 :]), dict(kwargs))
    return Routed(experts, args, {**kwargs, at: own_index})


def _choices(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the numbers of the experts are among the arguments: the only integers; None without such."""
    given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    found = [at for at, value in given.items() if isinstance(value, Tensor) and not value.is_floating_point()]
    alone = len(found) == 1 and given[found[0]].dim() == 2 and given[found[0]].dtype in (torch.int32, torch.int64)
    return found[0] if alone else None


def of_some(module: nn.Module, cls: type[nn.Module], experts: Tensor, stack: Callable[[str], Tensor]) -> nn.Module:
    """Return a module of a class that has some of a module's experts and all else that it has.

    Args:
        module: the module of all experts.
        cls: the class that computes.
        experts: (k,) their numbers.
        stack: gives the parameter of a name for these experts, (k, …).
    """
    own = dict(vars(module))
    count = own["num_experts"]
    own |= {name: len(experts) for name in COUNTS if own.get(name) == count}
    names = own_parameters(module).items()
    own["_parameters"] = {name: None if parameter is None else stack(name) for name, parameter in names}
    view = cast(nn.Module, object.__new__(cls))
    vars(view).update(own)
    return view
