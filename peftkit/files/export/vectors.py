"""Adapters of norms and biases in other programs' files: changes for LyCORIS, values in a folder of PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftkit.delta import Dense
from peftkit.errors import ExportError
from peftkit.files.entries import AdapterEntry, delta_of
from peftkit.files.export.job import Job
from peftkit.files.export.programs import Target
from peftkit.files.formats import container
from peftkit.wrapping.vectors import is_bias
from peftkit.wrapping.walk import dotted

_KEEP = "keep it in this library's own format, or merge it"


def module_of(item: AdapterEntry) -> tuple[str, str]:
    """Return the module that an adapter of a vector is of, and its parameter."""
    module, _, last = item.name.rpartition(".")
    return (module, last) if is_bias(last) else (item.name, "weight")


def values_of(items: Sequence[AdapterEntry], goal: Target) -> dict[str, Tensor]:
    """Return W + ΔW of norms and biases by the names of their parameters, as a folder of PEFT has them.

    Raises:
        ExportError: the base is not at hand, or the weight of a norm has several dimensions.
    """
    found: dict[str, Tensor] = {}
    for item in items:
        if item.base is None:
            raise ExportError(f"{item.name}: {goal.title} has a norm's weight and a bias as they are: give base=")
        with torch.no_grad():
            found[dotted(*module_of(item))] = delta_of(item).added_to(item.base).flatten()
    return found


def tensors_of(
    items: Sequence[AdapterEntry], found: Sequence[Job], goal: Target, dtype: torch.dtype | None, path: Path
) -> dict[str, Tensor]:
    """Return the changes of norms and biases by LyCORIS' names: w_norm and b_norm, and diff_b beside a whole diff.

    Args:
        items: adapters of vectors.
        found: the modules with matrices that are in the file.
        goal: the program.
        dtype: of the tensors, None for the one they have.
        path: of the file, for errors.

    Raises:
        ExportError: the program has no place for one of them.
        FileError: a number is not finite in that dtype.
    """
    matrices = {name: job.piece.spelled.structure for job in found for name in [job.members[0][1].name]}
    weights = {item.name for item in items if module_of(item)[1] == "weight"}
    tensors: dict[str, Tensor] = {}
    for item in items:
        module, parameter = module_of(item)
        if item.rare_norm:
            raise ExportError(f"{item.name}: {goal.title} adapts LayerNorm and GroupNorm, and no other norm; {_KEEP}")
        key = (goal.generic or "") + module.replace(".", "_")
        if parameter not in ("weight", "bias") or not (module in weights or module in matrices):
            raise ExportError(f"{item.name}: {goal.title} has a bias beside its weight only; {_KEEP}")
        if module in matrices and matrices[module] != Dense.structure:
            raise ExportError(f"{item.name}: {goal.title} has a bias beside a whole ΔW only (kind 'full'); {_KEEP}")
        role = "diff_b" if module in matrices else {"weight": "w_norm", "bias": "b_norm"}[parameter]
        change = delta_of(item).dense().flatten()
        tensors[f"{key}.{role}"] = container.packed(change, dtype, path, f"{key}.{role}")
    return tensors
