"""What PEFT's files hold of an embedding: a LoRA under names of its own, its weight as it was, and trained tokens.

PEFT keeps A (r, V) and B (d, r) of ΔW (V, d) = γ·(B·A)ᵀ; a Linear(d, V), which has the same weight, would have the
factors lora_B = Aᵀ and lora_A = Bᵀ. Its magnitudes are per column of the weight: of each of the d numbers of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from peftkit.errors import UnsupportedLayerError, require_file

#: how keys end -> what the tensor is
ENDS: Mapping[str, str] = MappingProxyType(
    {f".lora_embedding_{factor}{adapter}": f"embedding_{factor}" for factor in "AB" for adapter in ("", ".default")}
)
#: how the key of the weight of an adapted embedding ends, which PEFT saves as it was
BASE = ".base_layer.weight"
#: how a key ends, or goes on, of the rows that some tokens have after training
_TOKENS = ".trainable_tokens_delta"


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
    down, up = found.pop("lora_A.weight"), found.pop("lora_B.weight")
    return {"lora_embedding_A": up.mT, "lora_embedding_B": down.mT, **found}


def refuse_tokens(path: Path, keys: Iterable[str], prefix: str) -> None:
    """Raise UnsupportedLayerError for trained tokens of an embedding: a file read without them is another model."""
    for key in keys:
        if _TOKENS in key:
            embedding = key.partition(_TOKENS)[0].removeprefix(prefix).removesuffix(".token_adapter")
            raise UnsupportedLayerError(
                f"{path}: {key} is what was trained of some tokens of the embedding {embedding}, which is not read: "
                "merge it with PEFT's merge_and_unload, or train the embedding whole, as modules_to_save has it"
            )
