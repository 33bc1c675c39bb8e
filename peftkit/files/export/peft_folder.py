"""PEFT's folder: a configuration, which is of one kind for all modules, beside a file of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peftkit.adapters.form import PeftConfig
from peftkit.files.export import programs
from peftkit.files.export.model_facts import ModelFacts
from peftkit.files.export.peft_targets import selection
from peftkit.files.export.tensors import ModuleTensors, tensors_of
from peftkit.files.formats import container, embeddings, peft, peft_config, peft_experts, peft_projections

#: what a configuration says of layers that keep their weight as (out, in), and of those that keep it as (in, out)
FAN_IN_FAN_OUT: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {"fan_in_fan_out": True})
_UNKNOWN = ModelFacts()
_BY_PATTERN = (
    "target_modules is a regular expression, as no list of names selects these modules alone; SGLang reads only lists"
)
_RANKS = (
    "the modules have several ranks, and SGLang and llama.cpp's converter read folders of one: export for vllm, sglang "
    "or llama.cpp for these"
)


def peft_type(pieces: Sequence[ModuleTensors]) -> PeftConfig | None:
    """Return a folder's type and options; None where its modules share no type, and only LoRA could hold them all."""
    tokens = {p.module.removeprefix(peft.PREFIX): numbers for p in pieces if (numbers := p.spelled.form.numbers)}
    if tokens and len(tokens) < len(pieces):  # which only a LoRA's folder has beside its modules
        found = peft_type([piece for piece in pieces if not _of_tokens(piece)])
        beside = {"trainable_token_indices": tokens}
        return (found[0], found[1] | beside) if found is not None and found[0] in peft.ON_EMBEDDINGS else None
    forms = {type(piece.spelled.form) for piece in pieces}
    if len({piece.spelled.structure for piece in pieces}) > 1 or len(forms) > 1:
        return None
    return forms.pop().peft_config([(piece.spelled.form, piece.shape) for piece in pieces])


def _of_tokens(piece: ModuleTensors) -> bool:
    """Whether the module is an embedding of which some tokens were trained."""
    return bool(piece.spelled.form.numbers)


def stack_names(pieces: Sequence[ModuleTensors]) -> dict[str, str]:
    """Return what the modules of stacks of experts are called in the file, by the names of the stacks."""
    return peft_experts.keys([piece.module for piece in pieces if piece.shape.experts > 1])


def _tables(pieces: Sequence[ModuleTensors], dtype: torch.dtype | None, folder: Path) -> dict[str, Tensor]:
    """What the modules share, of folders of a type with such tensors."""
    forms = {type(piece.spelled.form) for piece in pieces}
    found = forms.pop().peft_tables([(piece.spelled.form, piece.shape) for piece in pieces]) if len(forms) == 1 else {}
    named = {f"{peft_projections.SHARED}.{name}": table for name, table in (found or {}).items()}
    return {key: container.packed(table, dtype, folder, key) for key, table in named.items()}


def write_peft(
    folder: Path,
    pieces: Sequence[ModuleTensors],
    kind: str,
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
    facts: ModelFacts = _UNKNOWN,
    *,
    listed: bool = False,
) -> tuple[str, ...]:
    """Fill a folder.

    Args:
        folder: where the files go.
        pieces: the modules.
        kind: PEFT's type, from `peft_type`.
        options: of the configuration, from `peft_type` too.
        dtype: of the factors, None for the one they have.
        beside: what else the file holds, by key.
        facts: what is known of the model.
        listed: whether modules are named by a list even where it would have PEFT adapt others too.

    Returns:
        What a user should know of the folder.
    """
    stacks = stack_names(pieces)
    named = [replace(piece, module=stacks.get(piece.module, piece.module)) for piece in pieces]
    tensors = (
        tensors_of(named, programs.get("peft"), 1.0, dtype, folder) | _tables(pieces, dtype, folder) | dict(beside)
    )
    mixed = "trainable_token_indices" in options
    if mixed:
        tensors = {
            key.replace(embeddings.TOKENS, f".token_adapter{embeddings.TOKENS}"): t for key, t in tensors.items()
        }
    adapted = [piece for piece in pieces if not (mixed and _of_tokens(piece))]
    ranks = {p.module.removeprefix(peft.PREFIX): p.spelled.form.peft_rank(p.shape) for p in adapted}
    parameters = [module.removeprefix(peft.PREFIX) for module in stacks]
    alone = all(map(_of_tokens, pieces))  # of a list PEFT warns that tied tokens are in it, which it trains together
    modules = [path for path in ranks if path not in parameters]
    names = None if alone else selection(modules, facts.modules)
    names = modules if names is None and listed else names
    model = facts.peft_entries(saved=options.get("modules_to_save", ()))
    entries = peft_config.config(kind, ranks, options, parameters, targets=names, model=model)
    (folder / peft.CONFIG).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    with (folder / peft.WEIGHTS).open("xb") as file:
        container.emit(file, tensors, {"format": "pt"})
    notes = (_BY_PATTERN, not alone and names is None), (_RANKS, bool(entries.get("rank_pattern")))
    return tuple(note for note, holds in notes if holds and kind in peft.SERVED)
