"""Small language models of transformers, and their weights as llama.cpp has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

#: model_type -> llama.cpp's architecture, how the models are made smaller than by SIZES, and whether rows are paired
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {"num_key_value_heads": 2}, True),
    "mistral": ("llama", {"num_key_value_heads": 1, "head_dim": 8}, True),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}, False),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, False),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 8}, False),
    "gemma3_text": ("gemma3", {"num_key_value_heads": 1, "head_dim": 8}, False),
    "phi3": ("phi3", {"num_key_value_heads": 2}, False),
    "smollm3": ("smollm3", {"num_key_value_heads": 2}, True),
    "gpt2": ("gpt2", {}, False),
}


def causal_lm(model_type: str, **options: Any) -> Any:
    """A language model of two layers."""
    torch.manual_seed(0)
    sizes = _GPT2 if model_type == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **MODELS[model_type][1], **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


#: the weights of a layer by the end of their path
_LAYER = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_REST = {"embed_tokens": "token_embd", "wte": "token_embd", "wpe": "position_embd", "lm_head": "output"}


def gguf_name(path: str) -> str:
    """What llama.cpp calls the weight of a module with a matrix."""
    layer = re.search(r"\.(\d+)\.", path)
    names = _LAYER if layer else _REST
    name = next(name for end, name in names.items() if path == end or path.endswith(f".{end}"))
    return f"blk.{layer.group(1)}.{name}.weight" if layer else f"{name}.weight"


def paired(rows: Tensor, heads: int) -> Tensor:
    """The rows (m, n) of queries or keys with those next to each other that are turned together.

    transformers turns row i of a head with row i + d/2, llama.cpp row 2i with row 2i + 1.
    """
    first, second = rows.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack((first, second), dim=2).flatten(0, 2)


def converted(model: Any, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (m, n) of modules of a model, by their paths, as they are in the model's GGUF."""
    config = model.config
    pairs = MODELS[config.model_type][2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    return {
        gguf_name(path): paired(matrix, heads[last]) if pairs and (last := path.rpartition(".")[2]) in heads else matrix
        for path, matrix in matrices.items()
    }


def matrices(model: nn.Module, of: Callable[[nn.Module], bool] = lambda module: True) -> dict[str, Tensor]:
    """The weights of all Linears, Conv1Ds and embeddings, as (m, n), by path; a tied one where it comes first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and id(weight) not in seen and of(module):
            seen.add(id(weight))
            found[name] = (
                weight.detach().T if isinstance(module, transformers.pytorch_utils.Conv1D) else weight.detach()
            )
    return found
