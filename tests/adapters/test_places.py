"""A file's places in a spectrum or between singular vectors are places, each once, or the file is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import peftkit as pk
from peftkit.errors import MismatchError
from tests.support.zoo import make, target_of, train


def beyond(indices: Tensor) -> None:
    indices[..., 0, 0] = 99


def below(indices: Tensor) -> None:
    indices[..., 1, 0] = -1


def twice(indices: Tensor) -> None:
    indices[..., 1] = indices[..., 0]


@pytest.mark.parametrize("damage", [beyond, below, twice])
@pytest.mark.parametrize("layer", ["linear", "experts"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fourierft", {"frequencies": 3}),
        ("fourierft", {"frequencies": 30}),
        ("svft", {"pattern": "random", "off_diag": 2}),
    ],
)
def test_what_are_no_places_is_refused(
    kind: str, options: dict[str, Any], layer: str, damage: Callable[[Tensor], None], tmp_path: Path
) -> None:
    module, _ = make(layer)
    plain = copy.deepcopy(module)
    pk.wrap(module, kind, targets=target_of(module), **options)
    train(module)
    path = pk.save(module, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    damage(next(tensor for key, tensor in tensors.items() if key.endswith("indices")))
    save_file(tensors, path, metadata)
    with pytest.raises(MismatchError, match=r"indices: they are not \d+ different places of a \d+×\d+ matrix"):
        pk.load(plain, path)
    assert pk.inspect(path).problems
