"""Write adapters the way another program reads them: A1111, Forge, ComfyUI, sd-scripts, LyCORIS, diffusers, PEFT.

Every weight goes out in the program's own structure where that says the same ΔW, in another structure of the same ΔW
where it does not, baked against its base where neither is possible, or not at all, with the reason.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn

from peftkit._version import __version__
from peftkit.adapters.options import require_dtype
from peftkit.delta import LowRank
from peftkit.errors import FileError, LossyError, OptionError, error_context, require_file
from peftkit.files.base import of_model
from peftkit.files.entries import AdapterEntry, items_of_file, items_of_model, opened
from peftkit.files.export import metadata, programs
from peftkit.files.export.beside import Beside, as_changes, in_peft_folder
from peftkit.files.export.exportable import require_exportable
from peftkit.files.export.gguf_file import write_gguf
from peftkit.files.export.gguf_names import GgufModel
from peftkit.files.export.job import Job, jobs
from peftkit.files.export.model_facts import ModelFacts, facts_of
from peftkit.files.export.names import OWN, Members, family_of, named_modules, taken_apart
from peftkit.files.export.peft_folder import FAN_IN_FAN_OUT, peft_type, write_peft
from peftkit.files.export.programs import Target
from peftkit.files.export.proof import Exported, proven
from peftkit.files.export.servers import at_one_rank, require_served
from peftkit.files.export.tensors import shared_alpha, tensors_of
from peftkit.files.export.vectors import tensors_of as vectors_of
from peftkit.files.export.vectors import values_of
from peftkit.files.extras import listed
from peftkit.files.families.family import Family
from peftkit.files.formats import container, disk, embeddings, peft, peft_config
from peftkit.files.place import known_families
from peftkit.files.read import Reading, read
from peftkit.wrapping.divided import by_first_process
from peftkit.wrapping.listing import Row, listing
from peftkit.wrapping.pipeline import of_models

if TYPE_CHECKING:
    from typing_extensions import Unpack


#: what else can be done for a program that has a place for changes of parameters
_CHANGES = " as they are: export the model, and give base= the model before training, for which they are changes"


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, weight by weight. str(report) is one line, table() all of it."""

    target: str
    path: Path
    weights: tuple[Exported, ...]
    left_out: tuple[str, ...] = ()  # parameters that trained beside the adapters, left out as extras=False asks
    extras: tuple[str, ...] = ()  # and those that were written
    notes: tuple[str, ...] = ()  # what a user should know of the file as a whole

    @property
    def exact(self) -> bool:
        """Whether nothing is bound to the base."""
        return all(w.how != "baked" for w in self.weights)

    def __str__(self) -> str:
        counts = Counter(w.how for w in self.weights)
        grown = sum(w.bytes for w in self.weights) / max(1, sum(w.own for w in self.weights))
        worst = max((w.error for w in self.weights if w.error is not None), default=0.0)
        notes = "".join(f"\n{note}" for note in [*sorted({w.note for w in self.weights if w.note}), *self.notes])
        notes += f"\n{listed(self.extras)} beside them" if self.extras else ""
        notes += f"\n{listed(self.left_out)} left out, as extras=False asks" if self.left_out else ""
        said = ", ".join(f"{count} {how}" for how, count in counts.items())
        size = f"{grown:.2g} times the adapter's bytes"
        return f"{self.path} for {self.target}: {len(self.weights)} weights: {said}; {size}; error {worst:.2g}{notes}"

    def table(self, *, every: bool = True) -> Table:
        """Every weight, for rich to print; every=False: one row for weights that are alike."""
        rows = [Row(f"{w.weight} as {w.written}", (w.kind, w.structure, w.how), (w.error,)) for w in self.weights]
        return listing(["kind", "written as", "how"], {"error": "{:.2g}".format}, rows, every=every)


@dataclass(frozen=True)
class _Request:
    """What `export` was asked for."""

    path: Path
    goal: Target
    family: str | None
    component: str | None
    dtype: torch.dtype | None
    bake: bool
    title: str
    training: Mapping[str, Any]
    extras: bool
    facts: ModelFacts
    own: bool  # whether the paths of the model are those of the program

    def __post_init__(self) -> None:
        suffix, own = self.path.suffix, self.goal.suffix
        if not self.goal.folder and suffix != own:
            raise OptionError(f"{self.path}: {self.goal.title} reads *{own}, {suffix or 'no suffix'!r} was given")


@of_models
@by_first_process
def export(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    target: str,
    *,
    name: str | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    family: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    bake: bool = False,
    title: str | None = None,
    training: Mapping[str, Any] | None = None,
    other_base: bool = False,
    overwrite: bool | None = None,
    extras: bool = True,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    model_name: str | None = None,
    **reading: Unpack[Reading],
) -> ExportReport:
    """Write the adapters of a wrapped model, or of any adapter file, for another program.

    The file holds the adapters at strength 1, whatever λ they have on the model: programs have a strength of their own.
    The file is read back and compared with the adapters before it takes its name.

    A model that fully_shard divides is exported by all processes together, as by `save`; of weights whose adapters read
    them, the first process holds all in main memory.

    Args:
        source: a wrapped model, or an adapter file.
        path: the file to write, *.safetensors; *.gguf for "llama.cpp"; a new folder for "peft",
            "vllm" and "sglang".
        target: "a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", "peft", "llama.cpp", "vllm" or "sglang".
        name: which adapter of a model that has several.
        base: the model or the checkpoint that a file is for, where ΔW or names depend on it.
        family: the model's ("sd15", "sdxl", "flux", …), where names and shapes do not say it; "own" for a model of no
            family known here whose own paths ComfyUI has too.
        component: which part of a pipeline the source is, where its names do not say it ("text_encoder_2").
        dtype: of the tensors, None for the one they have.
        bake: write ΔW itself for adapters that depend on their base.
        title: of the file, for its metadata; its name by default.
        training: entries of the metadata, such as kohya's ss_ and Stability's modelspec entries.
        other_base: accept a base that the file was not trained on.
        overwrite: replace what is at `path`, as `require_output` says; by default a file that is not an input.
        extras: False leaves out parameters that trained beside the adapters, and the report names them. By default a
            folder of PEFT gets them, as modules_to_save and as biases; LyCORIS gets matrices, norms and biases of a
            model as changes of what they are in `base`; no other program has a place for them.
        config: the model's config.json, the folder it is in, or its entries, where neither the source nor `base` has
            it. A folder of PEFT says the model's task by it; llama.cpp's names and rows depend on it.
        model_name: the model's name on the hub or its folder, for a folder of PEFT, from which AutoPeftModel loads it;
            by default the name that the model or the adapter says, or the folder of `base`.
        **reading: as in `read`.

    Returns:
        How every weight went out, and with which error.

    Raises:
        ExportError: the program can hold neither an adapter nor its ΔW, or has no name for a module.
        LossyError: parameters trained beside the adapters that the program has no place for; see `extras`.
        FileError: a number is not finite, or vanishes, in that dtype.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> _ = torch.nn.init.ones_(pk.adapter_parameters(model)[0])
        >>> pk.export(model, "style", "peft").weights[0].structure
        'lora'
    """
    goal = programs.get(target)
    require_dtype(dtype)
    path = disk.require_output(path, [source, base], overwrite)
    facts, asks = functools.partial(facts_of, config=config, name=model_name), goal.folder or goal.configured
    # a checkpoint in one file is one that ComfyUI loads, under the paths it has in there
    own = family == OWN or (isinstance(base, (str, os.PathLike)) and os.path.isfile(base))
    request = _Request(
        path, goal, family, component, dtype, bake, title or path.stem, training or {}, extras, ModelFacts(), own
    )
    if isinstance(source, nn.Module):
        request = replace(request, facts=facts(source, None, {}) if asks else ModelFacts())
        entries = list(items_of_model(source, name))
        beside = Beside.of_model(source, vectors=any(entry.vector for entry in entries))
        if base is not None and extras and goal.norms:
            entries += as_changes(beside.values, source, opened(base))
            beside = Beside({})
        return _export(entries, request, beside, known_families(of_model(source)))
    with error_context(source):
        bundle = read(source, **reading)
        whole = opened(base) if base is not None else None
        known = () if whole is None else known_families(whole)
        apart = functools.partial(taken_apart, family, list(bundle.patches), goal)
        items = list(items_of_file(source, bundle, base if whole is None else whole, other_base, apart))
        said = peft_config.of_model(bundle.config)
        request = replace(request, facts=facts(None, whole, said) if asks else ModelFacts())
        return _export(items, request, Beside(bundle.extras, whole), known)


def _export(items: Sequence[AdapterEntry], request: _Request, beside: Beside, known: Sequence[Family]) -> ExportReport:
    """Name and encode every adapter, and write them and what trained beside them. known: the base's family."""
    tied = [item for item in items if item.again and item.adapter.replaces and request.goal.beside]
    items = [item for item in items if item not in tied]  # PEFT puts trained tokens on all layers of a shared weight
    vectors, items = [item for item in items if item.vector], [item for item in items if not item.vector]
    require_exportable(items, vectors, request.goal)
    if beside.values and request.extras and not request.goal.beside:
        raise LossyError(
            f"{request.path}: {listed(list(beside.values))} trained beside the adapters, and what is written for "
            f"{request.goal.title} has no place for them{_CHANGES if request.goal.norms else ''}; pass extras=False to "
            "leave them out, or save() has them"
        )
    family = family_of(items, known, request.family, request.component, request.goal)
    if any(item.flipped for item in items):  # PEFT has its other kinds on no Conv1D
        held = request.goal.reads & {LowRank.structure}, request.goal.decomposes & {(LowRank.structure, "out")}
        request = replace(request, goal=replace(request.goal, reads=held[0], decomposes=held[1]))
    modules = named_modules(items, request.goal, family, request.component, own=request.own)
    found = _consistent(modules, request.goal, family, request.bake)
    kept = beside if request.extras else Beside({})
    if request.goal.beside:
        kept = replace(kept, values={**kept.values, **values_of(vectors, request.goal)}, base=beside.base)
    notes: tuple[str, ...] = ()
    if request.goal.folder:
        weights, notes = _write_folder(found, request, kept, tied)
    elif request.goal.configured:
        weights = _write_gguf(found, request)
    else:
        weights = _write_file(found, request, family, vectors)
    left_out = () if request.extras else tuple(beside.values)
    return ExportReport(request.goal.name, request.path, weights, left_out, tuple(kept.values), notes)


def _consistent(modules: dict[str, Members], goal: Target, family: Family | None, bake: bool) -> Sequence[Job]:
    """Encode all modules; without magnitudes where these would have to be on all, and are not."""
    found = jobs(modules, goal, family, bake)
    if goal.all_decomposed and len({job.piece.spelled.form.decomposed for job in found}) > 1:
        return jobs(modules, replace(goal, decomposes=frozenset()), family, bake)
    return found


def _write_file(
    found: Sequence[Job], request: _Request, family: Family | None, vectors: Sequence[AdapterEntry]
) -> tuple[Exported, ...]:
    goal, path, pieces = request.goal, request.path, [job.piece for job in found]
    alpha = shared_alpha(pieces)
    tensors = tensors_of(pieces, goal, alpha or 1.0, request.dtype, path)
    tensors |= vectors_of(vectors, found, goal, request.dtype, path)
    rank = None if alpha is None else int(alpha)
    own = {"kinds": sorted({j.kind for j in found}), "baked": [p.module for p in pieces if p.spelled.how == "baked"]}
    header = metadata.build(tensors, goal, family, request.title, rank, alpha, request.training, own)
    with disk.atomic(path) as file:
        container.emit(file, tensors, header)
        file.flush()
        if len(read(file.name).vectors) != len(vectors):
            raise FileError(f"{path}: changes of norms and biases were read back other than they were written")
        return proven(Path(file.name), found, path)


def _write_gguf(found: Sequence[Job], request: _Request) -> tuple[Exported, ...]:
    """Write a file of llama.cpp."""
    kinds, baked = {j.kind for j in found}, [j.piece.module for j in found if j.piece.spelled.how == "baked"]
    own = {"version": __version__, "kinds": sorted(kinds), "baked": baked, "training": dict(request.training)}
    model = GgufModel.of(request.facts)
    return write_gguf(request.path, found, request.goal, model, request.title, request.dtype, own)


def _write_folder(
    found: Sequence[Job], request: _Request, beside: Beside, tied: Sequence[AdapterEntry]
) -> tuple[tuple[Exported, ...], tuple[str, ...]]:
    """Write a folder of PEFT, and return what a user should know of it too.

    tied: what PEFT puts where it belongs by itself, and has in files without a LoRA.
    """
    filled: tuple[str, ...] = ()
    if request.goal.served:
        require_served(found, request.goal)
        found, filled = at_one_rank(found, request.goal)
    kind = peft_type([job.piece for job in found])
    if kind is None:  # a folder holds one kind of adapter, and LoRA can be any ΔW
        lora = replace(request.goal, reads=frozenset({LowRank.structure}), decomposes=frozenset())
        found = jobs({job.piece.module: job.members for job in found}, lora, None, bake=False)
        kind = peft_type([job.piece for job in found])
        assert kind is not None
    flipped = any(item.flipped for job in found for _, item in job.members)
    extras, said = in_peft_folder(beside, found, kind[0], request.dtype, request.path)
    if kind[0] not in peft.ON_EMBEDDINGS:
        extras |= embeddings.of_tied({item.name: item.adapter.state_dict()["value"] for item in tied}, peft.PREFIX)
    with disk.atomic_folder(request.path) as folder:
        notes = write_peft(
            folder,
            [job.piece for job in found],
            kind[0],
            {**kind[1], **said, **FAN_IN_FAN_OUT[flipped]},
            request.dtype,
            extras,
            request.facts,
            listed=request.goal.served,
        )
        require_file(
            set(beside.values) <= set(read(folder).extras),
            request.path,
            "what trained beside the adapters was read back other than it was written",
        )
        return proven(folder, found, request.path), (*notes, *filled)
