"""QuantisedMatrix: a tensor W (m, n) whose numbers are dequantised where an operation reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.kernels.blocks import BLOCK, accumulation_dtype, block_size, row_blocks
from peftkit.kernels.torch_private import tensor_without_memory, tree_map_only, without_torch_function
from peftkit.wrapping.bases.base import Base

_aten = torch.ops.aten


class QuantisedMatrix(Tensor):
    """W (m, n) of a quantised layer, or Wᵀ: a tensor to whoever computes with it, and none in memory.

    Rows that are sliced are dequantised, and no others. A product with it goes row block by row block, and what
    autograd keeps of it for backward is the stored numbers. A cast and a transposition make another of its kind. Any
    other operation dequantises all of W, for as long as it runs.

    Args:
        base: the stored numbers.
        dtype: of the numbers that operations see; by default that of the base.
        flipped: whether it is Wᵀ.
    """

    base: Base
    flipped: bool

    __torch_function__ = without_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, base: Base, dtype: torch.dtype | None = None, flipped: bool = False) -> QuantisedMatrix:
        m, n = base.shape
        size, strides = ((n, m), (1, n)) if flipped else ((m, n), (n, 1))
        made = tensor_without_memory(cls, size, strides, dtype or base.dtype, base.device)
        made.base, made.flipped = base, flipped
        return made

    def __init__(self, base: Base, dtype: torch.dtype | None = None, flipped: bool = False) -> None:
        del base, dtype, flipped

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantisedMatrix({self.base.title}, {tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> Any:
        raise NotImplementedError("compiled code takes the dequantised weight")

    def rows_of_base(self, start: int, stop: int) -> Tensor:
        """Return rows of W, be the tensor W or Wᵀ, dequantised to its dtype."""
        if start >= stop:
            return torch.zeros(0, self.base.shape[1], dtype=self.dtype, device=self.device)
        return self.base.rows(start, stop).to(self.dtype)

    def whole(self) -> Tensor:
        """Return all of the tensor, dequantised."""
        W = self.rows_of_base(0, self.base.shape[0])
        return W.mT if self.flipped else W

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield row blocks of W, be the tensor W or Wᵀ, dequantised."""
        for block in row_blocks(*self.base.shape, size=max(4 * BLOCK, block_size(self.device))):
            yield block, self.rows_of_base(block.start, block.stop)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
        plain_args, plain_kwargs = tree_map_only(QuantisedMatrix, QuantisedMatrix.whole, (args, kwargs))
        return func(*plain_args, **cast("dict[str, Any]", plain_kwargs))


def _same(M: QuantisedMatrix) -> QuantisedMatrix:
    return QuantisedMatrix(M.base, M.dtype, M.flipped)


def _transposed(M: QuantisedMatrix, *_: Any) -> QuantisedMatrix:
    return QuantisedMatrix(M.base, M.dtype, not M.flipped)


def _cast(M: QuantisedMatrix, *, dtype: torch.dtype | None = None, **others: Any) -> Any:
    device = others.get("device")
    if dtype is None or not dtype.is_floating_point or (device is not None and torch.device(device) != M.device):
        return NotImplemented
    return QuantisedMatrix(M.base, dtype, M.flipped)


def _slice(M: QuantisedMatrix, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % 2 != (1 if M.flipped else 0):
        return NotImplemented
    start, stop, _ = slice(start, end).indices(M.shape[dim])
    if step == 1:
        rows = M.rows_of_base(start, stop)
    else:
        single = [M.rows_of_base(i, i + 1) for i in range(start, stop, step)]
        rows = torch.cat(single) if single else M.rows_of_base(start, start)
    return rows.mT if M.flipped else rows


def _index(M: QuantisedMatrix, indices: Sequence[Tensor | None]) -> Any:
    if M.flipped or indices[0] is None or indices[0].dtype == torch.bool or indices[0].numel() >= len(M):
        return NotImplemented
    wanted, where = torch.unique(indices[0] % len(M), return_inverse=True)
    rows = torch.cat([M.rows_of_base(i, i + 1) for i in wanted.tolist()] or [M.rows_of_base(0, 0)])
    return _aten.index.Tensor(rows, [where, *indices[1:]])


def _product(a: Tensor, b: Tensor) -> Any:
    """a @ b, of which one is W or Wᵀ."""
    if isinstance(a, QuantisedMatrix):
        return NotImplemented if isinstance(b, QuantisedMatrix) else _product(b.mT, _transposed(a)).mT
    assert isinstance(b, QuantisedMatrix)
    if b.flipped:  # every block of rows of W gives columns of its own
        out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.promote_types(a.dtype, b.dtype), device=a.device)
        for block, rows in b.blocks():
            out[:, block] = a @ rows.mT
        return out
    acc = accumulation_dtype(a.dtype)
    total = torch.zeros(a.shape[0], b.shape[1], dtype=acc, device=a.device)
    for block, rows in b.blocks():
        total += a[:, block] @ rows
    return total.to(a.dtype)


def _biased_product(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, QuantisedMatrix) or beta != 1 or alpha != 1:
        return NotImplemented
    product = _product(a, b)
    return product if product is NotImplemented else product + bias


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.t.default: _transposed,
    _aten.transpose.int: _transposed,
    _aten._to_copy.default: _cast,
    _aten.slice.Tensor: _slice,
    _aten.index.Tensor: _index,
    _aten.mm.default: _product,
    _aten.addmm.default: _biased_product,
}
