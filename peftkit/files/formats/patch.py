"""Patch: one weight's adapter as data, in this library's terms; what every format is read into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from peftkit.errors import error_context
from peftkit.geometry import Shape

T = TypeVar("T")


@dataclass(frozen=True)
class Patch:
    """An adapter of one weight: its kind, its options and its tensors as `Adapter.state_dict` names them.

    shape: of the matrix it adapts, 0 where the file does not say. A file that holds factors of a flattened kernel says
    rows and columns only; then `kernel_known` is False and shape.kernel is empty. convention: of a native file; None
    for what was translated. scale: where the factor γ came from, in words. bias: why it cannot go on a layer with one.
    per_channel: its numbers are of shape.channels input channels, whatever the kernel. transposed: whether the weight
    is kept as (in, out): a transposed convolution's, or with a kernel of () a Conv1D's of GPT-2. read: whether it acts
    where other code reads the weight. embedding: whether the weight is an embedding's, a row for each token.
    quantised: whether it was trained on a quantised weight.
    on_kernel: what is to be known where the weight has a kernel larger than 1, as a warning.
    same_as: the patch whose adapter this one is, on another layer of a shared weight.
    common: the parameters that several adapters share, each with the key by which the file has it, once.
    sized: gives the tensors that are others for another weight, which the file holds for all of its weights.
    least: the rows and columns of the smallest weight that it fits, where its options alone do not say them.
    """

    kind: str
    options: dict[str, Any]
    shape: Shape
    tensors: dict[str, Tensor]
    kernel_known: bool = True
    convention: str | None = None
    scale: str = ""
    bias: str = ""
    transposed: bool = False
    embedding: bool = False
    same_as: str = ""
    per_channel: bool = False
    read: bool = False
    quantised: bool = False
    on_kernel: str = ""
    common: Mapping[str, str] = field(default_factory=dict)
    sized: Callable[[Shape], dict[str, Tensor]] | None = None
    least: tuple[int, int] | None = None

    def on(self, shape: Shape) -> Patch:
        """Return the patch with all of its tensors, for a weight of that shape."""
        return self if self.sized is None else replace(self, tensors=self.tensors | self.sized(shape), sized=None)

    @property
    def rank(self) -> int | None:
        """The rank among the options, None without one."""
        rank = self.options.get("rank")
        return rank if isinstance(rank, int) else None


class OnDemand(Mapping[str, T]):
    """Parts of a file by name, each read when it is asked for and not kept. path: for the errors."""

    def __init__(self, path: Path, names: Iterable[str], read: Callable[[str], T]) -> None:
        self._path, self._names, self._read = path, dict.fromkeys(names), read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        with error_context(self._path):
            return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds: patches by the weight they are for, under names of the file's own spelling.

    format: "native", "kohya", "diffusers" or "peft". vectors: changes of biases and norms, which are not matrices, by
    "module.bias" or "module.weight". base: fingerprints of the weights it was trained on. portable: whether derived
    tensors are in the file. unclaimed: tensors of a native file that its header does not mention. size: of all tensors,
    in bytes.
    roles: what the tensors of every module are, by the names in the file; of other programs' files. alphas: those among
    them that are α.
    extras: values of parameters that trained beside the adapters, by their names in the model. config: PEFT's, of a
    folder. renamed: name in the file -> name here, of those that are not the same.
    """

    format: str
    patches: Mapping[str, Patch]
    name: str = "default"
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, np.ndarray] = field(default_factory=dict)
    portable: bool = True
    unclaimed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def name_in_file(self, name: str) -> str:
        """Return what the file itself calls a module."""
        return next((old for old, new in self.renamed.items() if new == name), name)

    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
