"""Adapters in a program's words into files: tensors under its names, its folder, or the format another file has."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit._version import __version__
from peftkit.adapters import registry
from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.as_low_rank import as_low_rank, balanced
from peftkit.errors import FileError, OptionError
from peftkit.files.export import forms, programs
from peftkit.files.export.encode import Encoding
from peftkit.files.export.forms import Additive, ButterflyForm, ChannelScaleForm, Decomposition, RotationForm
from peftkit.files.export.programs import Target
from peftkit.files.formats import container, native, peft
from peftkit.files.formats.native import Header, WeightRecord
from peftkit.files.formats.patch import AdapterFile
from peftkit.geometry import Shape

#: how entries begin that other tensors make untrue
HASHES = ("sshs_", "modelspec.hash")


@dataclass(frozen=True, eq=False)
class ModuleTensors:
    """One module of a file: its name there and what is written under it."""

    module: str
    spelled: Encoding
    shape: Shape


def shared_alpha(pieces: Sequence[ModuleTensors]) -> float | None:
    """One alpha for all low-rank modules of a file, the commonest rank: diffusers loses any other. None without any."""
    ranks = [piece.spelled.rank for piece in pieces if piece.spelled.rank is not None]
    return float(max(1, Counter(ranks).most_common(1)[0][0])) if ranks else None


def tensors_of(
    pieces: Sequence[ModuleTensors], goal: Target, alpha: float, dtype: torch.dtype | None, path: Path
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        for suffix, tensor in _module_tensors(piece, goal, alpha).items():
            whole = suffix in ("alpha", "on_input")
            tensor = tensor.detach().to("cpu", tensor.dtype if whole or dtype is None else dtype).contiguous()
            if not torch.isfinite(tensor).all():
                raise FileError(f"{path}: {piece.module}.{suffix} is not finite as {tensor.dtype}; nothing was written")
            tensors[f"{piece.module}.{suffix}"] = tensor
    return tensors


def _module_tensors(piece: ModuleTensors, goal: Target, alpha: float) -> dict[str, Tensor]:
    form, shape = piece.spelled.form, piece.shape
    if isinstance(form, Additive):
        return _delta_tensors(form.delta, shape, goal, alpha, balance=piece.spelled.how != "exact")
    if isinstance(form, Decomposition):
        tensors = _delta_tensors(form.inner, shape, goal, alpha)
        if goal.name in ("diffusers", "peft"):
            ones = (1,) * len(shape.kernel)
            vector = form.magnitude.reshape(1, -1, *ones) if shape.kernel else form.magnitude
            return tensors | {"lora_magnitude_vector": vector}
        return tensors | {"dora_scale": forms.dora_scale(form, shape)}
    if isinstance(form, RotationForm):
        return {"oft_R.weight": forms.skew(form)} if goal.name == "peft" else forms.oft(form, shape)
    if isinstance(form, ButterflyForm):
        return forms.boft(form, shape)
    if isinstance(form, ChannelScaleForm):
        return forms.ia3(form, shape)
    return forms.glora(form, shape, old_layout=piece.spelled.structure == "glora old")


def _delta_tensors(delta: Delta, shape: Shape, goal: Target, alpha: float, balance: bool = False) -> dict[str, Tensor]:
    bare = goal.name in ("diffusers", "peft")  # PEFT's spelling, which has no alpha tensor
    if isinstance(delta, LowRank):
        delta = balanced(delta) if balance else delta
        if not bare:
            return forms.lora(delta, shape, alpha)
        own = forms.lora(delta, shape, float(max(1, delta.rank)))
        return {"lora_A.weight": own["lora_down.weight"], "lora_B.weight": own["lora_up.weight"]}
    if isinstance(delta, Hadamard):
        tensors = forms.loha(delta)
    elif isinstance(delta, Kron):
        tensors = forms.lokr(delta, shape, full=_whole(delta, shape, goal))
    else:
        assert isinstance(delta, Dense)
        tensors = forms.diff(delta, shape)
    return {name: tensor for name, tensor in tensors.items() if not (bare and name == "alpha")}


def _whole(delta: Kron, shape: Shape, goal: Target) -> bool:
    """Whether D is written whole. ComfyUI and Forge misread a whole D of a 1- or 3-dimensional kernel."""
    if delta.left is None:
        return goal.name in ("lycoris", "peft") or len(shape.kernel) in (0, 2)
    v_p, v_q = delta.block[0], delta.block[1] // shape.positions
    return goal.name in ("lycoris", "peft") and delta.right.shape[0] >= max(v_p, v_q) / 2


# -- PEFT's folder -----------------------------------------------------------------------------------------------------


def write_peft(
    folder: Path, pieces: Sequence[ModuleTensors], kind: str, options: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Fill a folder. kind, options: as `peft_type` says."""
    tensors = tensors_of(pieces, programs.get("peft"), 1.0, dtype, folder)
    ranks = {p.module.removeprefix(peft.PREFIX): _peft_rank(p) for p in pieces}
    config = json.dumps(peft.config(kind, ranks, options), indent=2, sort_keys=True)
    (folder / peft.CONFIG).write_text(config + "\n")
    with (folder / peft.WEIGHTS).open("xb") as file:
        container.emit(file, tensors, {"format": "pt"})


def _peft_rank(piece: ModuleTensors) -> int:
    form = piece.spelled.form
    delta = form.delta if isinstance(form, Additive) else form.inner if isinstance(form, Decomposition) else None
    if isinstance(delta, Kron):
        sizes = delta.block[0], delta.block[1] // piece.shape.positions
        whole = delta.left is None or delta.right.shape[0] >= max(sizes) / 2
        return math.ceil(max(sizes) / 2) if whole else delta.right.shape[0]
    return delta.rank if isinstance(delta, (LowRank, Hadamard)) else 1


def peft_type(pieces: Sequence[ModuleTensors]) -> tuple[str, dict[str, Any]] | None:
    """A folder's type and options, where all modules share one; None where only LoRA, which says everything, can."""
    structures = {p.spelled.structure for p in pieces}
    deltas = [p.spelled.form.delta for p in pieces if isinstance(p.spelled.form, Additive)]
    if structures == {"lora"}:
        return "LORA", {"bias": "none"}
    if structures == {"dora"}:
        return "LORA", {"bias": "none", "use_dora": True}
    if structures == {"loha"}:
        return "LOHA", {"use_effective_conv2d": False}
    if structures == {"lokr"}:
        shapes = [(d, p.shape) for d, p in zip(deltas, pieces, strict=True) if isinstance(d, Kron)]
        factor = peft.decompose_factor([(d.C.shape, (s.rows, s.channels)) for d, s in shapes])
        if factor is not None:
            return "LOKR", {"decompose_factor": factor, "use_effective_conv2d": False}
    if structures == {"oft in"}:
        turns = [p.spelled.form for p in pieces if isinstance(p.spelled.form, RotationForm)]
        if len({(turn.Q.shape[1], turn.terms) for turn in turns}) == 1:
            terms = turns[0].terms
            series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
            return "OFT", {"r": 0, "oft_block_size": turns[0].Q.shape[1], "bias": "none", **series}
    return None


# -- any format --------------------------------------------------------------------------------------------------------


def write_deltas(
    like: AdapterFile,
    out: Path,
    deltas: Sequence[tuple[str, Shape, Delta]],
    dtype: torch.dtype | None,
    transposed: Collection[str] = (),
) -> int:
    """Write ΔW by modules' names in the format of another bundle; returns the bytes of its tensors.

    transposed: the modules that are transposed convolutions, which only this library's own format can say.
    """
    named = [(name, shape, delta if delta.structure else Dense(delta.dense())) for name, shape, delta in deltas]
    if like.format == "native":
        base = {name: like.base[name] for name, _, _ in named if name in like.base}
        return write_native(out, named, base, like.name, dtype, like.training, transposed)
    spelled = [(name, Encoding("exact", delta.structure, Additive(delta)), shape) for name, shape, delta in named]
    if like.format == "peft":
        pieces = [ModuleTensors(peft.PREFIX + name, own, shape) for name, own, shape in spelled]
        structures = {own.structure for _, own, _ in spelled}
        if structures == {"lora", "full"}:  # a folder holds one kind of adapter
            pieces = [_as_lora(piece) for piece in pieces]
        pieces = [_flipped(piece, out) for piece in pieces] if like.flipped else pieces
        found = peft_type(pieces)
        if found is None:
            kinds = ", ".join(sorted(structures))
            raise OptionError(f"a folder of PEFT holds one kind of adapter, not {kinds}: convert to lora")
        kind, options = found
        options |= {"fan_in_fan_out": True} if like.flipped else {}
        with container.atomic_folder(out) as folder:
            write_peft(folder, pieces, kind, options, dtype)
        return sum(info.size for info in container.read(out / peft.WEIGHTS).infos.values())
    pieces = [ModuleTensors(name, own, shape) for name, own, shape in spelled]
    plain = like.format == "diffusers" and all(own.structure == "lora" for _, own, _ in spelled)
    goal = programs.get("diffusers" if plain else "comfyui")
    tensors = tensors_of(pieces, goal, shared_alpha(pieces) or 1.0, dtype, out)
    require_safetensors(out)
    container.write(out, tensors, _kept(like))
    return sum(tensor.nbytes for tensor in tensors.values())


def _as_lora(piece: ModuleTensors) -> ModuleTensors:
    """The same ΔW as a low-rank product, of full rank if need be."""
    assert isinstance(piece.spelled.form, Additive)
    delta = piece.spelled.form.delta
    return ModuleTensors(piece.module, Encoding("exact", "lora", Additive(as_low_rank(delta))), piece.shape)


def _flipped(piece: ModuleTensors, out: Path) -> ModuleTensors:
    """The transpose, for layers that keep their weight as (in, out)."""
    form = piece.spelled.form
    if not isinstance(form, Additive) or not isinstance(form.delta, LowRank):
        raise OptionError(f"{out}: PEFT's fan_in_fan_out is of LoRA, not of {piece.spelled.structure}: convert to lora")
    low = LowRank(form.delta.A.mT, form.delta.B.mT)
    shape = Shape(piece.shape.columns, piece.shape.rows)
    return ModuleTensors(piece.module, Encoding("exact", "lora", Additive(low)), shape)


def write_native(
    out: Path,
    deltas: Sequence[tuple[str, Shape, Delta]],
    base: Mapping[str, np.ndarray],
    name: str,
    dtype: torch.dtype | None,
    training: Mapping[str, Any] | None = None,
    transposed: Collection[str] = (),
) -> int:
    """Write ΔW by weights' names as this library's own file; returns the bytes of its tensors."""
    require_safetensors(out)
    tensors: dict[str, Tensor] = {}
    records: dict[str, WeightRecord] = {}
    for weight, shape, delta in deltas:
        kind, (options, own) = delta.structure or "full", delta.as_parameters()
        records[weight] = WeightRecord(kind, registry.get(kind).convention, options, shape, weight in transposed)
        for key, tensor in own.items():
            cast = tensor.detach().cpu().to(tensor.dtype if dtype is None else dtype).contiguous()
            if not torch.isfinite(cast).all():
                raise FileError(f"{out}: {weight}.{key} is not finite as {cast.dtype}; nothing was written")
            tensors[f"{weight}.{key}".lstrip(".")] = cast
    header = Header(name, records, dict(base), training=dict(training or {}), version=__version__, portable=True)
    container.write(out, tensors, native.encode(header))
    return sum(tensor.nbytes for tensor in tensors.values())


def _kept(bundle: AdapterFile) -> dict[str, str]:
    """What of a header stays true of other tensors: not the hashes, nor how they were made."""
    stale = (*HASHES, "ss_network_", "lora_adapter_metadata", "peftkit_export")
    return {key: value for key, value in bundle.metadata.items() if not key.startswith(stale)}


def require_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise OptionError(f"{out}: the file is called *.safetensors, {out.suffix or 'no suffix'!r} was given")
