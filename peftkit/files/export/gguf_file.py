"""llama.cpp's file of an adapter: a GGUF with two factors of every weight and one alpha for all of them.

Its loader and its converter, of October 2026, were read: A (r, n) is the tensor "<weight>.lora_a" and B (m, r)
"<weight>.lora_b"; of the embedding of tokens A is (V, r), a row for each token, and B (d, r). ΔW = alpha/r·B·A, with
the rank of each weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import require_choice, require_file
from peftkit.files.export.gguf_names import GgufModel, require_gguf
from peftkit.files.export.job import Job
from peftkit.files.export.programs import Target
from peftkit.files.export.proof import Exported, compared
from peftkit.files.export.tensors import shared_alpha, tensors_of
from peftkit.files.formats import container, disk
from peftkit.files.formats.patch import Patch

#: our own entry: how each weight was written
KEY = "peftkit.export"
#: the dtypes of factors that llama.cpp multiplies by -> their names in GGUF
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(
    path: Path,
    found: Sequence[Job],
    goal: Target,
    model: GgufModel,
    title: str,
    dtype: torch.dtype | None,
    own: Mapping[str, Any],
) -> tuple[Exported, ...]:
    """Write the file, and read it back.

    Args:
        path: of the file.
        found: the modules, under their paths in the model.
        goal: llama.cpp.
        model: as llama.cpp has it.
        title: of the file.
        dtype: of the factors, None for fp32, or for the narrower one they have.
        own: what this library says of the file, as JSON holds it.

    Raises:
        ExportError: llama.cpp has no weight for a module.
        OptionError: a dtype that llama.cpp does not multiply by, or the gguf package is not installed.
        FileError: a number is not finite in that dtype, or the file is read back otherwise than it was written.
    """
    require_choice("dtype", dtype, (None, *_DTYPES))
    orders = {job.piece.module: model.order(job.piece.module, job.piece.shape.rows) for job in found}
    named = [replace(job, piece=replace(job.piece, module=model.tensor(job.piece.module))) for job in found]
    order = {job.piece.module: orders[was.piece.module] for job, was in zip(named, found, strict=True)}
    pieces = [job.piece for job in named]
    alpha = shared_alpha(pieces) or 1.0
    tensors = tensors_of(pieces, goal, 1.0, None, path)
    factors = {
        key: container.packed(tensor, dtype or _held(tensor), path, key)
        for name in order
        for key, tensor in _factors(name, tensors, alpha, order[name]).items()
    }
    with disk.atomic(path) as file:
        written = Path(file.name)
        _emit(written, model.architecture.name, title, alpha, factors, own)
        read = _read(written)
        require_file(read.keys() == factors.keys(), path, "other tensors were read back than were written")
        patches = {job.piece.module: _patch(job, read, alpha, order[job.piece.module]) for job in named}
        return compared(named, path, patches, {key: tensor.nbytes for key, tensor in factors.items()})


def _held(tensor: Tensor) -> torch.dtype:
    """The dtype a factor keeps, or fp32 where llama.cpp has no product with its own."""
    return tensor.dtype if tensor.dtype in _DTYPES else torch.float32


def _factors(name: str, tensors: Mapping[str, Tensor], alpha: float, order: Tensor | None) -> dict[str, Tensor]:
    """A and B of one weight by their keys, from PEFT's tensors of it; what alpha/r leaves over is in B."""
    down, up = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
    if down is None or up is None:
        down, up = tensors[f"{name}.lora_embedding_A"].mT, tensors[f"{name}.lora_embedding_B"]
    up = up if order is None else up[order]
    left = up.shape[1] / alpha
    return {f"{name}.lora_a": down, f"{name}.lora_b": up if left == 1 else up.float() * left}


def _emit(
    path: Path, architecture: str, title: str, alpha: float, factors: Mapping[str, Tensor], own: Mapping[str, Any]
) -> None:
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(title)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_string(KEY, json.dumps(own, ensure_ascii=False, sort_keys=True, default=str))
    for key, tensor in factors.items():
        held = gguf.GGMLQuantizationType[_DTYPES[tensor.dtype]]
        writer.add_tensor(key, tensor.view(torch.uint8).numpy(), raw_dtype=held)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the gguf package's reader."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    return {
        tensor.name: torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtypes[tensor.tensor_type.name]).reshape(
            [int(size) for size in reversed(tensor.shape)]
        )
        for tensor in require_gguf().GGUFReader(path).tensors
    }


def _patch(job: Job, read: Mapping[str, Tensor], alpha: float, order: Tensor | None) -> Patch:
    """One weight's adapter in the order of the model's own rows."""
    down, up = (read[f"{job.piece.module}.lora_{which}"] for which in "ab")
    rank = up.shape[1]
    if job.piece.embedding:
        down, up = up.mT.contiguous(), down
    if order is not None:
        up = torch.empty_like(up).index_copy_(0, order, up)
    return Patch("lora", {"rank": rank, "alpha": alpha}, job.piece.shape, {"up": up, "down": down})
