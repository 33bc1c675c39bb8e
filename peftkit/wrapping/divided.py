"""Models divided among processes (fully_shard): what one process does for all, and what all do together.

Of files the first process writes all, and the others lend it their parts. It runs the same code as for a whole model.
Wherever that code asks for a tensor by `gathered`, the others are told which one, and gather it too: one tensor at a
time, in whatever order, also if the code raises. In a merge every process runs the same code, and keeps its part.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.errors import FileError, MergeError, PeftkitError, UnsupportedLayerError
from peftkit.kernels.sharding import Division, fully_sharded, sharded, whole
from peftkit.wrapping.backup import Part
from peftkit.wrapping.installed import InstalledAdapter, adapted_modules, installed_adapters

P = ParamSpec("P")
Source = TypeVar("Source")
Result = TypeVar("Result")

# On the first process, while it works: id of a tensor, or of a backup -> its number, the same on every process
_NUMBERS: ContextVar[dict[int, int] | None] = ContextVar("_NUMBERS", default=None)


def divided(model: nn.Module) -> bool:
    """Return whether a model's parameters are divided among processes, also if some are whole just now."""
    tensors = (*model.parameters(), *model.buffers())
    return bool(_units(model)) or any(sharded(tensor) for tensor in tensors)


def settle(model: nn.Module) -> None:
    """Let a model that fully_shard divides hold its parts alone: a forward pass leaves some weights whole."""
    for unit in _units(model):
        unit.reshard()


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
        if not isinstance(source, nn.Module) or not among_all(source):
            return function(source, *args, **kwargs)
        makers = _makers(source)
        if torch.distributed.get_rank() != 0:
            return _follow([*makers.values()])
        token = _NUMBERS.set({key: number for number, key in enumerate(makers)})
        try:
            result = function(source, *args, **kwargs)
        except BaseException as error:
            _exchange(_known(error, FileError, "the first process stopped and wrote nothing"))
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
    _ask(tensor)
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
    merged = at.host.adapter_state.merged
    backup = None if merged is None else merged.backups.get(at.slot_name)
    if isinstance(backup, Part):
        _ask(backup)
        return at.slot.geometry.matrix(at.slot.of(whole(backup.original(parameter.detach()))))
    weight = at.slot.of(gathered(parameter))
    return at.slot.geometry.matrix(weight if backup is None else backup.original(weight))


@contextmanager
def together(model_is_divided: bool) -> Iterator[None]:
    """Make processes that run the same block raise together: where one of them raises, all do at its end.

    Without it the others would wait for the one that is gone, at the next tensor that all gather.
    """
    if not model_is_divided:
        yield
        return
    try:
        yield
    except BaseException as error:
        _all_say(_known(error, MergeError, "another process stopped, and this one with it"))
        raise
    for error in _all_say(None):
        if error is not None:
            raise error


def _units(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on."""
    kind = fully_sharded()
    return [] if kind is None else [each for each in model.modules() if isinstance(each, kind)]


def among_all(model: nn.Module) -> bool:
    """Return whether a model is divided among all processes, and let every process hold its parts alone if it is.

    Raises:
        UnsupportedLayerError: it is divided among some of them.
    """
    if not divided(model):
        return False
    settle(model)  # what is whole is in the dtype that it computes in
    parts = _parts(model)
    for part in parts:
        if part.device_mesh.size() != torch.distributed.get_world_size():
            raise UnsupportedLayerError(
                f"the model is divided among {part.device_mesh.size()} of {torch.distributed.get_world_size()} "
                "processes, and all were expected to have a part: gather it with "
                "torch.distributed.checkpoint.state_dict, and load that into a wrapped model of one process"
            )
    return bool(parts)


def require_pieces(where: str, parameter: Tensor) -> None:
    """Raise UnsupportedLayerError for a weight of which a process holds rows from several places."""
    if sharded(parameter) and not Division.of(parameter).plain:
        raise UnsupportedLayerError(
            f"{where}: its weight is divided as {', '.join(map(str, parameter.placements))}, and one piece of it on "
            "each process was expected (fully_shard over tensor parallelism scatters rows): pk.save the adapters from "
            "every process, and merge the file into the base's checkpoint with pk.merge_checkpoint"
        )


def _parts(model: nn.Module) -> list[Any]:
    """The divided tensors of a model, in the same order on every process."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if sharded(tensor)]


def _makers(model: nn.Module) -> Mapping[int, Callable[[], Tensor]]:
    """What the first process may ask for, in the same order on every process: id -> what makes this process's part."""
    makers: dict[int, Callable[[], Tensor]] = {id(tensor): tensor.detach for tensor in _parts(model)}
    for host in adapted_modules(model).values():
        merged = host.adapter_state.merged
        for slot_name, backup in () if merged is None else merged.backups.items():
            if isinstance(backup, Part):
                parameter = host.parameter_of(host.adapter_state.slots[slot_name])
                makers[id(backup)] = functools.partial(backup.original, parameter.detach())
    return makers


def _ask(own: object) -> None:
    """Let the other processes gather a tensor or a backup too, where they wait for the first one."""
    numbers = _NUMBERS.get()
    if numbers is not None:
        _exchange(numbers[id(own)])


def _follow(makers: list[Callable[[], Tensor]]) -> Any:
    """Gather what the first process asks for, and end as it does."""
    while isinstance(said := _exchange(None), int):
        whole(makers[said]())
    if isinstance(said, PeftkitError):
        raise said
    return said[0]


def _exchange(said: Any) -> Any:
    """What the first process says: the number of a tensor to gather, an error, or (the result,)."""
    box = [said]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _all_say(error: PeftkitError | None) -> list[PeftkitError | None]:
    """What each process says: its error, or None."""
    said: list[PeftkitError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, error)
    return said


def _known(error: BaseException, kind: type[PeftkitError], meaning: str) -> PeftkitError:
    """An error for the other processes, which may lack the class of this one's."""
    if isinstance(error, PeftkitError):
        return error
    return kind(f"{meaning}: {type(error).__name__}: {error}")
