"""Merge and restore where a weight is not stored row by row: channels_last, transposed, strided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.files.formats.container import raw
from peftkit.wrapping.backup import BACKUPS, Packed, checksum
from tests.support.laws import bits
from tests.support.zoo import LAYERS, make, train


def channels_last(weight: Tensor) -> Tensor:
    """The same numbers, the channels of one position beside each other; of a Linear nothing changes."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.clone(memory_format=formats.get(weight.dim(), torch.contiguous_format))


def transposed(weight: Tensor) -> Tensor:
    """The same numbers, column by column: what a Linear made from the transpose of another's weight holds."""
    return weight.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def every_other(weight: Tensor) -> Tensor:
    """The same numbers, every second one of a longer row of memory."""
    return torch.stack([weight, weight], -1)[..., 0]


STORAGES = {f.__name__: f for f in (channels_last, transposed, every_other)}

#: beside the zoo's: every dimension of length one may have any stride
NARROW = {
    "linear to 1": lambda: nn.Linear(8, 1),
    "linear from 1": lambda: nn.Linear(1, 8),
    "linear 1 to 1": lambda: nn.Linear(1, 1),
    "conv2d k1 from 1": lambda: nn.Conv2d(1, 8, 1),
    "conv2d k1 to 1": lambda: nn.Conv2d(8, 1, 1),
}


def layer_of(name: str) -> nn.Module:
    if name in LAYERS:
        return make(name, torch.float32)[0]
    torch.manual_seed(0)
    return NARROW[name]()


@pytest.mark.parametrize("backup", BACKUPS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *NARROW])
def test_merge_and_restore_bit_for_bit(name: str, storage: str, dtype: torch.dtype, backup: str) -> None:
    """However the weight is stored, merging gives the same numbers, in place, and restoring gives every bit back."""
    layer, plain = layer_of(name).to(dtype), layer_of(name).to(dtype)
    layer.weight = nn.Parameter(STORAGES[storage](layer.weight.detach()))
    plain.weight = nn.Parameter(plain.weight.detach().clone(memory_format=torch.contiguous_format))
    before, place, strides = bits(layer.weight), layer.weight.data_ptr(), layer.weight.stride()
    for each in (layer, plain):
        torch.manual_seed(1)
        pk.wrap(each, "lora", rank=1)
        train(each)
        pk.merge(each, backup=backup)
    assert bits(layer.weight) != before, "the merge changed nothing"
    torch.testing.assert_close(layer.weight, plain.weight)
    assert (layer.weight.data_ptr(), layer.weight.stride()) == (place, strides), "the weight was moved"
    pk.restore(layer)
    assert bits(layer.weight) == before
    assert (layer.weight.data_ptr(), layer.weight.stride()) == (place, strides), "the weight was moved"


#: of one number, a vector of one, and a kernel of one: strides that no step ever uses
STRANGE: dict[str, Callable[[], Tensor]] = {
    "one number": lambda: torch.randn(100).as_strided((1, 1), (9, 7)),
    "one row": lambda: torch.randn(100).as_strided((1, 8), (3, 1)),
    "one column": lambda: torch.randn(100).as_strided((8, 1), (1, 5)),
    "1×1 kernel": lambda: torch.randn(100).as_strided((4, 3, 1, 1), (3, 1, 3, 3)),
    "empty": lambda: torch.randn(0, 4),
}


@pytest.mark.parametrize("case", STRANGE)
def test_bytes_of_any_strides(case: str) -> None:
    tensor = STRANGE[case]()
    assert bytes(raw(tensor)) == bits(tensor)
    plain = torch.empty(tensor.shape).copy_(tensor)
    assert checksum(tensor) == checksum(plain)
    assert bits(Packed.of(tensor, plain * 2).original(plain * 2)) == bits(plain)
