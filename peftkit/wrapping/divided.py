"""Models divided among processes (fully_shard): the first process writes, and the others lend it their parts.

The first process runs the same code as for a whole model. Wherever that code asks for a tensor by `gathered`, the
others are told which one, and gather it too: one tensor at a time, in whatever order, also if the code raises.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.errors import FileError, PeftkitError, UnsupportedLayerError
from peftkit.kernels.sharding import sharded, whole
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters

P = ParamSpec("P")
Source = TypeVar("Source")
Result = TypeVar("Result")

# On the first process, while it works: id of a tensor -> its number, the same on every process
_NUMBERS: ContextVar[dict[int, int] | None] = ContextVar("_NUMBERS", default=None)


def divided(model: nn.Module) -> bool:
    """Return whether a model's parameters are divided among processes, also if some are whole just now."""
    tensors = (*model.parameters(), *model.buffers())
    return bool(_units(model)) or any(sharded(tensor) for tensor in tensors)


def settle(model: nn.Module) -> None:
    """Let a model that fully_shard divides hold its parts alone: a forward pass leaves some weights whole."""
    for unit in _units(model):
        unit.reshard()


def require_whole(model: nn.Module, verb: str) -> None:
    """Raise UnsupportedLayerError if the model's weights are divided among processes. verb: for the message."""
    if divided(model):
        raise UnsupportedLayerError(
            f"{verb}: the model's weights are divided among processes (fully_shard), weights that are whole were "
            "expected: pk.save the adapters from every process, and merge the file into the base's checkpoint with "
            "pk.merge_checkpoint, or pk.load it onto a whole model and merge there; restore before fully_shard"
        )


def require_not_empty(model: nn.Module) -> None:
    """Raise UnsupportedLayerError if parameters are empty, as DeepSpeed's ZeRO-3 leaves them between calls."""
    adapted = [p for at in installed_adapters(model) for p in (at.host.parameter_of(at.slot), *at.adapter.parameters())]
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if any(p.numel() == 0 for p in (*adapted, *partitioned)):
        raise UnsupportedLayerError(
            "parameters of the model are empty here: ZeRO-3 of DeepSpeed divides them among processes. Call this on "
            "every process inside `with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):`"
        )


def by_first_process(
    function: Callable[Concatenate[Source, P], Result],
) -> Callable[Concatenate[Source, P], Result]:
    """Make a function of a model collective where the model is divided among processes.

    Every process calls it. The first does the work, and all return its result or raise its error. Models that are not
    divided, and sources that are no model, go to the function as they are.
    """

    @functools.wraps(function)
    def collective(source: Source, *args: P.args, **kwargs: P.kwargs) -> Result:
        tensors = _parts(source) if isinstance(source, nn.Module) and divided(source) else []
        if not tensors:
            return function(source, *args, **kwargs)
        if torch.distributed.get_rank() != 0:
            return _follow(tensors)
        token = _NUMBERS.set({id(tensor): number for number, tensor in enumerate(tensors)})
        try:
            result = function(source, *args, **kwargs)
        except BaseException as error:
            _exchange(_known(error))
            raise
        finally:
            _NUMBERS.reset(token)
        _exchange((result,))
        return result

    return collective


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a parameter or a buffer, without its gradient; itself where it is not divided.

    Args:
        tensor: the model's own, no view or copy of it.
    """
    if not sharded(tensor):
        return tensor.detach()
    numbers = _NUMBERS.get()
    if numbers is not None:
        _exchange(numbers[id(tensor)])
    return whole(tensor.detach())


def gathered_adapter(adapter: Adapter) -> Adapter:
    """Return a copy of an adapter that is whole on this process; itself where it is not divided."""
    own = [tensor for tensor in (*adapter.parameters(), *adapter.buffers()) if sharded(tensor)]
    memo: dict[int, Any] = {id(tensor): nn.Parameter(gathered(tensor), tensor.requires_grad) for tensor in own}
    return copy.deepcopy(adapter, memo) if own else adapter


def gathered_base(at: InstalledAdapter) -> Tensor:
    """Return W (m, n) of an adapter, whole on this process, without what is merged into it."""
    parameter = at.host.parameter_of(at.slot)
    if not sharded(parameter):
        return at.base
    weight, merged = at.slot.of(gathered(parameter)), at.host.adapter_state.merged
    return at.slot.geometry.matrix(weight if merged is None else merged.original(at.slot_name, weight))


def _units(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on."""
    # Not imported here, which takes long: without the import nothing is divided
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)  # it is elsewhere in torch 2.4 and 2.5
    return [] if kind is None else [each for each in model.modules() if isinstance(each, kind)]


def _parts(model: nn.Module) -> list[Tensor]:
    """The divided tensors of a model, in the same order on every process."""
    settle(model)  # what is whole is in the dtype that it computes in
    parts = [tensor for tensor in (*model.parameters(), *model.buffers()) if sharded(tensor)]
    processes = torch.distributed.get_world_size() if parts else 1
    for part in parts:
        if part.device_mesh.size() != processes:
            raise UnsupportedLayerError(
                f"the model is divided among {part.device_mesh.size()} of {processes} processes, and all were expected "
                "to have a part: gather it with torch.distributed.checkpoint.state_dict, and load that into a wrapped "
                "model of one process"
            )
    return [*parts]


def _follow(tensors: Sequence[Tensor]) -> Any:
    """Gather what the first process asks for, and end as it does."""
    while isinstance(said := _exchange(None), int):
        whole(tensors[said].detach())
    if isinstance(said, PeftkitError):
        raise said
    return said[0]


def _exchange(said: Any) -> Any:
    """What the first process says: the number of a tensor to gather, an error, or (the result,)."""
    box = [said]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _known(error: BaseException) -> PeftkitError:
    """An error for the other processes, which may lack the class of this one's."""
    if isinstance(error, PeftkitError):
        return error
    return FileError(f"the first process stopped and wrote nothing: {type(error).__name__}: {error}")
