"""What was made of some tensors, kept for as long as they are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from peftkit.kernels import fused

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
        self._kept: tuple[object, tuple[Tensor, ...], T] | None = None

    def __call__(self, make: Callable[[], T], *inputs: Tensor, of: object = None) -> T:
        """make(), or what it gave when the inputs were these and `of` this very object."""
        if torch.is_grad_enabled() or not fused.eager() or not all(map(_plain, inputs)):
            self._called, self._kept = False, None
            return make()
        if not self._called:
            self._called = True
            return make()
        cached_without_grad = self._kept  # threads may call at once
        if cached_without_grad is None or cached_without_grad[0] is not of or not _same(inputs, cached_without_grad[1]):
            self._kept = cached_without_grad = of, tuple(t.detach().clone() for t in inputs), make()
        return cached_without_grad[2]

    def __deepcopy__(self, memo: object) -> Memo[T]:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo[Any]], tuple[()]]:
        return Memo, ()


def cached_without_grad(method: Callable[[Any], T]) -> T:
    """A property of an immutable object that is computed once where no gradients are asked for, else at every use."""
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
