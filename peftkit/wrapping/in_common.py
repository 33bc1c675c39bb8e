"""Parameters that the adapters of one wrap have in common: which adapters share, and that they still do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.in_common import Common, Held, Shareable, hold_, shareable
from peftkit.errors import FileError, SharedParameterError
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters


class Pool:
    """The parameters that adapters of one wrap have in common, each that of the first adapter that has it."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[Held, int]] = {}

    def find(self, own: Shareable, device: torch.device) -> tuple[Held, bool]:
        """Return what an adapter is to hold in the place of its own, and whether no adapter before it holds that.

        device: of the layer, where the adapter is, or will be.
        """
        part, parameter = own.part, own.parameter
        options = tuple(repr(part.options[option]) for option in part.shares[own.name])
        key = (part.kind, own.name, parameter.shape, parameter.dtype, device, part.shared_by, *options)
        held, count = self._held.get(key, (None, 0))
        if held is None or count == part.shared_by:
            held, count = Held(parameter, Common()), 0
        self._held[key] = held, count + 1
        return held, not count


def join_(adapters: Iterable[Adapter]) -> None:
    """Let the adapters of one wrap hold in common what their kinds share, in place. adapters: each once, in order."""
    pool = Pool()
    for adapter in adapters:
        for own in shareable(adapter):
            hold_(own, pool.find(own, own.parameter.device)[0])


def join_stored_(adapter: Adapter, stored: Mapping[str, str], held: dict[Hashable, Held]) -> None:
    """Let an adapter out of a file hold what the file has once for several, in place.

    Args:
        adapter: the adapter.
        stored: parameter -> the key by which the file has it.
        held: what adapters of the file before it hold; gets what this one is the first to hold.

    Raises:
        FileError: a parameter that adapters of its kind do not share.
    """
    found = {own.key: own for own in shareable(adapter)}
    for key, place in stored.items():
        if key not in found:
            raise FileError(f"{adapter.kind} shares no parameter {key!r} with others, and the file has it as {place}")
        parameter = found[key].parameter
        hold_(found[key], held.setdefault((place, parameter.dtype, parameter.device), Held(parameter, Common())))


def own_numbers(adapter: Adapter, pool: Pool, device: torch.device) -> list[nn.Parameter]:
    """Return what an adapter trains and no adapter before it does. device: of the layer."""
    held = {own.parameter for own in shareable(adapter) if not pool.find(own, device)[1]}
    return [p for p in adapter.parameters() if p.requires_grad and p not in held]


def places(installed: Iterable[InstalledAdapter]) -> dict[Common, list[tuple[str, str]]]:
    """Return where each common parameter is: mark -> (site, the parameter's key in the site's adapter), in order.

    Raises:
        SharedParameterError: adapters of one mark hold different parameters.
    """
    found: dict[Common, list[tuple[str, str]]] = {}
    objects: dict[Common, nn.Parameter] = {}
    for at in installed:
        for key, part, name, parameter in shareable(at.adapter):
            mark = part.common.get(name)
            if mark is None:
                continue
            found.setdefault(mark, []).append((at.site, key))
            if objects.setdefault(mark, parameter) is not parameter:
                raise SharedParameterError(
                    f"{key!r}, which the {part.kind} adapters {at.name!r} share, is one parameter on "
                    f"{found[mark][0][0] or 'the model'} and another on {at.site}: they would be trained apart. "
                    "fully_shard of each block by itself does this, as it divides the parameters of one module at a "
                    "time: call it once on the whole model, or before wrap, or train under DistributedDataParallel"
                )
    return found


def require_together(model: nn.Module, names: Sequence[str]) -> None:
    """Raise SharedParameterError unless parameters that adapters have in common are still one object."""
    places(installed_adapters(model, names))


def distinct_state(installed: Iterable[InstalledAdapter]) -> Iterator[tuple[InstalledAdapter, dict[str, Tensor]]]:
    """Yield adapters with their tensors, of which one that several share comes with the first."""
    seen: set[int] = set()
    for at in installed:
        again = {own.key for own in shareable(at.adapter) if id(own.parameter) in seen}
        seen.update(id(own.parameter) for own in shareable(at.adapter))
        yield at, {key: tensor for key, tensor in at.adapter.state_dict().items() if key not in again}
