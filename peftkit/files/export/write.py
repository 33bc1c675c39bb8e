"""Write ΔW by modules' names into a file: in the format of another file, or in this library's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit._version import __version__
from peftkit.adapters import registry
from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.as_low_rank import as_low_rank, as_low_rank_stack
from peftkit.errors import OptionError, require_file, require_option
from peftkit.files.export import programs
from peftkit.files.export.encode import Encoding
from peftkit.files.export.model_facts import ModelFacts
from peftkit.files.export.peft_folder import FAN_IN_FAN_OUT, peft_type, write_peft
from peftkit.files.export.tensors import ModuleTensors, shared_alpha, tensors_of
from peftkit.files.extras import refuse_extras
from peftkit.files.formats import alphas, container, disk, native, peft, peft_config
from peftkit.files.formats.native import Header, WeightRecord
from peftkit.files.formats.patch import AdapterFile
from peftkit.geometry import Shape

#: how entries begin that other tensors make untrue
HASHES = ("sshs_", "modelspec.hash")


def write_deltas(
    like: AdapterFile,
    out: Path,
    deltas: Sequence[tuple[str, Shape, Delta]],
    dtype: torch.dtype | None,
    transposed: Collection[str] = (),
    embeddings: Collection[str] = (),
) -> int:
    """Write ΔW by modules' names in the format of another file.

    Args:
        like: the file whose format and metadata are kept.
        out: the file, or PEFT's folder, to write.
        deltas: every module's name, the shape of its weight, and its ΔW.
        dtype: of the tensors, None for the one they have.
        transposed: the modules that keep their weight as (in, out): transposed convolutions, which only this library's
            own format can say, and Conv1D of GPT-2, which a folder of PEFT can say too.
        embeddings: the modules that are embeddings, which no other files can say.

    Returns:
        The bytes of the tensors that were written.

    Raises:
        OptionError: if a folder of PEFT would need several kinds of adapter.
        FileError: if a number is not finite in that dtype.
    """
    named = [
        (name, shape, delta if delta.structure or shape.experts > 1 else Dense(delta.dense()))
        for name, shape, delta in deltas
    ]
    if like.format == "native":
        base = {name: like.base[name] for name, _, _ in named if name in like.base}
        return write_native(out, named, base, like.name, dtype, like.training, transposed, like.extras, embeddings)
    refuse_extras(like, out, "a folder of PEFT is written without them")
    named = [(name, shape, as_low_rank_stack(d) if shape.experts > 1 else d) for name, shape, d in named]
    pieces = [ModuleTensors(name, _encoded(delta), shape, name in embeddings) for name, shape, delta in named]
    flipped = [name for name, shape, _ in named if name in transposed and not shape.kernel and shape.experts == 1]
    if like.format == "peft" and len(flipped) == len(transposed):
        return _write_peft(
            out, pieces, dtype, ModelFacts(said=peft_config.of_model(like.config)), flipped=bool(flipped)
        )
    require_option(not embeddings, "out", str(out), "a file of this library's own", _EMBEDDINGS)
    require_option(not transposed, "out", str(out), "a file of this library's own", _AS_IN_OUT)
    return _write_file(like, out, pieces, dtype)


def _encoded(delta: Delta) -> Encoding:
    return Encoding("exact", delta.structure, registry.additive(delta))


#: why no other file can have an adapter
_EMBEDDINGS = " It adapts embeddings, for which other files have no place: give such a file first"
_AS_IN_OUT = " Its layers keep their weight as (in, out), which other files do not say: give such a file first"


def _write_peft(
    out: Path, pieces: Sequence[ModuleTensors], dtype: torch.dtype | None, facts: ModelFacts, *, flipped: bool
) -> int:
    """Write a folder of PEFT. flipped: of layers that keep their weight as (in, out)."""
    structures = {piece.spelled.structure for piece in pieces}
    if structures == {LowRank.structure, Dense.structure}:  # a folder holds one kind of adapter
        pieces = [_as_lora(piece) for piece in pieces]
    pieces = [replace(piece, module=peft.PREFIX + piece.module) for piece in pieces]
    found = peft_type(pieces)
    if found is None:
        kinds = ", ".join(sorted(structures))
        raise OptionError(f"a folder of PEFT holds one kind of adapter, not {kinds}: convert to lora")
    kind, options = found
    if any(piece.embedding for piece in pieces) and kind not in peft.ON_EMBEDDINGS:
        raise OptionError(f"{out}: PEFT has LoRA on embeddings, not {', '.join(structures)}: convert to lora")
    if flipped and kind not in peft.FLIPPED:
        raise OptionError(f"{out}: PEFT's fan_in_fan_out is of LoRA, not of {', '.join(structures)}: convert to lora")
    with disk.atomic_folder(out) as folder:
        write_peft(folder, pieces, kind, {**options, **FAN_IN_FAN_OUT[flipped]}, dtype, facts=facts)
    return sum(info.size for info in container.read(out / peft.WEIGHTS).infos.values())


def _write_file(like: AdapterFile, out: Path, pieces: Sequence[ModuleTensors], dtype: torch.dtype | None) -> int:
    """Write a file of kohya's tensors, or of diffusers' where that was its format and has a name for all of them."""
    plain = like.format == "diffusers" and all(piece.spelled.form.lora is not None for piece in pieces)
    goal = programs.get("diffusers" if plain else "comfyui")
    tensors = tensors_of(pieces, goal, shared_alpha(pieces) or 1.0, dtype, out)
    require_safetensors(out)
    container.write(out, tensors, _kept(like))
    return sum(tensor.nbytes for tensor in tensors.values())


def _as_lora(piece: ModuleTensors) -> ModuleTensors:
    """The same ΔW as a low-rank product, of full rank if need be."""
    delta = piece.spelled.form.change
    return piece if delta is None else replace(piece, spelled=_encoded(as_low_rank(delta)))


def write_native(
    out: Path,
    deltas: Sequence[tuple[str, Shape, Delta]],
    base: Mapping[str, np.ndarray],
    name: str,
    dtype: torch.dtype | None,
    training: Mapping[str, Any] | None = None,
    transposed: Collection[str] = (),
    extras: Mapping[str, Tensor] = MappingProxyType({}),
    embeddings: Collection[str] = (),
) -> int:
    """Write ΔW by weights' names as this library's own file.

    Args:
        out: the file to write.
        deltas: every weight's name, its shape, and its ΔW.
        base: fingerprints of the weights that the ΔW were made for, by name.
        name: of the adapter.
        dtype: of the tensors, None for the one they have.
        training: what the header says of the training.
        transposed: the weights that are transposed convolutions'.
        extras: parameters that trained beside the adapters, which keep their dtype.
        embeddings: the weights that are embeddings'.

    Returns:
        The bytes of the tensors that were written.

    Raises:
        FileError: if a number is not finite in that dtype.
    """
    require_safetensors(out)
    tensors: dict[str, Tensor] = dict(extras)
    records: dict[str, WeightRecord] = {}
    for weight, shape, delta in deltas:
        kind, (options, own) = delta.kind, delta.as_parameters()
        records[weight] = WeightRecord(
            kind,
            registry.get(kind).convention,
            options,
            shape,
            transposed=weight in transposed,
            embedding=weight in embeddings,
        )
        for key, tensor in own.items():
            cast = container.packed(tensor, dtype, out, f"{weight}.{key}")
            full = f"{weight}.{key}".lstrip(".")
            require_file(full not in extras, out, f"{full} would be a tensor of the adapter and an extra; not written")
            tensors[full] = cast
    header = Header(
        name,
        records,
        dict(base),
        training=dict(training or {}),
        version=__version__,
        portable=True,
        extras=tuple(extras),
    )
    container.write(out, tensors, native.encode(header))
    return sum(tensor.nbytes for tensor in tensors.values())


def _kept(like: AdapterFile) -> dict[str, str]:
    """The entries of a header that stay true of other tensors: not the hashes, nor how the tensors were made."""
    stale = (*HASHES, "ss_network_", "lora_adapter_metadata", "peftkit_export")
    return {k: value for k, value in like.metadata.items() if not k.startswith(stale) and k not in alphas.ENTRIES}


def require_safetensors(out: Path) -> None:
    """Raise OptionError unless a file is called *.safetensors."""
    if out.suffix != ".safetensors":
        raise OptionError(f"{out}: the file is called *.safetensors, {out.suffix or 'no suffix'!r} was given")
