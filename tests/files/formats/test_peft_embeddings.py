"""Adapters of embeddings against PEFT itself: its files here, and this library's there, with its numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, OptionError, WrongBaseError
from tests.support.zoo import ScaledEmbedding, train

peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 0, 5, 5], [11, 2, 0, 3]])


class Tokens(nn.Module):
    """A language model of two layers, whose padding is token 0."""

    def __init__(self, make: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = make(12, 8, padding_idx=0)
        self.proj = nn.Linear(8, 6)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed_tokens(ids))


def tokens(make: type[nn.Embedding] = nn.Embedding) -> Tokens:
    torch.manual_seed(0)
    return Tokens(make)


def theirs(config: Any, model: nn.Module) -> nn.Module:
    """The model inside PEFT, with an adapter that has moved."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in wrapped.named_parameters():
            if "lora_embedding_A" in name:  # which has no gradient for the padding, and starts at 0
                parameter[:, 0] = 0
    return wrapped


def saved(wrapped: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        wrapped.save_pretrained(folder)
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_peft_gives_its_output_and_its_gradients(case: str, tmp_path: Path) -> None:
    own = theirs(peft.LoraConfig(target_modules=["embed_tokens", "proj"], **CONFIGS[case]), tokens())
    folder = saved(own, tmp_path / "a")
    assert "base_model.model.embed_tokens.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    model = tokens()
    assert set(pk.load(model, folder).loaded) == {"embed_tokens", "proj"}
    assert not model.embed_tokens._parameters["weight"].requires_grad
    y = own(IDS)
    torch.testing.assert_close(model(IDS), y)
    upstream = torch.randn_like(y)
    ours = dict(model.named_parameters())
    (model(IDS) * upstream).sum().backward()
    (y * upstream).sum().backward()
    layer = own.base_model.model.embed_tokens
    prefix = "embed_tokens.adapters.default." + ("inner." if case == "dora" else "")
    torch.testing.assert_close(ours[f"{prefix}up"].grad, layer.lora_embedding_A["default"].grad.mT)
    torch.testing.assert_close(ours[f"{prefix}down"].grad, layer.lora_embedding_B["default"].grad.mT)
    if case == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(ours["embed_tokens.adapters.default.magnitude"].grad, magnitude)


def test_the_scale_of_a_subclass_is_of_both_parts(tmp_path: Path) -> None:
    own = theirs(peft.LoraConfig(target_modules=["embed_tokens"], r=2), tokens(ScaledEmbedding))
    model = tokens(ScaledEmbedding)
    pk.load(model, saved(own, tmp_path / "a"))
    # PEFT scales the part of its LoRA for the subclasses that it knows by an attribute, which this one has not
    own.merge_adapter()
    torch.testing.assert_close(model(IDS), own(IDS))


@pytest.mark.parametrize("kind", [("lora", {"rank": 3, "alpha": 6}), ("dora", {"rank": 2, "axis": "in"})])
def test_an_export_is_loaded_by_peft_with_the_same_output_and_gradients(kind: Any, tmp_path: Path) -> None:
    model = tokens()
    pk.wrap(model, kind[0], targets=["embed_tokens"], **kind[1])
    train(model)
    report = pk.export(model, tmp_path / "a", "peft")
    assert [w.how for w in report.weights] == ["exact"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = peft.PeftModel.from_pretrained(tokens(), tmp_path / "a", is_trainable=True)
    y = own(IDS)
    torch.testing.assert_close(model(IDS), y)
    upstream = torch.randn_like(y)
    (model(IDS) * upstream).sum().backward()
    (y * upstream).sum().backward()
    own_grad = own.base_model.model.embed_tokens.lora_embedding_A["default"].grad
    adapter = model.embed_tokens.adapters["default"]
    up = adapter.up if kind[0] == "lora" else adapter.inner.up
    ratio = {"lora": 6 / 3, "dora": 1.0}[kind[0]]  # the file's α is the rank, and its factor holds the scale
    torch.testing.assert_close(up.grad, ratio * own_grad.mT)


def test_any_other_additive_kind_goes_out_as_a_lora_beside_that_of_linear(tmp_path: Path) -> None:
    model = tokens()
    pk.wrap(model, rules=[pk.Rule("embed_tokens", "loha", rank=2), pk.Rule("proj", "lora", rank=2)])
    train(model)
    report = pk.export(model, tmp_path / "a", "peft")
    assert {w.weight: w.how for w in report.weights} == {"embed_tokens": "low rank", "proj": "exact"}
    own = peft.PeftModel.from_pretrained(tokens(), tmp_path / "a")
    torch.testing.assert_close(model(IDS), own(IDS))


def test_magnitudes_per_token_are_baked_or_refused(tmp_path: Path) -> None:
    model = tokens()
    pk.wrap(model, "dora", targets="embed_tokens", rank=2)
    train(model)
    path = pk.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ExportError, match="PEFT has no magnitudes per output around lora"):
        pk.export(path, tmp_path / "b", "peft")
    report = pk.export(model, tmp_path / "b", "peft")
    assert report.weights[0].how == "baked"
    own = peft.PeftModel.from_pretrained(tokens(), tmp_path / "b")
    torch.testing.assert_close(model(IDS), own(IDS))


@pytest.mark.parametrize("target", ["kohya", "lycoris", "comfyui", "a1111", "forge", "diffusers"])
def test_other_programs_have_no_place_for_it(target: str, tmp_path: Path) -> None:
    model = tokens()
    pk.wrap(model, "lora", targets="embed_tokens", rank=2)
    train(model)
    for source in (model, pk.save(model, tmp_path / "a.safetensors")):
        with pytest.raises(ExportError, match=r"embed_tokens: it is an embedding, and .* export it for peft"):
            pk.export(source, tmp_path / "b.safetensors", target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_keep_that_it_is_an_embedding(tmp_path: Path) -> None:
    """From PEFT's folder to a smaller one, and from a file of this library to a folder."""
    own = theirs(peft.LoraConfig(target_modules=["embed_tokens"], r=4), tokens())
    folder = saved(own, tmp_path / "a")
    pk.resize(folder, tmp_path / "b", rank=2)
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "b/adapter_model.safetensors")} == {
        "lora_embedding_A",
        "lora_embedding_B",
    }
    model = tokens()
    pk.load(model, folder)
    native = pk.save(model, tmp_path / "c.safetensors")
    pk.convert(native, tmp_path / "d.safetensors", "full")
    pk.export(tmp_path / "d.safetensors", tmp_path / "e", "peft")
    back = peft.PeftModel.from_pretrained(tokens(), tmp_path / "e")
    torch.testing.assert_close(back(IDS), own(IDS))
    with pytest.raises(OptionError, match="PEFT has LoRA on embeddings, not loha"):
        pk.convert(folder, tmp_path / "f", "loha")


def test_the_base_in_the_folder_tells_another_base(tmp_path: Path) -> None:
    own = theirs(peft.LoraConfig(target_modules=["embed_tokens"], r=2), tokens())
    folder = saved(own, tmp_path / "a")
    other = tokens()
    with torch.no_grad():
        other.embed_tokens.weight[6:] = 1.0  # as rows that were added, and drawn anew
    with pytest.raises(WrongBaseError, match="embed_tokens"):
        pk.load(other, folder)
    assert pk.load(other, folder, other_base=True).loaded == ("embed_tokens",)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = saved(theirs(peft.LoraConfig(target_modules=["embed_tokens"], r=2), tokens()), tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: t for key, t in tensors.items() if not key.endswith("embedding_B")}, path, {"format": "pt"})
    with pytest.raises(FileError, match="lora_embedding_A and lora_embedding_B were expected"):
        pk.load(tokens(), folder)


def test_a_folder_merges_into_a_checkpoint(tmp_path: Path) -> None:
    own = theirs(peft.LoraConfig(target_modules=["embed_tokens"], r=2), tokens())
    folder = saved(own, tmp_path / "a")
    save_file({key: value.clone() for key, value in tokens().state_dict().items()}, tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {folder: 1.0}, tmp_path / "out.safetensors")
    own.merge_adapter()
    expected = own.base_model.model.embed_tokens.base_layer.weight
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["embed_tokens.weight"], expected.data)


def test_the_configuration_names_the_embedding(tmp_path: Path) -> None:
    model = tokens()
    pk.wrap(model, "lora", targets="embed_tokens", rank=2)
    train(model)
    pk.export(model, tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == ["embed_tokens"]
    assert config["peft_type"] == "LORA"
