"""Delta: a weight change ΔW (m, n) held as factors.

`dense` is the definition. Everything else has a default derived from it, which a structure overrides where its
factors give the same number for less; the tests hold every override against the default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkit.errors import ChangedTensorError
from peftkit.geometry import Geometry
from peftkit.kernels.blocks import BLOCK, accumulation_dtype, row_blocks, tiles
from peftkit.kernels.cache import cached_without_grad
from peftkit.kernels.torch_private import eager, transformed, version

#: what touching one element of a fresh matrix costs, in floating point operations of a matrix product
ELEMENT = 40
_SMALL = 1 << 14  # elements whose memory is negligible: 64 KiB of fp32


class WeightCache:
    """Cache of quantities that depend only on the frozen weight W and on constants of an adapter, such as W·Wᵀ.

    No write to W goes unseen: the first question after `check` compares fingerprints of all its numbers.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._fingerprint: object = None
        self._pending: Callable[[], object] | None = None

    def check(self, fingerprint: Callable[[], object]) -> WeightCache:
        """Forget everything before the next question, unless fingerprint() is what it was then. Returns the cache."""
        self._pending = fingerprint
        return self

    def __call__(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the quantity of that name, computed by `make` the first time."""
        if self._pending is not None:
            now, self._pending = self._pending(), None
            if now != self._fingerprint:
                self._kept, self._fingerprint = {}, now
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, reads: Callable[[], Sequence[Tensor]]) -> Tensor:
    """Return function(x), keeping for backward only x: what the function builds on the way is built again then.

    Args:
        function: reads x and the tensors of `reads`, and nothing else that may change.
        x: the input that gradients flow to, beside `reads`.
        reads: gives what must be the same in backward as it is now.

    Raises:
        ChangedTensorError: in backward, if one of `reads` was written to since. Torch raises there too, for what a
            graph keeps; a recomputed part keeps nothing, and would give the gradient of other numbers.
    """
    if not torch.is_grad_enabled() or transformed() or x.is_meta:  # torch.func cannot recompute
        return function(x)
    if not eager():
        return cast(Tensor, checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))
    before = [(tensor, version(tensor)) for tensor in reads()]

    def unchanged(x: Tensor) -> Tensor:
        for tensor, then in before:
            if version(tensor) != then:
                raise ChangedTensorError(
                    f"a tensor of shape {tuple(tensor.shape)} that ΔW is made of was written to between forward and "
                    "backward (by an optimiser's step, load_state_dict or an in-place operation): its gradient would "
                    "be of other numbers. Call backward before writing to it"
                )
        return function(x)

    return cast(Tensor, checkpoint(unchanged, x, use_reentrant=False, preserve_rng_state=False))


def total(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def identity_factors(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of M (m, n) as M·I or I·M, whichever identity is smaller."""
    identity = torch.eye(min(M.shape), dtype=M.dtype, device=M.device)
    return (M, identity) if M.shape[1] <= M.shape[0] else (identity, M)


class Delta(ABC):
    """A weight change ΔW (m, n), held as factors.

    Immutable: every method returns something new, but for methods whose name ends in `_`, which write to an argument.
    A subclass defines `shape`, `dense` and `scaled`, and overrides what its factors give for less.
    """

    #: whether `apply` reads wx, the layer's output without bias
    reads_output: bool = False
    #: whether ΔW is a matrix; not so for an `InputDependent` change, which acts by its factors only
    is_matrix: bool = True
    #: the adapter kind whose ΔW has this structure, which is what files call it; "" where no file has a name for it
    structure: ClassVar[str] = ""
    #: whether ΔW is a product of smaller factors, which then tell its rank
    factored: ClassVar[bool] = False
    #: whether building ΔW keeps nothing but factors for backward
    keeps_factors: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of ΔW."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return ΔW itself, (m, n), in the dtype of its factors."""

    @abstractmethod
    def scaled(self, strength: float | Tensor) -> Delta:
        """Return strength·ΔW, with the factor folded in where it is cheapest. strength: a number or a 0-d tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.dense().dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.dense().device

    # -- the factors ------------------------------------------------------------------------------------------

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Every tensor that ΔW is made of, the tensors of inner ΔW included."""
        found: list[Tensor] = []
        for value in self._fields().values():
            if isinstance(value, Delta):
                found.extend(value.factors)
            elif isinstance(value, Tensor):
                found.append(value)
        return tuple(found)

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> Delta:
        """Return the same structure with function(name, factor) in place of every factor, of inner ΔW too."""
        new = object.__new__(type(self))
        for name, value in self._fields().items():
            if isinstance(value, Delta):
                value = value.mapped(function)
            elif isinstance(value, Tensor):
                value = function(name, value)
            object.__setattr__(new, name, value)  # structures are frozen
        return new

    def _fields(self) -> dict[str, object]:
        """What the structure was made of, without what `cached_without_grad` put beside it."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_kept_")}

    def upcast(self) -> Delta:
        """Return the same ΔW with its factors in at least fp32. W itself, where it is a factor, stays as it is."""
        if self.dtype.itemsize >= 4:
            return self
        return self.mapped(lambda name, factor: factor if name == "W" else factor.to(accumulation_dtype(factor.dtype)))

    def rows_rescaled(self, f: Tensor) -> Delta | None:
        """Return diag(f)·ΔW in the dtype of ΔW, f (m,), where the factors can hold f; None elsewhere."""
        del f
        return None

    @property
    def parts(self) -> tuple[Delta, ...]:
        """ΔW of every expert of a stack; of one matrix, itself."""
        return (self,)

    # -- in files ---------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """The adapter kind that a file of this library holds it as, with what `as_parameters` gives."""
        return self.structure or "full"

    @property
    def rank(self) -> int | None:
        """The rank of its low-rank products, None for structures without such products."""
        return None

    def folded(self) -> Delta:
        """Return the same ΔW with every number of its structure in a factor."""
        return self

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """Return B (m, r) and A (r, n) with B·A = ΔW and r ≤ min(m, n)."""
        return identity_factors(self.dense())

    def as_parameters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return options and parameters of the adapter with this ΔW, of kind `structure`, or "full" without one."""
        return {}, {"change": self.dense()}

    # -- blocks of rows ---------------------------------------------------------------------------------------

    @property
    def row_multiple(self) -> int:
        """Blocks of rows must start at multiples of this to be computed alone; m when they cannot be."""
        return self.shape[0]

    def rows(self, block: slice) -> Tensor:
        """Return dense()[block] without building the rest. block: with a step too, where `row_multiple` is 1."""
        return self.dense()[block]

    def rows_(self, block: slice, out: Tensor) -> None:
        """Write `rows` into out, which has the dtype of the factors. Without gradients."""
        out.copy_(self.rows(block))

    def add_rows_(self, block: slice, W: Tensor) -> None:
        """Add `rows` to W in place. W: the rows `block`, few or many, of a weight, perhaps of the base ΔW reads."""
        for part in row_blocks(W.shape[0], W.shape[1], self.row_multiple):
            here = W[part]
            out = torch.empty(here.shape, dtype=self.dtype, device=here.device)
            self.rows_(slice(block.start + part.start, block.start + part.stop), out)
            here.add_(out)

    def dense_blockwise(self) -> Tensor:
        """Return `dense`, made of its rows block by block: nothing of its size is made beside it. Without gradients."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        size = 4 * BLOCK // out.itemsize  # a block is of so many bytes
        for block in row_blocks(*self.shape, self.row_multiple, size):
            self.rows_(block, out[block])
        return out

    def matrices(self, experts: slice) -> Tensor:
        """Return ΔW of some experts of a stack, (k, m, n); a ΔW of one matrix is that of one expert."""
        return self.dense()[None][experts]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return dense()[rows, columns], for where even the rows that belong together are too many numbers."""
        return self.rows(rows)[:, columns]

    # -- products ---------------------------------------------------------------------------------------------

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        """Return ΔW·x as layer g applies its weight.

        Args:
            x: the layer's input.
            wx: W·x without bias if `reads_output`; not read otherwise.
            g: the geometry of the layer.
        """
        del wx
        return recomputed(lambda x: g.run(x, self.dense()), x, lambda: self.factors)

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """Return out + ΔW·x in the dtype of out, where possible in fewer passes over memory than `apply` and a sum.

        Args:
            out: y, or what other ΔW have added to it. May be written over, unless `reads_output`.
            x: the layer's input.
            y: the layer's output, with its bias.
            bias: (m,), or None.
            g: the geometry of the layer.
        """
        wx = None
        if self.reads_output:
            wx = y if bias is None else y - g.per_channel(bias.to(y.dtype))
        return out + self.apply(x, wx, g).to(out.dtype)

    def lookup(self, index: Tensor) -> Tensor:
        """Return dense()[index], (*index.shape, n), as an embedding looks it up. index: row numbers, of any shape."""
        return recomputed(lambda index: F.embedding(index, self.dense()), index, lambda: self.factors)

    def inner(self, M: Tensor) -> Tensor:
        """Return <ΔW, M>_F, a scalar. M (m, n)."""
        return (self.dense() * M).sum()

    def sqnorm(self) -> Tensor:
        """Return ‖ΔW‖_F², a scalar."""
        return self.dense().square().sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor | None:
        """‖ΔW‖_F², a scalar, where it takes far less than building ΔW; None elsewhere."""
        return None

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        """Return an upper bound on max |ΔW_ij|, a scalar. max_abs_weight: max |W_ij| of the weight."""
        del max_abs_weight
        square = self.cheap_sqnorm
        return (self.sqnorm() if square is None else square).clamp(min=0).sqrt()

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        """Return <ΔW, W>_F and ‖ΔW‖_F², scalars. W (m, n): the weight that ΔW is of; cache: what is known of W."""
        del cache
        inner, square = [], []
        m, n = self.shape
        size = min(BLOCK, max(m * n // 4, _SMALL))  # never a matrix of W's size, however small W is
        for rows, columns in tiles(m, n, self.row_multiple, size):
            whole = columns.stop - columns.start == self.shape[1]
            tile = (self.rows(rows) if whole else self.tile(rows, columns)).reshape(-1)
            inner.append(torch.dot(tile, W[rows, columns].to(tile.dtype).reshape(-1)))
            square.append(torch.dot(tile, tile))
        return total(inner), total(square)

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Return <M_i, ΔW_i> and ‖ΔW_i‖² of every row i, each (m,). M (m, n)."""
        products, squares = [], []
        for block in row_blocks(*self.shape, self.row_multiple):
            rows = self.rows(block)
            products.append((rows * M[block].to(rows.dtype)).sum(1))
            squares.append(rows.square().sum(1))
        return torch.cat(products), torch.cat(squares)

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Return <M_j, ΔW_j> and ‖ΔW_j‖² of every column j, each (n,). M (m, n)."""
        dense = self.dense()
        return (dense * M).sum(0), dense.square().sum(0)

    def added_to(self, M: Tensor, strength: float = 1.0) -> Tensor:
        """Return M + strength·ΔW, accumulated in at least fp32 and rounded once to M's dtype. M (m, n)."""
        acc = accumulation_dtype(M.dtype)
        return (M.to(acc) + strength * self.dense().to(acc)).to(M.dtype)

    # -- costs, in floating point operations ------------------------------------------------------------------

    def apply_flops(self, outputs: int) -> int:
        """Return the cost of `apply` over that many output positions; the default builds ΔW and runs it."""
        return self.dense_flops() + 2 * outputs * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        """Return the cost of `dense`."""
        return self.shape[0] * self.shape[1]
