"""Trained tokens against PEFT itself: its files here, and this library's there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, TiedWeightsError
from tests.support.models import language_model
from tests.support.zoo import train

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[1, 3, 5, 5], [11, 2, 0, 3]])


CONFIGS: dict[str, Any] = {
    "alone": lambda: peft.TrainableTokensConfig(token_indices=[5, 3]),
    "beside a LoRA": lambda: peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[5, 3]),
    "by name": lambda: peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices={"embed_tokens": [3]}),
}


def theirs(case: str, folder: Path, tied: bool) -> nn.Module:
    wrapped = peft.get_peft_model(language_model(tied), CONFIGS[case]())
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_peft_gives_its_output_and_its_gradients(case: str, tied: bool, tmp_path: Path) -> None:
    own = theirs(case, tmp_path, tied)
    model = language_model(tied)
    if tied:
        with pytest.raises(TiedWeightsError, match="tied='share'"):
            pk.load(model, tmp_path)
    pk.load(model, tmp_path, tied="share")
    y = own(IDS).logits
    torch.testing.assert_close(model(IDS).logits, y)
    upstream = torch.randn_like(y)
    (model(IDS).logits * upstream).sum().backward()
    (y * upstream).sum().backward()
    values = next(p for name, p in own.named_parameters() if "trainable_tokens_delta" in name)
    order = [1, 0] if case != "by name" else [0]
    mine = model.model.embed_tokens.adapters["default"].value
    torch.testing.assert_close(mine.grad, values.grad[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_an_export_is_loaded_by_peft_with_the_same_output(beside: bool, tied: bool, tmp_path: Path) -> None:
    model = language_model(tied)
    rules = [pk.Rule("*.embed_tokens", "full", rows=[3, 5])]
    rules += [pk.Rule("*.q_proj", "lora", rank=2)] if beside else []
    pk.wrap(model, rules=rules, tied="share")
    train(model)
    report = pk.export(model, tmp_path / "a", "peft")
    assert {w.how for w in report.weights} == {"exact"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        own = peft.PeftModel.from_pretrained(language_model(tied), tmp_path / "a").eval()
    torch.testing.assert_close(own(IDS).logits, model(IDS).logits)
    back = language_model(tied)
    pk.load(back, tmp_path / "a", tied="share")
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits)


def test_different_tokens_of_two_embeddings_have_no_folder(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(6, 4), "b": nn.Embedding(6, 4)})
    pk.wrap(model, rules=[pk.Rule("a", "full", rows=[1]), pk.Rule("b", "full", rows=[2])])
    train(model)
    assert {w.how for w in pk.export(model, tmp_path / "a", "peft").weights} == {"baked"}


def test_rows_of_a_linear_go_out_baked_or_not_at_all(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4)})
    pk.wrap(model, "full", rows=[1])
    train(model)
    assert pk.export(model, tmp_path / "a", "peft").weights[0].how == "baked"
    path = pk.save(model, tmp_path / "b.safetensors")
    with pytest.raises(ExportError, match="PEFT has no trained rows of it; give the base"):
        pk.export(path, tmp_path / "c", "peft")


def test_a_folder_without_the_numbers_is_refused(tmp_path: Path) -> None:
    theirs("alone", tmp_path, False)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor[:1].clone() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(FileError, match=r"\(1, 16\) rows of tokens were found, .* as \[5, 3\]"):
        pk.load(language_model(), tmp_path)
