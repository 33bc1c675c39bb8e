"""One cell of what is exported for programs of language models: written, and read back as the program reads it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, LossyError
from peftkit.wrapping.installed import installed_adapters
from tests.support.language import MODELS, SIZES, causal_lm, converted, matrices
from tests.support.readers import Read, llamacpp
from tests.support.readers.servers import read_sglang, read_vllm
from tests.support.zoo import CASES, train

LANGUAGE = ("llama.cpp", "vllm", "sglang")
SERVERS = {"vllm": read_vllm, "sglang": read_sglang}
#: how each kind goes out for a program that has LoRA alone
HOW = {"lora": "exact", "lora rslora": "exact", "loha": "low rank", "lokr": "low rank", "loldu": "low rank"}
HOW |= {"full": "low rank", "dora": "baked", "oft": "baked", "boft": "baked", "ia3": "baked", "glora": "baked"}
#: of ΔW in fp64, which DoRA, whose norms are summed in fp32, misses by 1.2e-6; see `require_same`
BOUND = 2e-6
_PROJECTIONS = ("*.q_proj", "*.v_proj", "*.down_proj")


def out(folder: Path, target: str) -> Path:
    """Where an export for a program goes."""
    return folder / ("a.gguf" if target == "llama.cpp" else "a")


@torch.no_grad()
def truths(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every adapter in fp64, by the path of its module."""
    return {
        at.site: copy.deepcopy(at.adapter).double().eval()(at.base.double(), 1.0).dense()
        for at in installed_adapters(model)
    }


def read(path: Path, plain: Any, target: str) -> Read:
    """What a program makes of a file, on a model without adapters."""
    if target == "llama.cpp":
        return llamacpp.read(path, converted(plain, matrices(plain)), MODELS[plain.config.model_type][0])
    return SERVERS[target](path, matrices(plain, lambda module: isinstance(module, nn.Linear)))


def require_same(path: Path, plain: Any, target: str, expected: Mapping[str, Tensor], bound: float = BOUND) -> None:
    """Hold the ΔW that a program makes of a file against a model's, by the norms of ΔW and of the weight.

    Adapters that read their base subtract W from a sum in fp32, so that their ΔW is known to the rounding of W.
    """
    found, weights = read(path, plain, target), matrices(plain)
    if target == "llama.cpp":
        expected, weights = converted(plain, expected), converted(plain, weights)
    assert found.ignored == []
    assert found.deltas.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found.deltas[name] - delta).norm() <= bound * (delta.norm() + weights[name].norm()), name
        assert delta.norm() > 1e-2 * weights[name].norm(), f"{name}: the adapter does too little to be seen"


def wrapped(case: str) -> tuple[Any, nn.Module]:
    """A small language model, and a copy of it with trained adapters."""
    if case == "experts":
        sizes = {**SIZES, "num_local_experts": 2, "num_key_value_heads": 2}
        plain: Any = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    else:
        plain = causal_lm("gpt2" if case == "conv1d" else "llama", tie_word_embeddings="tied" in case)
    model = copy.deepcopy(plain)
    targets = {"embedding": "*.embed_tokens", "tied embedding": "*.embed_tokens", "output": "lm_head"}
    targets |= {"conv1d": "*.c_attn", "experts": "*experts*"}
    if case == "norm":
        pk.wrap(model, rules=[pk.Rule("*.q_proj", "lora", rank=2), pk.Rule("*.input_layernorm", "full")])
    elif case in CASES:
        options = {"block_size": 8} if case.startswith("boft") else CASES[case].options
        pk.wrap(model, CASES[case].kind, targets=_PROJECTIONS, **options)
    else:
        tied = {"tied": "untie"} if "tied" in case else {}
        pk.wrap(model, "lora", targets=targets.get(case, _PROJECTIONS), rank=2, **tied)
    if case == "head":
        model.lm_head.requires_grad_(True)
    train(model, size=0.3)
    return plain, model


def language_cell(case: str, target: str) -> str:
    """Return how an adapter went out: "exact", "low rank", "baked" or "refused".

    case: of the zoo, on projections of a small Llama; or a rare layer.
    """
    plain, model = wrapped(case)
    with tempfile.TemporaryDirectory() as folder:
        path = out(Path(folder), target)
        try:
            report = pk.export(model, path, target)
        except (ExportError, LossyError):
            return "refused"
        require_same(path, plain, target, truths(model))
    (how,) = {weight.how for weight in report.weights}
    return how
