"""The presets on real model classes, built from small configurations without memory."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import peftkit as pk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}

#: class -> its configuration, and the layers of attn-only, attn-mlp and full in each
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "Bert": (SMALL, (8, 12, 13)),
    "Llama": (SMALL | {"num_key_value_heads": 2}, (8, 14, 14)),
    "T5": ({"num_layers": 2, "num_decoder_layers": 2}, (24, 32, 32)),
    "OPT": ({"num_hidden_layers": 2, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96}, (8, 12, 12)),
    "Whisper": ({"encoder_layers": 2, "decoder_layers": 2, "d_model": 48}, (24, 32, 34)),
    "Mixtral": (SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}, (8, 8, 8)),
}


@pytest.mark.parametrize("family", MODELS)
def test_presets(family: str) -> None:
    transformers = importlib.import_module("transformers")
    options, expected = MODELS[family]
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    plans = [pk.plan(model, "lora", targets=preset, tied="untie") for preset in ("attn-only", "attn-mlp", "full")]
    assert tuple(len(plan.entries) for plan in plans) == expected
    skipped = {name for name, _ in plans[-1].skipped}
    assert skipped
    assert ("layers.0.mlp.experts" in skipped) == (family == "Mixtral")  # 3-D experts are named, not dropped
