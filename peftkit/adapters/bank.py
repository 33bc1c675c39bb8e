"""Frozen random matrices that no file holds: functions of a seed, whatever other layers an adapter is put on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

#: what has been drawn so far of each endless table, by its seed, role, width, device and dtype
_TABLES: dict[tuple[object, ...], Tensor] = {}


def bank(seed: int, role: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Return a matrix (rows, columns) from U(−1, 1): the first rows of an endless table, which layers share.

    A table of more rows begins with the same rows, so that a layer's matrix depends on its own sizes alone. It is
    drawn in fp32 on the CPU, the same on every device.

    Args:
        seed: Of the table.
        role: What the matrix is for; another role has another table.
        rows: How many of its rows.
        columns: How many columns it has.
        like: A tensor of the device and dtype wanted.

    Example:
        >>> from peftkit.adapters.bank import bank
        >>> like = torch.zeros(())
        >>> torch.equal(bank(0, "up", 3, 2, like), bank(0, "up", 9, 2, like)[:3])
        True
    """
    if like.is_meta:
        return torch.empty(rows, columns, dtype=like.dtype, device="meta")
    key = (seed, role, columns, like.device, like.dtype)
    if key not in _TABLES or len(_TABLES[key]) < rows:
        _TABLES[key] = drawn(seed, role, (rows, columns)).to(like.device, like.dtype)
    return _TABLES[key][:rows]


def drawn(seed: int, role: str, sizes: Sequence[int]) -> Tensor:
    """Return numbers from U(−1, 1), in fp32 on the CPU, that a seed and a role alone determine; nothing is kept."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(role.encode())) % 2**32)
    return torch.empty(sizes, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=generator)
