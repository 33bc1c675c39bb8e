"""Modules that hold stacks of experts: a plain one in both orientations, and the families of transformers 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4")

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


class Bank(nn.Module):
    """Every expert on its own run of the input: (…, E·8) -> (…, E·12), with a weight (E, 12, 8) or (E, 8, 12)."""

    def __init__(self, experts: int = 3, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = experts, transposed
        self.weight = nn.Parameter(torch.randn(experts, *((8, 12) if transposed else (12, 8))) / 8**0.5)

    def forward(self, x: Tensor) -> Tensor:
        read = "...en,enm->...em" if self.is_transposed else "...en,emn->...em"
        return torch.einsum(read, x.unflatten(-1, (self.num_experts, 8)), self.weight).flatten(-2)


def language_model(family: str, implementation: str = "grouped_mm", seed: int = 0, **sizes: Any) -> nn.Module:
    """A tiny model of a family, with four experts of which two run for each token."""
    import transformers

    torch.manual_seed(seed)
    given = {**_SIZES, **sizes}
    if family == "mixtral":
        config: Any = transformers.MixtralConfig(**given, intermediate_size=24, num_local_experts=4)
        cls: Any = transformers.MixtralForCausalLM
    elif family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        config = transformers.Qwen3MoeConfig(**given, **experts, norm_topk_prob=True)
        cls = transformers.Qwen3MoeForCausalLM
    elif family == "gpt_oss":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
        config = transformers.GptOssConfig(**given, **experts)
        cls = transformers.GptOssForCausalLM
    else:
        experts = {"num_local_experts": 4, "intermediate_size": 24, "intermediate_size_mlp": 24}
        config = transformers.Llama4TextConfig(**given, **experts, interleave_moe_layer_step=1)
        cls = transformers.Llama4ForCausalLM
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the families leave some uninitialised, or at zero
            parameter.normal_(0, 0.2)
    if family != "llama4":
        model.set_experts_implementation(implementation)
    return model.eval()


def tokens(batch: int = 1, length: int = 5, seed: int = 3) -> Tensor:
    """Token ids (batch, length)."""
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(seed))
