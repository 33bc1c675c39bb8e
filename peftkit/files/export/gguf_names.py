"""What llama.cpp calls the weights of a model of transformers, and in which order it has their rows.

Names are those of the gguf package. What its converter does beside renaming was read from the sources of October 2026:
it pairs the rows that a rotary embedding turns together, where llama.cpp turns neighbours and transformers halves. A
model of which it splits, stacks or reorders anything else is not in the table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkit.errors import ExportError, OptionError
from peftkit.files.export.model_facts import ModelFacts

if TYPE_CHECKING:
    from gguf.tensor_mapping import TensorNameMap


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds a type of model.

    Attributes:
        name: llama.cpp's.
        paired: whether the rows of queries and keys that are turned together are neighbours.
        tied: whether input and output share a weight where the configuration does not say.
    """

    name: str
    paired: bool = False
    tied: bool = False


#: by the model_type of transformers
ARCHITECTURES: Mapping[str, Architecture] = {
    "apertus": Architecture("apertus"),
    "arcee": Architecture("arcee", paired=True),
    "cohere": Architecture("command-r", tied=True),
    "cohere2": Architecture("cohere2", tied=True),
    "gemma": Architecture("gemma", tied=True),
    "gemma2": Architecture("gemma2", tied=True),
    "gemma3": Architecture("gemma3", tied=True),
    "gemma3_text": Architecture("gemma3", tied=True),
    "gpt2": Architecture("gpt2", tied=True),
    "granite": Architecture("granite", paired=True),
    "llama": Architecture("llama", paired=True),
    "mistral": Architecture("llama", paired=True),
    "mixtral": Architecture("llama", paired=True),
    "olmo": Architecture("olmo", paired=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", paired=True, tied=True),
    "starcoder2": Architecture("starcoder2", tied=True),
}

#: what a model that also sees puts before the path of a module of its language model, and what remains of it
_LANGUAGE = (("model.language_model.", "model."), ("language_model.", ""))
_INPUT, _OUTPUT = "token_embd", "output"
#: no model has more layers; the names of all of them are made
_MOST_BLOCKS = 2000


@dataclass(frozen=True)
class GgufModel:
    """A model as llama.cpp has it.

    Attributes:
        architecture: see `Architecture`.
        heads: of queries, and of keys, by the last name of the projection.
        tied: whether input and output share a weight.
        names: the gguf package's table.
    """

    architecture: Architecture
    heads: Mapping[str, int]
    tied: bool
    names: TensorNameMap

    @classmethod
    def of(cls, facts: ModelFacts) -> GgufModel:
        """Return the model that adapters are for.

        Raises:
            ExportError: the model is not known, or is of a type that is not in `ARCHITECTURES`.
            OptionError: the gguf package is not installed.
        """
        gguf = require_gguf()
        text = facts.config.get("text_config")
        config = {**facts.config, **(text if isinstance(text, Mapping) else {})}
        said = facts.config.get("model_type")
        if not isinstance(said, str):
            raise ExportError(
                "llama.cpp's names and rows depend on the model, which neither the adapter nor a base says: pass "
                "config= its config.json, or the folder it is in"
            )
        architecture = ARCHITECTURES.get(said)
        if architecture is None:
            raise ExportError(
                f"the model is of type {said!r}, and adapters are written for llama.cpp of {', '.join(ARCHITECTURES)}: "
                "merge the adapter, save the model, and convert that with llama.cpp's convert_hf_to_gguf.py"
            )
        blocks = _number(config, "num_hidden_layers", "n_layer")
        queries = _number(config, "num_attention_heads", "n_head")
        keys = config.get("num_key_value_heads")
        if blocks > _MOST_BLOCKS:
            raise ExportError(f"the model's configuration has {blocks} layers, {_MOST_BLOCKS} at most were expected")
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        return cls(
            architecture,
            {"q_proj": queries, "k_proj": keys if type(keys) is int else queries},
            bool(config.get("tie_word_embeddings", architecture.tied)),
            gguf.get_tensor_name_map(arch, blocks),
        )

    def tensor(self, path: str) -> str:
        """Return llama.cpp's name of the weight of a module.

        Args:
            path: of the module in the model.

        Raises:
            ExportError: llama.cpp has no such weight, or does not apply an adapter of it.
        """
        own = next((left + path.removeprefix(p) for p, left in _LANGUAGE if path.startswith(p)), path)
        name = next((found for at in (own, f"model.{own}") if (found := self.names.get_name(at)) is not None), None)
        if name is None:
            raise ExportError(
                f"{path}: llama.cpp has no weight of its own for it in models of type {self.architecture.name!r}; "
                "leave it out, or merge the adapter and convert the merged model"
            )
        if self.tied and name in (_INPUT, _OUTPUT):
            raise ExportError(
                f"{path}: the model's input and output share one weight, which llama.cpp would adapt in one of these "
                "places only, or fail; leave it out, or merge the adapter and convert the merged model"
            )
        return f"{name}.weight"

    def order(self, path: str, rows: int) -> Tensor | None:
        """Return which row of a module's weight is each row of llama.cpp's, (m,); None where the order is the same.

        Raises:
            ExportError: the rows are not whole pairs in each head, so that the configuration is of another model.
        """
        heads = self.heads.get(path.rpartition(".")[2]) if self.architecture.paired else None
        if heads is None:
            return None
        if heads < 1 or rows % (2 * heads):
            raise ExportError(f"{path} has {rows} rows, and by the configuration {heads} heads: it is of another model")
        return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = next((config[name] for name in names if type(config.get(name)) is int), None)
    if found is None:
        raise ExportError(f"the model's configuration has no {names[0]}: pass config= the whole of it")
    return found


def require_gguf() -> Any:
    """Return the gguf package, OptionError without it."""
    try:
        import gguf
    except ImportError as error:
        raise OptionError(
            "gguf is not installed, which writes files for llama.cpp: pip install 'peftkit[gguf]'"
        ) from error
    return gguf
