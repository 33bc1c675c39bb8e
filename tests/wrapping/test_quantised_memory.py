"""QLoRA's memory: weights stay as they are stored, and between forward and backward no copy of one is kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.wrapping.bases.base import Base
from peftkit.wrapping.bases.formats import format_of
from peftkit.wrapping.bases.matrix import QuantisedMatrix
from peftkit.wrapping.bases.torchao import TorchAO
from tests.support.matrix_quantised import OPTIONS, quantised

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

SIZE, LAYERS, TOKENS = 512, 3, 4
WEIGHT = SIZE * SIZE * 4  # the bytes of one weight in float32
ACTIVATION = TOKENS * SIZE * 4

#: bytes that a number of W takes, with its scales
STORED = {"bitsandbytes nf4": 0.5625, "bitsandbytes nf4 double": 0.52, "torchao int8": 1.01, "torchao fp8": 1.01}


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own that a tensor is made of."""
    if isinstance(tensor, QuantisedMatrix):
        for stored in tensor.base.stored:
            yield from parts(stored)
    elif type(tensor).__module__.startswith("torchao"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from parts(getattr(tensor, name))
    else:
        yield tensor


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """The bytes of the distinct pieces of memory of tensors, by address."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for part in parts(tensor):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_made_here() -> Iterator[None]:
    """What was there before is not looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> list[Tensor]:
    """Every tensor that Python code holds, functions of autograd among it."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def test_it_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer of torchao by itself keeps its weight dequantised."""
    monkeypatch.setattr(TorchAO, "run", Base.run)
    with pytest.raises(AssertionError):
        test_weights_stay_stored_and_nothing_of_their_size_is_kept_for_backward("lora", "torchao fp8")


def model(base: str, kind: str) -> nn.Sequential:
    layers = nn.Sequential(*(quantised(base, SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    pk.wrap(layers, kind, dtype=torch.float32, **OPTIONS.get(kind, {}))
    return layers


@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "glora"])
@pytest.mark.parametrize("base", STORED)
def test_weights_stay_stored_and_nothing_of_their_size_is_kept_for_backward(kind: str, base: str) -> None:
    layers = model(base, kind)
    for layer in layers:
        form = format_of(layer)
        assert form is not None
        assert form.of(layer).nbytes <= STORED[base] * SIZE * SIZE
    before = storages(alive())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layers(torch.randn(TOKENS, SIZE, requires_grad=True))
    after = storages([*alive(), *kept])
    new = {pointer: size for pointer, size in after.items() if pointer not in before}
    assert max(new.values()) < WEIGHT / 4
    # a few activations and what the adapter is made of, for each layer: far less than even one weight
    adapter = sum(p.nbytes for p in pk.adapter_parameters(layers)) / LAYERS
    assert sum(new.values()) <= LAYERS * (8 * ACTIVATION + 4 * adapter)
    y.sum().backward()
    assert all(p.grad is not None for p in pk.adapter_parameters(layers))


@pytest.mark.parametrize("base", STORED)
def test_a_trained_model_takes_its_stored_numbers_and_its_adapters(base: str) -> None:
    before = storages(alive())
    layers = model(base, "lora")
    optimizer = torch.optim.AdamW(pk.adapter_parameters(layers))
    layers(torch.randn(TOKENS, SIZE)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    new = {pointer: size for pointer, size in storages(alive()).items() if pointer not in before}
    adapters = sum(p.nbytes for p in pk.adapter_parameters(layers))
    assert sum(new.values()) <= LAYERS * STORED[base] * SIZE * SIZE + 3 * adapters + 4096
