"""What is particular to the layers of bitsandbytes, and PEFT's own adapters on them as an independent reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import UnsupportedLayerError
from peftkit.wrapping.bases.bitsandbytes import FourBit
from peftkit.wrapping.layer import Adapted
from tests.support.matrix_quantised import COLUMNS, network, quantised
from tests.support.zoo import train

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("base", ["bitsandbytes nf4 double", "bitsandbytes int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_peft_computes(kind: str, base: str) -> None:
    peft = pytest.importorskip("peft")
    model = network(base)
    pk.wrap(model, kind, rank=4, alpha=8)
    theirs = network(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **KINDS[kind])
    theirs = peft.get_peft_model(theirs, config).base_model.model
    train(model, size=0.05)
    with torch.no_grad():
        for i in (0, 2):
            own = model[i].adapters["default"]
            inner = own.inner if kind == "dora" else own
            theirs[i].lora_A["default"].weight.copy_(inner.down)
            theirs[i].lora_B["default"].weight.copy_(inner.up)
            if kind == "dora":
                theirs[i].lora_magnitude_vector["default"].weight.copy_(own.magnitude)
    x = torch.randn(3, 7, COLUMNS)
    outputs, factors = [], []
    for each in (model, theirs):
        y = each(x)
        y.square().sum().backward()
        outputs.append(y)
    factors = [model[0].adapters["default"], theirs[0].lora_A["default"].weight]
    own = factors[0].inner.down if kind == "dora" else factors[0].down
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(own.grad, factors[1].grad, rtol=1e-3, atol=1e-3 * float(own.grad.abs().max()))


@pytest.mark.parametrize("make", [bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt])
def test_a_layer_that_is_not_quantised_yet_is_refused(make: type[nn.Module]) -> None:
    options = {"has_fp16_weights": False} if make is bitsandbytes.nn.Linear8bitLt else {}
    with pytest.raises(UnsupportedLayerError, match="not quantised yet: move the model to its device"):
        pk.wrap(nn.Sequential(make(8, 8, **options)), "lora", targets="0")


def test_storage_in_a_wider_dtype() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16)
    layer = nn.Sequential(layer).to("cpu")
    before = layer(torch.ones(2, 64))
    pk.wrap(layer, "dora", rank=2)
    assert torch.equal(layer(torch.ones(2, 64)), before)


def interleaved(columns: int = 128, rows: int = 96) -> tuple[nn.Module, torch.Tensor]:
    """A 4-bit layer in the layout that CPUs with AVX512-bf16 get in evaluation, and its W before that."""
    layer = quantised("bitsandbytes nf4 double", rows, columns)
    W = FourBit.of(layer).rows(0, rows)
    weight: Any = layer.weight
    convert = bitsandbytes.functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = convert(weight.data, weight.quant_state)
    return layer, W


def test_the_layout_of_evaluation_is_read() -> None:
    layer, W = interleaved()
    base = FourBit.of(layer)
    assert torch.allclose(base.rows(0, 96).float(), W, rtol=0.02)  # scales and numbers are in bf16 there
    assert torch.equal(base.rows(5, 50), base.rows(0, 96)[5:50])


def test_it_trains_after_evaluation() -> None:
    layer, W = interleaved()
    pk.wrap(layer, "lora", rank=2)
    assert isinstance(layer, Adapted)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], W.sum(0), rtol=0.1, atol=0.1)


# torch's compiler makes an instance of every autograd function it reads, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compiled_code_computes_the_same(kind: str) -> None:
    model, x = network("bitsandbytes nf4"), torch.randn(3, COLUMNS)
    pk.wrap(model, kind, rank=2)
    train(model)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(x)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in pk.adapter_parameters(model))
