"""peftkit's own format: a safetensors file whose header says everything a loader needs.

Tensors are keyed "<weight's name>.<parameter>", as `adapter_state_dict` gives them. The header's metadata has one
entry, "peftkit", a JSON object:

    schema       1
    version      of the library that wrote the file
    name         the adapter's name
    portable     whether factors derived from the base are in the file
    groups       [{kind, convention, options, weights: {name: [rows, channels, kernel, groups]}}]
    transposed   [names of the weights that are transposed convolutions'], where there are any
    base         {name: base64 of float32 samples of the base weight}
    training     whatever the user passed to `save`
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftkit.errors import FileError
from peftkit.geometry import Shape

SCHEMA = 1
KEY = "peftkit"

#: A base whose samples differ by more than this, relative to their norm, is another one; bf16 rounding is 0.002
SAME_BASE = 0.005


@dataclass(frozen=True)
class Record:
    """One weight's adapter, as the header describes it."""

    kind: str
    convention: str
    options: dict[str, Any]
    shape: Shape
    transposed: bool = False  # a transposed convolution, whose weight is kept as (in, out)


@dataclass(frozen=True)
class Header:
    """What the metadata of a native file says."""

    name: str
    records: dict[str, Record]
    base: dict[str, np.ndarray]  # weight -> float32 samples
    portable: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    version: str = ""


def encode(header: Header) -> dict[str, str]:
    """Header -> safetensors metadata."""
    groups: dict[str, dict[str, Any]] = {}
    for weight, record in header.records.items():
        described = {"kind": record.kind, "convention": record.convention, "options": record.options}
        group = groups.setdefault(json.dumps(described, sort_keys=True), {**described, "weights": {}})
        shape = record.shape
        group["weights"][weight] = [shape.rows, shape.channels, list(shape.kernel), shape.groups]
    value = {
        "schema": SCHEMA,
        "version": header.version,
        "name": header.name,
        "portable": header.portable,
        "groups": list(groups.values()),
        **(
            {"transposed": transposed} if (transposed := [w for w, r in header.records.items() if r.transposed]) else {}
        ),
        "base": {k: base64.b64encode(v.astype("<f4").tobytes()).decode() for k, v in header.base.items()},
        "training": header.training,
    }
    return {KEY: json.dumps(value, ensure_ascii=False)}


def decode(metadata: Mapping[str, str] | None, path: object) -> Header:
    """safetensors metadata -> Header. path: for the errors."""
    if not metadata or KEY not in metadata:
        raise FileError(f"{path} has no {KEY!r} entry in its header: peftkit did not write it")
    try:
        value = json.loads(metadata[KEY])
        if value["schema"] != SCHEMA:
            raise FileError(
                f"{path} has schema {value['schema']}, this version of peftkit reads {SCHEMA}: update peftkit"
            )
        records = {
            weight: Record(
                str(group["kind"]),
                str(group["convention"]),
                dict(group["options"]),
                Shape(int(rows), int(channels), tuple(int(k) for k in kernel), int(groups)),
                weight in value.get("transposed", ()),
            )
            for group in value["groups"]
            for weight, (rows, channels, kernel, groups) in group["weights"].items()
        }
        base = {
            weight: np.frombuffer(base64.b64decode(samples, validate=True), "<f4")
            for weight, samples in value["base"].items()
        }
        if not set(base) <= set(records):
            raise FileError(f"the {KEY!r} header of {path} is damaged: its fingerprints are not those of its weights")
        return Header(
            str(value["name"]), records, base, bool(value["portable"]), dict(value["training"]), str(value["version"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"the {KEY!r} header of {path} is damaged: {error!r}") from error


def sorted_by_weight(keys: Iterable[str], weights: Collection[str]) -> dict[str | None, list[str]]:
    """The keys of a file by the weight they belong to, the longest name that fits; None for those without one."""
    found: dict[str | None, list[str]] = {}
    for key in sorted(keys):
        parts = key.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        found.setdefault(next((owner for owner in owners if owner in weights), None), []).append(key)
    return found


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖ours − theirs‖ / ‖theirs‖ of two sets of samples; infinite where they cannot be compared."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    gap, norm = float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(theirs))
    if gap == 0:
        return 0.0
    return gap / norm if norm else float("inf")
