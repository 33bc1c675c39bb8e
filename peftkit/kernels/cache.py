"""Caches of what follows from small tensors, compared bit for bit, so that no write to them goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from peftkit.kernels.torch_private import eager

T = TypeVar("T")
_PLAIN = (Tensor, nn.Parameter)


class Memo(Generic[T]):
    """The last result of a function of small tensors, while they are bit for bit what they were.

    Comparing them reads them once, far less than solving or projecting with them, and sees every write there is: also
    one through `.data`, which no version counts. Only on the CPU, where a comparison waits for nothing, and without
    gradients, since a graph serves one backward. Nothing is kept of the first call, which may be the only one.
    """

    def __init__(self) -> None:
        self._called = False
        self._kept: tuple[tuple[Tensor, ...], T] | None = None

    def __call__(self, make: Callable[[], T], *inputs: Tensor) -> T:
        """Return make(), or what it gave when the inputs were the same."""
        if torch.is_grad_enabled() or not eager() or not all(map(_plain, inputs)):
            self._called, self._kept = False, None
            return make()
        if not self._called:
            self._called = True
            return make()
        kept = self._kept  # threads may call at once
        if kept is None or not _same(inputs, kept[0]):
            self._kept = kept = tuple(t.detach().clone() for t in inputs), make()
        return kept[1]

    def __deepcopy__(self, memo: object) -> Memo[T]:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo[Any]], tuple[()]]:
        return Memo, ()


def cached_without_grad(method: Callable[[Any], T]) -> T:
    """Make a method a property of an immutable object, computed once under no_grad, and else at every use."""
    name = f"_kept_{method.__name__}"

    def get(self: Any) -> T:
        if torch.is_grad_enabled():
            return method(self)
        if name not in self.__dict__:
            self.__dict__[name] = method(self)
        return self.__dict__[name]

    return cast(T, property(get, doc=method.__doc__))


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.is_cpu


def _same(inputs: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> bool:
    for now, then in zip(inputs, before, strict=True):
        if now.dtype != then.dtype or not torch.equal(now, then):
            return False
    return True
