"""What PEFT trained beside its adapters: whole modules, biases, and what this library does not read."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import peftkit as pk
from peftkit.errors import ExportError, FileError, LossyError, MismatchError, TiedWeightsError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.block, self.pooler = Block(), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.pooler(self.block(self.embed(ids))))


IDS = torch.arange(12).reshape(3, 4)

#: PEFT's options -> the parameters of the model that are in its file beside the adapters
BESIDE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a head": ({"modules_to_save": ["classifier"]}, {"classifier.weight", "classifier.bias"}),
    "norms": ({"modules_to_save": ["norm"]}, {"block.norm.weight", "block.norm.bias"}),
    "a module of modules": ({"modules_to_save": ["pooler"]}, {"pooler.0.weight", "pooler.0.bias"}),
    "an embedding": ({"modules_to_save": ["embed"]}, {"embed.weight"}),
    "biases of adapted layers": ({"bias": "lora_only"}, {"block.proj.bias"}),
    "all biases": (
        {"bias": "all"},
        {"block.proj.bias", "block.norm.bias", "pooler.0.bias", "classifier.bias"},
    ),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def trained(folder: Path, **options: Any) -> nn.Module:
    """A network that PEFT has trained and written to a folder."""
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, lora_alpha=3, **{"target_modules": ["proj"], **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # of lora_B's bias, which is a vector
        model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("case", BESIDE)
def test_it_comes_with_the_folder_and_goes_with_it(case: str, tmp_path: Path) -> None:
    options, names = BESIDE[case]
    theirs = trained(tmp_path, **options)
    assert set(pk.read(tmp_path).extras) == names
    ours = net()
    report = pk.load(ours, tmp_path)
    assert report.complete
    assert set(report.extras) == names
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    again = pk.save(ours, tmp_path / "own.safetensors")
    fresh = net()
    pk.load(fresh, again)
    assert torch.equal(fresh(IDS), ours(IDS))
    pk.unwrap(ours)
    assert torch.equal(ours(IDS), net()(IDS))


@pytest.mark.parametrize("case", BESIDE)
def test_it_is_merged_into_a_checkpoint(case: str, tmp_path: Path) -> None:
    theirs = trained(tmp_path / "adapter", **BESIDE[case][0])
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {tmp_path / "adapter": 1.0}, tmp_path / "out.safetensors")
    ours = net()
    ours.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(ours(IDS), theirs(IDS))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_bias_of_lora_b_is_merged_and_loaded(rslora: bool, tmp_path: Path) -> None:
    theirs = trained(tmp_path / "adapter", lora_bias=True, use_rslora=rslora)
    assert set(pk.read(tmp_path / "adapter").vectors) == {"block.proj.bias"}
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {tmp_path / "adapter": 1.0}, tmp_path / "out.safetensors")
    ours = net()
    ours.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    loaded = net()
    assert set(pk.load(loaded, tmp_path / "adapter").loaded) == {"block.proj", "block.proj.bias"}
    torch.testing.assert_close(loaded(IDS), theirs(IDS))
    with pytest.raises(ExportError, match=r"lora_B\.bias goes with ΔW"):
        pk.rescale(tmp_path / "adapter", 0.5, tmp_path / "half")


def test_a_folder_made_of_it_does_not_lose_it_in_silence(tmp_path: Path) -> None:
    trained(tmp_path / "adapter", modules_to_save=["classifier"])
    for verb in (pk.convert, pk.resize):
        options: dict[str, Any] = {"kind": "loha"} if verb is pk.convert else {"rank": 1}
        with pytest.raises(LossyError, match=r"2 parameters \(classifier\.bias, classifier\.weight\)"):
            verb(tmp_path / "adapter", tmp_path / "out", **options)
    pk.rescale(tmp_path / "adapter", 0.5, tmp_path / "half")
    ours, half = pk.read(tmp_path / "adapter").extras, pk.read(tmp_path / "half").extras
    assert {name: torch.equal(value, half[name]) for name, value in ours.items()} == dict.fromkeys(ours, True)


def edited(folder: Path, keys: dict[str, str], **config: Any) -> Path:
    """The folder with other keys, or with fields of its configuration replaced."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({keys.get(key, key): value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_keys_of_a_model_in_memory_are_read_too(tmp_path: Path) -> None:
    theirs = trained(tmp_path, modules_to_save=["classifier"])
    start = "base_model.model.classifier"
    ends = ("weight", "bias")
    edited(tmp_path, {f"{start}.{end}": f"{start}.modules_to_save.default.{end}" for end in ends})
    ours = net()
    pk.load(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS))


def test_what_the_configuration_does_not_say_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, modules_to_save=["classifier"])
    with pytest.raises(MismatchError, match=r"2 tensors that are no adapter's[\s\S]*classifier\.bias"):
        pk.read(edited(tmp_path, {}, modules_to_save=None))
    with pytest.raises(FileError, match="modules_to_save is 5, a list of names was expected"):
        pk.read(edited(tmp_path, {}, modules_to_save=5))


# -- writing ---------------------------------------------------------------------------------------------------------


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()


def loosened(kind: str, *names: str) -> BertForSequenceClassification:
    """A wrapped BERT with these parameters trained beside its adapters."""
    model = bert()
    pk.wrap(model, kind, targets=["*.query", "*.value"], rank=2)
    for name, parameter in model.named_parameters():
        if any(name.startswith(start) for start in names):
            parameter.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


_LAYER = "bert.encoder.layer.0"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", ("classifier",)),
        ("loha", ("classifier", f"{_LAYER}.output.LayerNorm")),
        ("lora", (f"{_LAYER}.attention.self.query.bias", "bert.pooler.dense.bias", "bert.embeddings.word")),
        ("dora", ("classifier", "bert.embeddings.LayerNorm")),
    ],
)
def test_peft_loads_what_trained_beside(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    ids = torch.arange(20).reshape(2, 10)
    ours = loosened(kind, *names)
    report = pk.export(ours, tmp_path / "adapter", "peft")
    assert report.extras
    assert not report.left_out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT reads of its models
        theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    back = bert()
    assert set(pk.load(back, tmp_path / "adapter").extras) >= set(report.extras)
    torch.testing.assert_close(back(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    own = pk.save(ours, tmp_path / "own.safetensors")
    assert pk.export(own, tmp_path / "again", "peft", base=bert()).extras
    if any(not name.endswith("query.bias") for name in report.extras):
        with pytest.raises(ExportError, match="PEFT's file has it whole: give base="):
            pk.export(own, tmp_path / "bare", "peft")
    assert pk.read(tmp_path / "again").extras.keys() == pk.read(tmp_path / "adapter").extras.keys()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("lora", f"{_LAYER}.attention.self.query.weight"), ("loha", f"{_LAYER}.attention.self.query.bias")],
)
def test_what_peft_has_no_place_for_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    model = loosened(kind, "classifier", name)
    with pytest.raises(LossyError, match=r"1 parameter \(bert\.encoder\.layer\.0\.attention.*PEFT has no place"):
        pk.export(model, tmp_path / "adapter", "peft")
    assert not list(tmp_path.iterdir())
    report = pk.export(model, tmp_path / "adapter", "peft", extras=False)
    assert set(report.left_out) == {"classifier.weight", "classifier.bias", name}


def test_a_shared_parameter_has_no_place_in_peft(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "embed": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["embed"].weight
    pk.wrap(model, "lora", targets="body", rank=2)
    nn.init.ones_(pk.adapter_parameters(model)[0])
    nn.init.ones_(pk.adapter_parameters(model)[1])
    model["embed"].weight.requires_grad_(True)
    with pytest.raises(LossyError, match=r"embed\.weight\) trained beside"):
        pk.export(model, tmp_path / "adapter", "peft")


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(tokens)))


def test_a_copy_that_peft_trained_of_a_shared_weight_is_not_written_over_both(tmp_path: Path) -> None:
    """And what the message says gives PEFT's model."""
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(6)
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)  # pyright: ignore[reportArgumentType]
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(str(tmp_path))
    before = model(tokens).detach()
    with pytest.raises(TiedWeightsError, match=r"lm_head\.weight: PEFT trained a copy .*embed\.weight") as raised:
        pk.load(model, tmp_path)
    assert torch.equal(model(tokens), before)
    assert "model.lm_head = copy.deepcopy(model.lm_head)" in str(raised.value)
    model.lm_head = copy.deepcopy(model.lm_head)
    pk.load(model, tmp_path)
    assert torch.allclose(model(tokens), theirs(tokens), atol=1e-6)
