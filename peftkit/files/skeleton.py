"""A checkpoint as a model without numbers: layers of its shapes, for what asks which layers there are."""

from __future__ import annotations

import torch
from torch import nn

from peftkit.errors import FileError
from peftkit.files.base import Base
from peftkit.files.formats import container
from peftkit.kernels.torch_private import own_modules

#: what an embedding is called in the models of the field; every other matrix is taken for that of a Linear
_EMBEDDINGS = frozenset(
    {"embed_tokens", "token_embedding", "position_embedding", "word_embeddings", "position_embeddings"}
    | {"token_type_embeddings", "wte", "wpe", "shared", "relative_attention_bias", "class_embedding", "label_emb"}
)
#: parts of a checkpoint that are no part of what adapters are for
_OTHERS = ("first_stage_model.", "vae.", "safety_checker.")
_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_DTYPES = {name: dtype for dtype, name in container.NAMES.items()}


def skeleton(base: Base) -> nn.Module:
    """Return a model on the meta device with a Linear, a convolution or an embedding for each weight of a checkpoint.

    Autoencoders are left out. A convolution's groups are not known: its matrix is, which is all that an adapter asks.

    Raises:
        FileError: no weight of the checkpoint could be adapted.
    """
    root = nn.Module()
    for key in base.where:
        path, _, leaf = key.rpartition(".")
        info = base.info(key)
        dtype = _DTYPES.get(info.dtype, torch.int8)
        if leaf != "weight" or not all(path.split(".")) or path.startswith(_OTHERS) or not dtype.is_floating_point:
            continue
        layer = _layer(path, info.shape, dtype if dtype.itemsize > 1 else torch.bfloat16)
        if layer is not None:
            _put(root, path, layer)
    if not own_modules(root):
        raise FileError(f"{base.path} has no weight of a Linear or a convolution: it is no checkpoint to plan for")
    return root


def _layer(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module | None:
    if len(shape) == 2 and path.rpartition(".")[2] in _EMBEDDINGS:
        return nn.Embedding(*shape, device="meta", dtype=dtype)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    made = _CONVOLUTIONS.get(len(shape))
    return made and made(shape[1], shape[0], shape[2:], bias=False, device="meta", dtype=dtype)


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:  # by torch's own dictionary, since a name may be that of a method, as "type" is
        root = own_modules(root).setdefault(parent, nn.Module()) or root
    there = own_modules(root).get(name)
    if there is not None:
        own_modules(layer).update(own_modules(there))  # what is inside a weight's own module, which came before it
    own_modules(root)[name] = layer
