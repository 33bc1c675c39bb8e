"""The tensors of a file: what every module has in it, under the module's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftkit.files.export.encode import Encoding
from peftkit.files.export.programs import Target
from peftkit.files.formats import container, embeddings
from peftkit.geometry import Shape

#: tensors that are numbers and not factors, which keep their dtype
_NUMBERS = ("alpha", "on_input")


@dataclass(frozen=True, eq=False)
class ModuleTensors:
    """One module of a file: its name there, what is written under that name, and whether it is an embedding."""

    module: str
    spelled: Encoding
    shape: Shape
    embedding: bool = False


def shared_alpha(pieces: Sequence[ModuleTensors]) -> float | None:
    """Return one alpha for all low-rank modules of a file, the commonest rank; None where there are no such modules.

    diffusers loses any other alpha.
    """
    ranks = [piece.spelled.rank for piece in pieces if piece.spelled.rank is not None]
    return float(max(1, Counter(ranks).most_common(1)[0][0])) if ranks else None


def tensors_of(
    pieces: Sequence[ModuleTensors], target: Target, alpha: float, dtype: torch.dtype | None, path: Path
) -> dict[str, Tensor]:
    """Return the tensors of a file by their names in it.

    Args:
        pieces: the modules.
        target: the program that reads the file.
        alpha: the one of all low-rank modules.
        dtype: of the factors, None for the one they have.
        path: of the file, for errors.

    Raises:
        FileError: if a number is not finite in that dtype.
    """
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        for suffix, tensor in _of_module(piece, target, alpha).items():
            key = f"{piece.module}.{suffix}"
            tensors[key] = container.packed(tensor, None if suffix in _NUMBERS else dtype, path, key)
    return tensors


def _of_module(piece: ModuleTensors, target: Target, alpha: float) -> dict[str, Tensor]:
    """The tensors of one module; products of the library's own making are balanced, an adapter's own are not."""
    form = piece.spelled.form if piece.spelled.how == "exact" else piece.spelled.form.balanced()
    tensors = form.tensors(target, piece.shape, alpha)
    if piece.embedding:
        tensors = embeddings.of_embedding(tensors)
    return {name: t for name, t in tensors.items() if not (target.peft_names and name == "alpha")}
