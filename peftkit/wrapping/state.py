"""What an adapted module knows besides its parameters, and which of its adapters act in a call.

In eager mode the adapters that act are those of a strength other than 0 that are not merged and that no open block of
this thread or async task hides. torch.compile can ask no thread for its own blocks, and a set of names would be code to
it, compiled again for every other set: compiled code runs every adapter that is not merged, on a tensor of its
strength, which is 0 where the adapter is hidden. These tensors follow the blocks of all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftkit.errors import ConcurrentBlocksError
from peftkit.kernels.torch_private import (
    compiles_by_identity,
    compiling,
    exporting,
    in_autograd_thread,
    once_while_compiling,
)
from peftkit.wrapping.backup import Merged
from peftkit.wrapping.roll import Roll
from peftkit.wrapping.sites import Slot


@dataclass(frozen=True, eq=False)
class Acting:
    """The adapters that act, with their strengths: numbers in eager mode, 0-d tensors under torch.compile."""

    strengths: Mapping[str, float | Tensor]
    #: the route that was chosen for a number of output positions, with and without gradients, in 16 bits or more
    chosen: dict[tuple[int, bool, bool], str] = field(default_factory=dict)


class _Pair(NamedTuple):
    """The numbers that compiled code reads of one adapter. Both are there: to open a block makes no tensor."""

    strength: float
    shown: Tensor
    hidden: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """An open `disabled` or `enabled` block: the names that it hides on each state of a model, which may be none."""

    hides: Mapping[AdapterState, frozenset[str]]


class _Open:
    """The open blocks of one thread or async task, and the names that they hide together."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self.blocks = blocks
        self.hidden: dict[AdapterState, frozenset[str]] = {}
        for block in blocks:
            for state, names in block.hides.items():
                self.hidden[state] = self.hidden.get(state, frozenset()) | names


_OPEN: ContextVar[_Open | None] = ContextVar("peftkit_open_blocks", default=None)

# Held while blocks open and close: what compiled code reads follows all of them
_LOCK = threading.RLock()

#: the shapes and names of the layers that torch.compile has read; one compiled code may serve several models
_COMPILED: set[tuple[Any, ...]] = set()


@dataclass(eq=False)
class AdapterState:
    """What an adapted module knows besides its parameters: plain data, copied and pickled with the module."""

    slots: dict[str, Slot]
    reads: tuple[str, ...]
    route: str = "auto"
    #: name -> λ
    strengths: dict[str, float] = field(default_factory=dict)
    #: adapters that are in the weight now, and how to get the weight back
    merged: Merged | None = None
    #: parameter name -> the shared parameter that `tied="untie"` replaced by a copy
    tied: dict[str, nn.Parameter] = field(default_factory=dict)
    #: whether the module has run, or its weight was read, since it was adapted
    ran: bool = False
    #: the roll of the model that was wrapped, until its first backward
    roll: Roll | None = None

    def __post_init__(self) -> None:
        #: the open blocks of all threads that hide names here
        self.blocks: dict[Block, frozenset[str]] = {}
        self._pairs: dict[str, _Pair] = {}
        self._compiled = Acting({})
        self.refresh()

    def refresh(self) -> None:
        """Recompute what acts after anything but a block has changed."""
        with _LOCK:
            self._eager: dict[frozenset[str], Acting] = {}
            self._pairs = {name: self._pair(name) for name in self._free()}
            #: what acts in eager mode outside every block
            self.always = self._acting(frozenset())
            self.follow_blocks()

    def _pair(self, name: str) -> _Pair:
        """The numbers of one adapter for compiled code; those there are, while its strength is what it was."""
        strength, held = self.strengths[name], self._pairs.get(name)
        if held is not None and held.strength == strength:
            return held
        with torch.inference_mode(False):  # no views of one tensor, whose size would be a size to torch.compile
            return _Pair(strength, *(torch.tensor(n, dtype=torch.float64, device="cpu") for n in (strength, 0.0)))

    def follow_blocks(self) -> None:
        """Recompute what compiled code and exported programs read, after a block has opened or closed."""
        hidden = frozenset().union(*self.blocks.values()) if self.blocks else frozenset()
        self._shown = self._acting(hidden)
        self._put({name: pair.hidden if name in hidden else pair.shown for name, pair in self._pairs.items()})

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Let compiled code read these tensors."""
        if not compiles_by_identity():
            self._compiled = Acting(tensors)  # not new numbers in the old tensors: a backward may be waiting for them
        elif self._compiled.strengths.keys() == tensors.keys():
            for name, own in self._compiled.strengths.items():
                cast(Tensor, own).copy_(tensors[name])
        else:
            self._compiled = Acting({name: tensor.clone() for name, tensor in tensors.items()})

    def now(self) -> Acting:
        """Return what acts in this call."""
        if compiling():
            if exporting():  # a program that is final holds what acts now, and no more
                return self._shown
            self._note_compiled()
            return self._compiled
        blocks = _OPEN.get()
        if blocks is not None:
            hidden = blocks.hidden.get(self)
            return self.always if hidden is None else self._acting(hidden)
        # What is recomputed for backward is recomputed inside the block of the thread that called backward
        return self._shown if self.blocks and in_autograd_thread() else self.always

    def hides(self, name: str) -> bool:
        """Return whether an open block of this or of another thread hides the adapter."""
        return any(name in names for names in self.blocks.values())

    def answer(self, output: Tensor | None = None, *, seen: bool = True) -> None:
        """Note on the roll that the module has run, until the model's first backward.

        output: what it gave, None of a weight that was read. seen: False of calls that torch.compile or a transform
        follows, to which what is noted would be part of the code.
        """
        if seen and self.roll is not None:
            self.ran = True
            self.roll = self.roll.watch(output)

    def _free(self) -> list[str]:
        """The adapters that are not merged."""
        return [name for name in self.strengths if self.merged is None or name not in self.merged.names]

    def _acting(self, hidden: frozenset[str]) -> Acting:
        """What acts in eager mode where these names are hidden."""
        kept = self._eager  # another thread may put a new one in its place
        acting = kept.get(hidden)
        if acting is None:
            strengths = self.strengths
            acting = kept[hidden] = Acting(
                {name: strengths[name] for name in self._free() if name not in hidden and strengths[name] != 0}
            )
        return acting

    def _signature(self) -> tuple[Any, ...]:
        """What layers that share compiled code have in common."""
        return tuple(slot.geometry.shape for slot in self.slots.values()), tuple(self.strengths)

    @once_while_compiling
    def _note_compiled(self) -> bool:
        """Remember, while torch.compile reads the layer, that compiled code of it exists."""
        _COMPILED.add(self._signature())
        self._require_one_view()
        return True

    def _require_one_view(self) -> None:
        """Raise if compiled code exists and the open blocks of several threads do not hide the same names."""
        if len(set(self.blocks.values())) < 2 or self._signature() not in _COMPILED:
            return
        blocks = _OPEN.get()
        if set(self.blocks) - set(blocks.blocks if blocks else ()):
            raise ConcurrentBlocksError(
                "another thread or async task is inside a `disabled` or `enabled` block of this model that hides other "
                "adapters, and the model is compiled: compiled code knows one block at a time. Let one wait for the "
                "other (threading.Lock), give each a copy of the model, or run it without torch.compile"
            )

    def __getstate__(self) -> dict[str, Any]:
        # a copy is inside no block, nor on the roll of the model that it was copied from
        return {own.name: None if own.name == "roll" else self.__dict__[own.name] for own in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


@contextmanager
def opened(hides: Mapping[AdapterState, frozenset[str]]) -> Iterator[None]:
    """Make a block inside which names are hidden on states: for this thread or async task, and for compiled code.

    Args:
        hides: state -> names.

    Raises:
        ConcurrentBlocksError: a state is compiled, and a block of another thread hides other names on it.
    """
    block = Block(hides)
    outer = _OPEN.get()
    _OPEN.set(_Open((*(outer.blocks if outer else ()), block)))
    try:
        with _LOCK:
            for state, names in hides.items():
                state.blocks[block] = names
                state._require_one_view()
            for state in hides:
                state.follow_blocks()
        yield
    finally:
        _close(block)


def _close(block: Block) -> None:
    """Close a block, be it the innermost or not, as an ExitStack or a generator may."""
    now = _OPEN.get()
    rest = tuple(other for other in (now.blocks if now else ()) if other is not block)
    _OPEN.set(_Open(rest) if rest else None)
    with _LOCK:
        for state in block.hides:
            state.blocks.pop(block, None)
            state.follow_blocks()
