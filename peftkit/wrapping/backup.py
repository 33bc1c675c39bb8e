"""Backups of merged weights: a copy, or the compressed difference of the bits; of a divided weight, each process's."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from peftkit.errors import MergeStateError
from peftkit.kernels.sharding import Division, local, sharded, whole
from peftkit.wrapping.bases.matrix import QuantisedMatrix

if TYPE_CHECKING:
    from peftkit.wrapping.sites import Slot


class Backup(Protocol):
    """Keeps what it takes to restore one weight."""

    def original(self, merged: Tensor) -> Tensor:
        """Return the weight before the merge, given the weight after it."""
        ...


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy in main memory."""

    weight: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Copy:
        """Keep `before`, a tensor that no other code writes to."""
        del after
        return cls(before.cpu())

    def original(self, merged: Tensor) -> Tensor:
        return self.weight.to(merged.device, merged.dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """The difference of the two weights as ordered integers, compressed: small where ΔW is small."""

    planes: tuple[bytes, ...]
    checksum: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Packed:
        difference = _ordered(after) - _ordered(before)
        # Zigzag makes small differences of either sign small; byte planes put their zeros together
        zigzag = (difference << 1) ^ (difference >> (8 * difference.itemsize - 1))
        planes = np.ascontiguousarray(zigzag).view(np.uint8).reshape(-1, difference.itemsize).T
        return cls(tuple(zlib.compress(np.ascontiguousarray(plane).tobytes(), 1) for plane in planes), checksum(after))

    def original(self, merged: Tensor) -> Tensor:
        if checksum(merged) != self.checksum:
            raise MergeStateError(
                "a merged weight was trained, cast or overwritten: the difference to it no longer gives the base back"
            )
        ordered = _ordered(merged)
        planes = [np.frombuffer(zlib.decompress(plane), np.uint8) for plane in self.planes]
        zigzag = np.ascontiguousarray(np.stack(planes, axis=1)).view(f"<u{ordered.itemsize}").reshape(-1)
        difference = (zigzag >> 1).astype(ordered.dtype) ^ -(zigzag & 1).astype(ordered.dtype)
        return _from_ordered(ordered - difference, merged)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _flat(weight: Tensor) -> Tensor:
    """The numbers of a weight in main memory, in order and one after another: (numel,).

    Not `reshape(-1)`: a dimension of length one may have any stride, also in a tensor that is_contiguous (a 1×1 kernel
    in channels_last, a Linear(1, n) of transposed storage), and a view in another dtype needs a last stride of one.
    """
    whole = weight.detach().cpu().contiguous()
    return whole.as_strided((whole.numel(),), (1,))


def _ordered(weight: Tensor) -> np.ndarray:
    """The bits of floats as integers in the order of the floats, a bijection. Any shape -> (numel,)."""
    bits = _flat(weight).view(_INTEGERS[weight.itemsize]).numpy()
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)


def _from_ordered(ordered: np.ndarray, like: Tensor) -> Tensor:
    bits = ordered ^ ((ordered >> (8 * ordered.itemsize - 1)) & np.iinfo(ordered.dtype).max)
    return torch.from_numpy(bits).view(like.dtype).reshape(like.shape).to(like.device)


BACKUPS = {"copy": Copy, "packed": Packed}


# 64-bit words in one sum of `checksum`
_WORDS = 512


def checksum(weight: Tensor) -> int:
    """Return a checksum of a weight's bits, dtype and shape: one number that differs changes it.

    Sums of 64-bit words go at the speed of memory, where a checksum of every byte takes longer than a merge. Of a
    quantised weight, it is that of the stored numbers.
    """
    if isinstance(weight, QuantisedMatrix):
        return zlib.crc32(repr([checksum(tensor) for tensor in weight.base.stored]).encode())
    bits = _flat(weight).view(torch.uint8).numpy()
    whole = len(bits) // (8 * _WORDS) * 8 * _WORDS
    sums = bits[:whole].view(np.uint64).reshape(-1, _WORDS).sum(1)
    rest = zlib.crc32(bits[whole:].tobytes(), zlib.crc32(sums.tobytes()))
    return rest ^ zlib.crc32(f"{weight.dtype}{tuple(weight.shape)}".encode())


@dataclass(frozen=True, eq=False)
class Part:
    """This process's part of the backup of a divided parameter, of all of it, whatever rows an adapter is on.

    Attributes:
        own: the backup of the part.
        division: how the parameter is divided.
        kept: all of the parameter in main memory, for adapters that read it in a forward pass; None without any.
    """

    own: Backup
    division: Division
    kept: Tensor | None

    def original(self, merged: Tensor) -> Tensor:
        """Return the parameter before the merge: divided where `merged` is; else whole, by all processes together."""
        if sharded(merged):
            return self.division.joined(self.own.original(local(merged.detach())))
        if self.kept is not None:
            return self.kept.to(merged.device, merged.dtype)
        return whole(self.division.joined(self.own.original(self.division.part(merged.detach()))))


@dataclass(frozen=True, eq=False)
class Merged:
    """The adapters that are merged into a module's weights, and the backups of those weights."""

    names: tuple[str, ...]
    backups: dict[str, Backup]
    checksums: dict[str, int]

    def original(self, slot_name: str, slot: Slot, parameter: Tensor) -> Tensor:
        """Return the slot's weight before the merge, given the slot's parameter now."""
        backup = self.backups.get(slot_name)
        if backup is None:
            return slot.of(parameter)
        if isinstance(backup, Part):
            return slot.of(backup.original(parameter))
        return backup.original(slot.of(parameter))
