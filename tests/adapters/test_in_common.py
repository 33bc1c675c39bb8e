"""Kinds whose layers train parameters in common: each ΔW against its definition, and against PEFT's class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import Adapter, registry
from peftkit.errors import FileError, OptionError
from peftkit.files.bind import take_rows
from peftkit.files.formats.patch import Patch
from peftkit.geometry import Shape
from peftkit.wrapping.installed import installed_adapters
from tests.support.files import metadata, write
from tests.support.zoo import train

M, N = 12, 10


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N)).double()


def adapters(model: nn.Module) -> list[Adapter]:
    return [at.adapter for at in installed_adapters(model)]


def wrapped(kind: str, **options: Any) -> nn.Sequential:
    model = net()
    pk.wrap(model, kind, **options)
    train(model)
    return model


def in_peft(config: peft.PeftConfig) -> peft.PeftModel:
    return peft.get_peft_model(copy.deepcopy(net()), config).double()


def require_same_training(
    ours: nn.Module, theirs: nn.Module, parameters: list[tuple[Tensor, Tensor]], x: Tensor
) -> None:
    """Raise unless outputs and gradients agree. parameters: those of ours, each with PEFT's."""
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for own, other in parameters:
        assert own.grad is not None and own.grad.any()
        torch.testing.assert_close(own.grad, other.grad)


# -- VB-LoRA ----------------------------------------------------------------------------------------------------------

VB: dict[str, Any] = {"rank": 3, "vectors": 9, "length": 2, "top": 3, "bound": 0.5}


def test_vb_lora_mixes_pieces_of_the_vectors_with_the_largest_logits() -> None:
    torch.manual_seed(0)
    options = {**VB, "length": 5}  # the last piece of a column of B is of 2
    adapter = registry.build("vb-lora", Shape(M, N), torch.zeros(M, N).double(), **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
        bank, up, down = (adapter.get_parameter(name) for name in ("bank", "logits_up", "logits_down"))
        B, A = torch.zeros(15, 3).double(), torch.zeros(3, N).double()
        for logits, factor in ((up.transpose(0, 1), B.mT), (down, A)):
            for row, pieces in enumerate(logits):
                for at, piece in enumerate(pieces):
                    largest = piece.argsort(descending=True)[:3]
                    shares = piece[largest].exp() / piece[largest].exp().sum()
                    factor[row, 5 * at : 5 * at + 5] = sum(s * bank[i] for s, i in zip(shares, largest, strict=True))
        start = adapter.get_buffer("up0") @ adapter.get_buffer("down0")
        torch.testing.assert_close(adapter(torch.zeros(M, N), 1.0).dense(), B[:M] @ A - start)
        assert start.norm() > 0.1


def test_vb_lora_trains_as_peft_s_on_a_base_less_the_start() -> None:
    """PEFT's ΔW is not 0 at the start: its layer is W + B₀·A₀ then, and this one is W, with the same gradients."""
    ours = wrapped("vb-lora", **VB)
    config = peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=2, topk=3, target_modules=["0", "2"])
    theirs = in_peft(config)
    layers = [layer for layer in theirs.modules() if isinstance(layer, peft.tuners.vblora.layer.VBLoRALayer)]
    bank = theirs.base_model.vblora_vector_bank["default"]
    assert layers[0].get_delta_weight("default").any()
    pairs = [(adapters(ours)[0].get_parameter("bank"), bank)]
    with torch.no_grad():
        for own, layer in zip(adapters(ours), layers, strict=True):
            pairs.append((own.get_parameter("logits_up"), layer.vblora_logits_B["default"]))
            pairs.append((own.get_parameter("logits_down"), layer.vblora_logits_A["default"]))
            layer.base_layer.weight -= own.get_buffer("up0") @ own.get_buffer("down0")
        for mine, other in pairs:
            other.copy_(mine)
    require_same_training(ours, theirs, pairs, torch.randn(4, N).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_vb_lora_starts_at_zero_in_every_dtype(dtype: torch.dtype) -> None:
    made, cast = net(), net().float()
    pk.wrap(made, "vb-lora", dtype=dtype, **VB)
    pk.wrap(cast, "vb-lora", **VB)
    for model in (made, cast.to(dtype)):
        assert [own.get_parameter("bank").dtype for own in adapters(model)] == [dtype, dtype]
        assert not any(own(torch.zeros(1), 1.0).dense().any() for own in adapters(model))


def test_vb_lora_s_file_has_the_start_as_a_few_integers(tmp_path: Path) -> None:
    ours = wrapped("vb-lora", **VB)
    path = pk.save(ours, tmp_path / "a.safetensors")
    tensors = load_file(path)
    integers = {key: tensor for key, tensor in tensors.items() if not tensor.is_floating_point()}
    assert {key.rpartition(".")[2] for key in integers} == {"chosen_up", "chosen_down"}
    assert sum(tensor.numel() for tensor in integers.values()) == 2 * 3 * 3 * (M + N) // 2
    damaged = {**tensors, "0.chosen_up": tensors["0.chosen_up"] + 9}
    write(tmp_path / "b.safetensors", damaged, metadata(path))
    with pytest.raises(FileError, match="chosen_up has numbers that are none of the 9 vectors"):
        pk.load(net(), tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("vectors", 0), ("length", -1), ("top", 10), ("top", 0), ("bound", 0.0), ("deviation", -1.0)],
)
def test_vb_lora_s_options(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"vb-lora: {option}="):
        pk.wrap(net(), "vb-lora", **{**VB, option: value})


# -- Tied-LoRA --------------------------------------------------------------------------------------------------------


def test_tied_lora_scales_common_factors() -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.Linear(N, M))
    pk.wrap(model, "tied-lora", rank=4, alpha=2)
    train(model)
    first, second = adapters(model)
    for own in (first, second):
        B, A, v, u = (own.get_parameter(name) for name in ("up", "down", "v", "u"))
        torch.testing.assert_close(own(torch.zeros(1), 1.0).dense(), 0.5 * v.diag() @ B @ u.diag() @ A)
    assert first.get_parameter("up") is second.get_parameter("up")
    assert not torch.equal(first.get_parameter("v"), second.get_parameter("v"))


def test_tied_lora_of_scales_of_one_is_a_lora() -> None:
    """With the same start of A up to its numbers: U(±1/√n), and B = 0."""
    torch.manual_seed(0)
    W = torch.zeros(M, N)
    tied = registry.build("tied-lora", Shape(M, N), W, rank=6, alpha=3, train_u=False)
    lora = registry.build("lora", Shape(M, N), W, rank=6, alpha=3)
    assert tied.state_dict().keys() == {"up", "down", "v"}
    assert not tied.get_parameter("up").any()
    assert 0.8 * N**-0.5 < tied.get_parameter("down").abs().max() <= N**-0.5
    with torch.no_grad():
        for name in ("up", "down"):
            tied.get_parameter(name).copy_(lora.get_parameter(name).normal_())
    torch.testing.assert_close(tied(W, 1.0).dense(), lora(W, 1.0).dense())


def test_some_rows_of_a_shared_factor_are_a_factor_of_their_own() -> None:
    shape, common = Shape(M, N), {"up": "shared.up", "down": "shared.down"}
    adapter = registry.build("tied-lora", shape, torch.zeros(M, N), rank=2)
    patch = Patch("tied-lora", adapter.options, shape, adapter.state_dict(), common=common)
    taken = take_rows(patch, torch.arange(4), "a file")
    assert taken.common == {} and taken.tensors["up"].shape == (4, 2)


# -- TinyLoRA ---------------------------------------------------------------------------------------------------------


def test_tiny_lora_trains_as_peft_s_on_the_same_frame() -> None:
    ours = wrapped("tiny-lora", rank=3, size=5)
    theirs = in_peft(peft.TinyLoraConfig(r=3, u=5, weight_tying=1.0, target_modules=["0", "2"]))
    layers = [layer for layer in theirs.modules() if isinstance(layer, peft.tuners.tinylora.layer.TinyLoraLayer)]
    (vector,) = theirs.base_model.tinylora_v["default"].values()
    with torch.no_grad():
        vector.copy_(adapters(ours)[0].get_parameter("vector"))
        for own, layer in zip(adapters(ours), layers, strict=True):
            left, right = layer.tinylora_B["default"], layer.tinylora_A["default"]
            torch.testing.assert_close(own.get_buffer("left").abs(), left.double().abs(), atol=1e-6, rtol=1e-5)
            assert layer.tinylora_P["default"].shape == own.get_buffer("projections").shape
            layer.tinylora_P["default"] = own.get_buffer("projections")  # theirs are drawn by the layer's place
            left.copy_(own.get_buffer("left"))
            right.copy_(own.get_buffer("right"))
    pairs = [(adapters(ours)[0].get_parameter("vector"), vector)]
    require_same_training(ours, theirs, pairs, torch.randn(4, N).double())


def test_tiny_lora_s_layers_have_projections_of_their_own() -> None:
    model = net()
    pk.wrap(model, "tiny-lora", rank=8, size=40)
    first, second = (own.get_buffer("projections") for own in adapters(model))
    assert not torch.equal(first, second)
    assert abs(float(first.var()) - 1 / 8) < 0.01
    twin = net()
    twin.load_state_dict(model.state_dict(), strict=False)
    pk.wrap(twin, "tiny-lora", rank=8, size=40)
    twin.load_state_dict(model.state_dict())
    for own, other in zip(adapters(twin), adapters(model), strict=True):
        assert torch.equal(own.get_buffer("projections"), other.get_buffer("projections"))


def test_tiny_lora_s_file_is_a_vector_and_a_number_for_each_layer(tmp_path: Path) -> None:
    model = wrapped("tiny-lora", rank=3, size=13)
    tensors = load_file(pk.save(model, tmp_path / "a.safetensors"))
    assert {key: tensor.numel() for key, tensor in tensors.items()} == {
        "0.number": 1,
        "2.number": 1,
        "shared.vector": 13,
    }


@pytest.mark.parametrize(("option", "value"), [("rank", 11), ("size", 0), ("shared_by", 0)])
def test_tiny_lora_s_options(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=rf"tiny-lora: {option}="):
        pk.wrap(net(), "tiny-lora", **{option: value})
