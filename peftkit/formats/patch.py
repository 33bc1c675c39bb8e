"""Patch: one weight's adapter as data, in this library's terms; what every format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from peftkit.geometry import Shape


@dataclass(frozen=True)
class Patch:
    """An adapter of one weight: its kind, its options and its tensors as `Adapter.state_dict` names them.

    shape: of the matrix it adapts. A file that holds factors of a flattened kernel says rows and columns only; then
    `kernel_known` is False and shape.kernel is empty. convention: of a native file; None for what was translated.
    scale: where the factor γ came from, in words for a user.
    """

    kind: str
    options: dict[str, Any]
    shape: Shape
    tensors: dict[str, Tensor]
    kernel_known: bool = True
    convention: str | None = None
    scale: str = ""


@dataclass(frozen=True)
class Bundle:
    """What an adapter file holds: patches by the weight they are for, under names of the file's own spelling.

    format: "native", "kohya", "lycoris", "diffusers" or "peft". vectors: changes of biases and norms, which are not
    matrices, by "module.bias" or "module.weight". base: fingerprints of the weights it was trained on. portable:
    whether derived tensors are in the file. unclaimed: tensors of a native file that its header does not mention.
    """

    format: str
    patches: dict[str, Patch]
    name: str = "default"
    vectors: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, np.ndarray] = field(default_factory=dict)
    portable: bool = True
    unclaimed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
