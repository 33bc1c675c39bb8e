"""Models of transformers that are loaded quantised: trained, saved, merged and compiled as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from tests.support.zoo import train

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "4-bit": {**FOUR, "bnb_4bit_compute_dtype": torch.bfloat16},
    "8-bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def quantised(folder: Path, config: str) -> nn.Module:
    options = transformers.BitsAndBytesConfig(**CONFIGS[config])
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    return model.train()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_that_is_loaded_quantised(config: str, folder: Path, tmp_path: Path) -> None:
    model, ids = quantised(folder, config), torch.arange(14).view(2, 7)
    before = loss(model, ids)
    plan = pk.wrap(model, "dora", rank=2)
    assert len(plan.entries) == 14  # every projection, and no head
    assert torch.equal(loss(model, ids), before)
    train(model, size=0.05)
    pk.check(model, {"input_ids": ids, "labels": ids}, loss=lambda output: output.loss)
    with torch.no_grad():
        model.eval().generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    original = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    path = pk.save(model, tmp_path / "a.safetensors")
    assert pk.load(original, path).complete
    pk.unwrap(original)
    model.train()
    adapted = loss(model, ids)
    report = pk.merge(model, into="requantised", origin=original)
    assert report.survived == pytest.approx(1, abs=0.1)
    pk.restore(model)
    assert torch.equal(loss(model, ids), adapted)
    pk.merge(model, into="dequantised", backup=None)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16  # as the rest of the model
    assert loss(model, ids).item() == pytest.approx(adapted.item(), rel=0.01)


def test_activation_checkpointing(folder: Path) -> None:
    ids = torch.arange(14).view(2, 7)
    found = []
    for checkpointing in (False, True):
        model = quantised(folder, "4-bit")
        torch.manual_seed(0)
        pk.wrap(model, "lora", rank=2)
        train(model, size=0.05)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            model.config.use_cache = False
            model.enable_input_require_grads()
        loss(model, ids).backward()
        found.append([p.grad for p in pk.adapter_parameters(model)])
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [*CONFIGS, "torchao"])
def test_a_folder_of_a_quantised_model_is_merged_into(config: str, folder: Path, tmp_path: Path) -> None:
    """What transformers writes is read, and the merged folder is loaded by it as that of a plain model."""
    if config == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        options: Any = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        options = transformers.BitsAndBytesConfig(**CONFIGS[config])
    load, how = transformers.LlamaForCausalLM.from_pretrained, {"dtype": torch.bfloat16, "device_map": "cpu"}
    model = load(folder, quantization_config=options, **how)
    model.save_pretrained(tmp_path / "base")
    pk.wrap(model, "lora", rank=2)
    train(model, size=0.05)
    file = pk.save(model, tmp_path / "a.safetensors")
    report = pk.merge_checkpoint(tmp_path / "base", {file: 1.0}, tmp_path / "out", dtype=torch.bfloat16)
    in_memory = pk.merge(model.eval(), into="dequantised", dtype=torch.bfloat16, backup=None)
    assert report.norm == pytest.approx(in_memory.norm) and report.lost == pytest.approx(in_memory.lost, rel=1e-3)
    merged, ids = load(tmp_path / "out").eval(), torch.arange(14).view(2, 7)
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, model(input_ids=ids).logits)
