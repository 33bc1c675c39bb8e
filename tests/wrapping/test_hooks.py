"""Models with hooks of accelerate, put on before wrapping and after: on their devices, in main memory, on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkit as pk
from peftkit.errors import UnsetAdapterError, UnsupportedLayerError
from tests.support.zoo import SMALL, train

CPU = torch.device("cpu")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1)))


def x() -> Tensor:
    return torch.linspace(-1, 1, 64).view(8, 8)


def split(model: nn.Module, folder: Path) -> nn.Module:
    del folder
    return dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True)


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    del folder
    return cpu_offload(model, CPU)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder / "offloaded"), CPU)


PLACES = {"split": split, "in memory": in_memory, "on disk": on_disk}
CASES = [(place, kind) for place in ("split", "in memory") for kind in SMALL] + [
    ("on disk", "lora"),
    ("on disk", "dora"),
]


@pytest.mark.parametrize("place, kind", CASES)
def test_a_model_with_hooks_is_wrapped_trained_and_saved(place: str, kind: str, tmp_path: Path) -> None:
    plain, model = base(), PLACES[place](base(), tmp_path)
    offloaded = model[0].weight.is_meta
    assert offloaded == (place != "split") and hasattr(model[0], "_hf_hook")
    before = model(x())
    torch.manual_seed(1)
    pk.wrap(plain, kind, **SMALL[kind])
    torch.manual_seed(1)
    pk.wrap(model, kind, **SMALL[kind])
    assert torch.equal(model(x()), before)
    for net in (plain, model):
        train(net)
    assert torch.equal(model(x()), plain(x())) and not torch.equal(model(x()), before)
    for net in (plain, model):
        net(x()).square().mean().backward()
    for ours, theirs in zip(pk.adapter_parameters(model), pk.adapter_parameters(plain), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
    pk.set_strength(model, 0.0)
    assert torch.equal(model(x()), before)
    pk.set_strength(model, 1.0)

    path = pk.save(model, tmp_path / "style.safetensors")
    fresh = base()
    pk.load(fresh, path)
    assert torch.equal(fresh(x()), plain(x()))
    other = PLACES[place](base(), tmp_path)
    pk.load(other, path)
    assert torch.equal(other(x()), plain(x()))
    if offloaded:
        with pytest.raises(UnsetAdapterError, match="its weight is offloaded"):
            pk.merge(model)
    else:
        if kind != "glora":
            pk.merge(model)
            torch.testing.assert_close(model(x()), plain(x()))
            pk.restore(model)
    pk.unwrap(model)
    assert torch.equal(model(x()), before) and type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    pk.wrap(model, "lora", rank=2, targets="0")
    remove_hook_from_submodules(model)
    assert torch.equal(model(x()), before) and not model[0].weight.is_meta
    train(model)
    adapted = model(x())
    assert not torch.equal(adapted, before)
    pk.merge(model, backup=None)
    torch.testing.assert_close(model(x()), adapted)
    assert copy.deepcopy(model)(x()).isfinite().all()


@pytest.mark.parametrize("kind", ["lora", "dora", "oft"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_on_a_wrapped_model(place: str, kind: str, tmp_path: Path) -> None:
    model = base()
    pk.wrap(model, kind, **SMALL[kind])
    train(model)
    expected = model(x())
    PLACES[place](model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(x()), expected)
        with pk.disabled(model):
            assert torch.equal(model(x()), base()(x()))
    if place == "split":
        pk.save(model, tmp_path / "style.safetensors")
    else:
        with pytest.raises(UnsetAdapterError, match="its adapter is offloaded"):
            pk.save(model, tmp_path / "style.safetensors")
        with pytest.raises(UnsetAdapterError):
            pk.merge(model)
        assert not list(tmp_path.glob("*.safetensors"))
        remove_hook_from_submodules(model)
    pk.unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(x()), base()(x()))


def test_a_language_model_over_memory_and_disk(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=True, **sizes))
    model = copy.deepcopy(plain)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    tokens = torch.tensor([[1, 2, 3]])
    for net in (plain, model):
        torch.manual_seed(1)
        pk.wrap(net, "lora", rank=2, targets=["q_proj", "up_proj"])
        train(net)
        net(input_ids=tokens, labels=tokens).loss.backward()
    for ours, theirs in zip(pk.adapter_parameters(model), pk.adapter_parameters(plain), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=3, do_sample=False),
        plain.generate(tokens, max_new_tokens=3, do_sample=False),
    )


def test_a_forward_of_another_sort_is_still_refused() -> None:
    model = base()
    model[0].forward = lambda x: x
    with pytest.raises(UnsupportedLayerError, match="its forward was replaced"):
        pk.wrap(model, "lora", targets="0")
    split(model, Path())
    with pytest.raises(UnsupportedLayerError, match="its forward was replaced"):
        pk.wrap(model, "lora", targets="0")


def test_what_trains_beside_and_is_offloaded_is_refused(tmp_path: Path) -> None:
    model = in_memory(base(), tmp_path)
    pk.wrap(model, "lora", rank=2, targets="0")
    train(model)
    model[2][0].requires_grad_(True)
    for verb in (
        lambda: pk.save(model, tmp_path / "a.safetensors"),
        lambda: pk.export(model, tmp_path / "peft", target="peft"),
    ):
        with pytest.raises(UnsetAdapterError, match=r"2\.0\.weight requires gradients and is on the meta device"):
            verb()
    assert not list(tmp_path.iterdir())


def test_weights_that_are_read_take_hooks_before_they_are_wrapped(tmp_path: Path) -> None:
    def attention() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})

    def run(model: Any) -> Tensor:
        return model["attention"](x()[None], x()[None], x()[None])[0]

    model, plain = attention(), attention()
    dispatch_model(model, {"attention": "cpu"}, main_device="cpu", force_hooks=True)
    for net in (model, plain):
        torch.manual_seed(1)
        pk.wrap(net, "lora", rank=2)
        train(net)
    assert torch.equal(run(model), run(plain))
    with pytest.raises(UnsupportedLayerError, match="put the hooks on first"):
        cpu_offload(plain, CPU)
    assert torch.equal(run(model), run(plain))
