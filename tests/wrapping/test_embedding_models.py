"""Embeddings of the models of transformers: BERT's three, T5's shared one and its positions, Gemma's scaled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import TiedWeightsError
from peftkit.wrapping.sites import sites
from tests.support.zoo import train

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 2, 3, 3], [11, 0, 5, 4]])
SMALL = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=8))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    return transformers.T5ForConditionalGeneration(config)


def gemma() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0, max_position_embeddings=8
    )
    return transformers.Gemma3ForCausalLM(config)


def output(model: nn.Module) -> Tensor:
    more: dict[str, Any] = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    return model(input_ids=IDS, **more)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "bert": (bert, {}),
    "t5": (t5, {"tied": "share"}),
    "gemma": (gemma, {"tied": "share"}),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_all_embeddings_of_a_model_train_merge_and_come_back(name: str, tmp_path: Any) -> None:
    model, options = made(name), MODELS[name][1]
    before = output(model)
    plan = pk.wrap(model, "lora", targets="Embedding", rank=2, **options)
    assert {route for entry in plan.entries for route in [entry.route]} <= {"factored", "dense"}, "none is read"
    assert torch.equal(output(model), before)
    train(model)
    y = output(model)
    assert not torch.allclose(y, before)
    assert pk.check(model, {"input_ids": IDS, **({"decoder_input_ids": IDS} if name == "t5" else {})}).ok
    path = pk.save(model, tmp_path / "a.safetensors")
    pk.merge(model)
    torch.testing.assert_close(output(model), y, rtol=1e-4, atol=1e-4)
    pk.restore(model)
    fresh = made(name)
    pk.load(fresh, path)
    assert torch.equal(output(fresh), y)


def test_presets_select_what_they_did() -> None:
    for name in MODELS:
        model = made(name)
        for preset in ("full", "attn-mlp", "attn-only"):
            assert not any(entry.site.looks_up for entry in pk.plan(model, "lora", targets=preset, rank=2).entries)


def test_gemma_scales_both_parts_and_its_tied_head_does_not() -> None:
    model = made("gemma")
    assert not sites(model)["model.embed_tokens"].read
    with pytest.raises(TiedWeightsError):
        pk.wrap(model, "lora", targets="*.embed_tokens", rank=2)
    pk.wrap(model, "full", targets="*.embed_tokens", tied="share")
    train(model)
    change = pk.adapter_parameters(model)[0]
    layer = model.model.embed_tokens
    whole = (layer.weight + change)[IDS] * layer.embed_scale
    torch.testing.assert_close(layer(IDS), whole)
    h = torch.randn(3, 16)
    torch.testing.assert_close(model.lm_head(h), h @ (layer.weight + change).mT)
