"""Ranks for a checkpoint within a budget, by scores out of a file or of a fine-tuned checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import FileError, OptionError
from peftkit.files.base import Base
from peftkit.files.formats import strict_json
from peftkit.files.quantised import open_plain
from peftkit.files.skeleton import skeleton
from peftkit.wrapping.plan import Plan, plan

#: how many singular values of a difference are looked at: more ranks are hardly worth their bytes
_MOST = 128


def plan_ranks(
    base: str | os.PathLike[str],
    kind: str,
    budget: int | str,
    *,
    scores: Mapping[str, Sequence[float]] | None = None,
    tuned: str | os.PathLike[str] | None = None,
    targets: str | Sequence[str] = "full",
    exclude: str | Sequence[str] = (),
    component: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Plan:
    """Plan an adapter of a checkpoint on disk: the rank of each weight, within a budget of bytes.

    Args:
        base: the checkpoint, of which the header is read, and the weights with `tuned`; quantised ones are what they
            stand for.
        kind: of the adapter.
        budget: as in `plan`.
        scores: as in `plan`.
        tuned: a fine-tuned checkpoint of the same names: σᵢ² of its difference to the base are the scores.
        targets: patterns of the checkpoint's own names, and classes and presets, as in `wrap`.
        exclude: patterns of weights to leave out.
        component: the part of a pipeline, as "unet".
        variant: of a folder's files.
        allow_pickle: read pickles, as data that runs nothing.
        **options: the adapter's own.

    Raises:
        OptionError: scores and tuned are both given, or as in `plan`.
        FileError: a file cannot be read, or `tuned` is of another model or not finite.
        UnsupportedLayerError: weights are quantised in a format that is not read.
        TargetError: a target matches nothing.
    """
    if scores is not None and tuned is not None:
        raise OptionError("scores and tuned were both given: one of them says what ranks are worth")
    opened = _opened(base, component, variant, allow_pickle)
    model = skeleton(opened)
    if tuned is not None:
        wanted = plan(model, "lora", targets=targets, exclude=exclude, rank=1).modules
        scores = _of_difference(opened, _opened(tuned, component, variant, allow_pickle), wanted)
    return plan(model, kind, targets=targets, exclude=exclude, budget=budget, scores=scores, **options)


def _opened(path: str | os.PathLike[str], component: str | None, variant: str | None, allow_pickle: bool) -> Base:
    opened = open_plain(path, variant=variant, allow_pickle=allow_pickle)
    return opened if component is None else opened.part(component)


def read_scores(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Return the scores that a JSON file has: {weight: [number, …]}, as `pk.training.gradient_energy` returns them.

    Raises:
        FileError: it cannot be read, or holds something else.
    """
    found = strict_json.read_json(Path(path))
    rows = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(row, list) and all(type(value) in (int, float) for value in row) for row in rows):
        raise FileError(f"{path} holds no scores: a JSON object was expected, with a list of numbers for each weight")
    return found


def _of_difference(base: Base, tuned: Base, weights: Sequence[str]) -> dict[str, list[float]]:
    """σᵢ² of tuned − base, the largest first, of each weight."""
    found: dict[str, list[float]] = {}
    for weight in weights:
        key = f"{weight}.weight"
        if key not in tuned.where or tuned.info(key).shape != base.info(key).shape:
            what = f"{tuned.info(key).shape}" if key in tuned.where else "not there"
            raise FileError(
                f"{tuned.path}: {key} is {what}, {base.info(key).shape} was expected: give one of the same model"
            )
        change = (_numbers(tuned, key) - _numbers(base, key)).flatten(1)
        gram = change @ change.mT if change.shape[0] <= change.shape[1] else change.mT @ change
        found[weight] = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)[:_MOST].tolist()
    return found


def _numbers(base: Base, key: str) -> Tensor:
    """A weight in float64."""
    tensor = base.tensor(key)
    if not tensor.is_floating_point():
        raise FileError(f"{base.path}: {key} is {tensor.dtype}, floating-point numbers were expected")
    found = tensor.double()
    if not bool(found.isfinite().all()):
        raise FileError(f"{base.path}: {key} has numbers that are not finite: give a checkpoint that is sound")
    return found
