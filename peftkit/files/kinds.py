"""Any ΔW as a LoRA, a LoHa, a LoKr or the matrix itself: exactly, or the best there is of so many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from peftkit.adapters.lokr import factorize
from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.as_low_rank import as_low_rank
from peftkit.delta.stack import stack_of
from peftkit.delta.truncation import Keep, nearest, nearest_kronecker, truncate
from peftkit.errors import ExportError, FileError, error_context, require_choice
from peftkit.geometry import Shape

#: entries of the largest ΔW that is written whole; the embeddings of the largest models have as many
_LARGEST = 2**32
#: how torch says that memory did not suffice, or could not for any machine
_NO_MEMORY = ("DefaultCPUAllocator", "allocate memory", "out of memory", "Storage size calculation overflowed")


@dataclass(frozen=True)
class Recipe:
    """How to make a kind of ΔW. shape: of its weight; keep: the ranks; factor: bound of lokr; seed: of projections."""

    shape: Shape
    keep: Keep | None = None
    factor: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind that any ΔW can be written as. ranked: whether it has ranks to keep."""

    make: Callable[[Delta, Recipe], Delta]
    ranked: bool


def _lora(delta: Delta, recipe: Recipe) -> LowRank:
    return as_low_rank(delta) if recipe.keep is None else truncated(delta, recipe.keep, recipe.seed)


def _loha(delta: Delta, recipe: Recipe) -> Delta:
    """B·A ⊙ 1·1ᵀ: the same matrix, with a second product of ones in its first rank."""
    if recipe.keep is None and delta.structure == Hadamard.structure:
        return delta
    low = _lora(delta, recipe)
    up, down = torch.zeros_like(low.B), torch.zeros_like(low.A)
    up[:, 0], down[0] = 1, 1
    return Hadamard(low.B, low.A, up, down)


def _lokr(delta: Delta, recipe: Recipe) -> Delta:
    if delta.structure == Kron.structure:
        return delta
    outer = factorize(recipe.shape.rows, recipe.factor)[0], factorize(recipe.shape.channels, recipe.factor)[0]
    C, D, _ = nearest_kronecker(dense(delta), outer)
    return Kron(C, D)


def _full(delta: Delta, recipe: Recipe) -> Dense:
    del recipe
    return Dense(dense(delta))


#: what `convert` can make
KINDS: Mapping[str, Kind] = MappingProxyType(
    {"lora": Kind(_lora, True), "loha": Kind(_loha, True), "lokr": Kind(_lokr, False), "full": Kind(_full, False)}
)


def kind_of(name: str, among: Iterable[str]) -> Kind:
    """The kind of that name, OptionError unless it is among these."""
    require_choice("kind", name, among)
    return KINDS[name]


def by_expert(make: Callable[[Sequence[Delta], Shape], Delta], deltas: Sequence[Delta], shape: Shape) -> Delta:
    """Make a ΔW of others, expert by expert where they are of a stack of experts.

    Args:
        make: of ΔW of one matrix, and the shape of its weight.
        deltas: of one weight.
        shape: of it.

    Raises:
        ExportError: one adapter cannot hold what was made for the experts.
    """
    if shape.experts == 1:
        return make(deltas, shape)
    return stack_of([make(own, shape.one) for own in zip(*(delta.parts for delta in deltas), strict=True)])


def keep_of(rank: int | None, energy: float | None, threshold: float | None) -> Keep | None:
    """Which ranks to keep, None where nothing says it."""
    return None if (rank, energy, threshold) == (None, None, None) else Keep(rank, energy, threshold)


def truncated(delta: Delta, keep: Keep, seed: int = 0) -> LowRank:
    """The best low-rank ΔW of the ranks to keep."""
    low = as_low_rank(delta) if delta.factored else None
    small = low is not None and low.rank < min(low.shape)
    best, _ = truncate(low, keep) if low is not None and small else nearest(dense(delta), keep, seed=seed)
    if not all(torch.isfinite(factor).all() for factor in best.factors):
        raise FileError(f"its ΔW is too large for factors of {best.dtype}")
    return best


def dense(delta: Delta) -> Tensor:
    """ΔW (m, n) itself, finite, where memory can be expected to hold it: small factors can claim any size."""
    m, n = delta.shape
    if m * n > _LARGEST:
        raise ExportError(f"a ΔW of {m}×{n} is larger than any weight, and is not written out")
    found = delta.dense()
    if not torch.isfinite(found).all():
        raise FileError(f"its ΔW of {m}×{n} is not finite as {found.dtype}: its factors, or its base, are too large")
    return found


@contextmanager
def computing(file: object, module: str) -> Iterator[None]:
    """Name the file and the module where a ΔW has no singular values or does not fit into memory."""
    with error_context(f"{file}: {module}"):
        try:
            yield
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage] (it is documented)
            raise FileError("its ΔW has no singular values: it is not finite, or too large for its dtype") from error
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY)):
                raise
            raise ExportError(f"its ΔW does not fit into memory: {str(error).splitlines()[0]}") from error


def cast(delta: Delta, dtype: torch.dtype | None, alpha: float | None = None) -> Delta:
    """The ΔW that factors kept in a dtype stand for. alpha: the one a file has for all, with the rest in B."""
    if dtype is None:
        return delta
    rest = {} if alpha is None or delta.rank is None else {"B": delta.rank / alpha}

    def kept(name: str, factor: Tensor) -> Tensor:
        by = rest.get(name, 1.0)
        return (factor * by).to(dtype).to(factor.dtype) / by

    return (delta.folded() if delta.structure else Dense(delta.dense())).mapped(kept)


def shown(delta: Delta) -> str:
    """Kind and rank, for a report."""
    return f"{delta.kind} {delta.rank or ''}".strip()
