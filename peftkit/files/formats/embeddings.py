"""What PEFT's files hold of an embedding: a LoRA under names of its own, its weight as it was, and trained tokens.

PEFT keeps A (r, V) and B (d, r) of ΔW (V, d) = γ·(B·A)ᵀ; a Linear(d, V), which has the same weight, would have the
factors lora_B = Aᵀ and lora_A = Bᵀ. Its magnitudes are per column of the weight: of each of the d numbers of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from peftkit.errors import require_file
from peftkit.files.formats.patch import Patch
from peftkit.geometry import Shape

#: how keys end -> what the tensor is
ENDS: Mapping[str, str] = MappingProxyType(
    {f".lora_embedding_{factor}{adapter}": f"embedding_{factor}" for factor in "AB" for adapter in ("", ".default")}
)
#: how the key of the weight of an adapted embedding ends, which PEFT saves as it was
BASE = ".base_layer.weight"
#: how a key ends, or goes on, of the rows that some tokens have after training
TOKENS = ".trainable_tokens_delta"


def bases(keys: Iterable[str]) -> dict[str, str]:
    """Return {module's name in the file: key} of the weights that adapted embeddings had before they were trained."""
    return {key.removesuffix(BASE): key for key in keys if key.endswith(BASE)}


def as_linear(module: str, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an embedding, by role, as those of the Linear(d, V) that has the same weight.

    Args:
        module: its name, for errors.
        t: its tensors by role.

    Raises:
        FileError: they are not those of one LoRA of an embedding.
    """
    rest = {role: tensor for role, tensor in t.items() if not role.startswith("embedding_")}
    whole = {"embedding_A", "embedding_B"} <= set(t) and set(rest) <= {"magnitude"}
    require_file(
        whole, module, f"{', '.join(sorted(t))} was found, lora_embedding_A and lora_embedding_B were expected"
    )
    scale = {"dora_scale": rest["magnitude"].reshape(1, -1)} if rest else {}
    return {"up": t["embedding_A"].mT.contiguous(), "down": t["embedding_B"].mT.contiguous(), **scale}


def of_embedding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module, lora_A (r, d) and lora_B (V, r), as those of an embedding with the same ΔW."""
    found = dict(tensors)
    if TOKENS[1:] in found:
        return found
    down, up = found.pop("lora_A.weight"), found.pop("lora_B.weight")
    return {"lora_embedding_A": up.mT, "lora_embedding_B": down.mT, **found}


def of_tied(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the rows of trained tokens, by the names of the layers, as a folder holds them of tied layers."""
    return {f"{prefix}{name}{TOKENS}": value.detach().cpu().contiguous() for name, value in values.items()}


def tokens(keys: Iterable[str]) -> dict[str, str]:
    """Return {module's name in the file: key} of the rows that some tokens of an embedding have after training."""
    ends = (f".token_adapter{TOKENS}", TOKENS)  # beside a LoRA, and alone
    found = {key: next((end for end in ends if key.endswith(end)), "") for key in keys}
    return {key.removesuffix(end): key for key, end in found.items() if end}


def tokens_patch(module: str, values: Tensor, config: Mapping[str, Any]) -> Patch:
    """Read the trained tokens of one embedding.

    Args:
        module: its path, which the configuration may go by.
        values: (k, d), the rows themselves.
        config: PEFT's configuration, which has the numbers of the rows.

    Raises:
        FileError: the configuration has no numbers for these rows.
    """
    said = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(said, Mapping):
        said = next((own for name, own in said.items() if f".{module}".endswith(f".{name}")), None)
    given: list[int] = said if isinstance(said, list) else []
    sound = values.dim() == 2 and all(type(number) is int and number >= 0 for number in given)
    found = f"{tuple(values.shape)} rows of tokens were found, and the configuration has their numbers as {said!r:.60}"
    require_file(sound and 0 < len(set(given)) == len(given) == len(values), module, found)
    order = sorted(range(len(given)), key=given.__getitem__)
    options = {"rows": [given[i] for i in order]}
    shape = Shape(0, values.shape[1])
    return Patch("full", options, shape, {"value": values[order]}, scale="1: the rows themselves", embedding=True)
