"""peftkit's own format: a safetensors file whose header says everything a loader needs.

Tensors are keyed "<weight's name>.<parameter>", as `adapter_state_dict` gives them. The header's metadata has one
entry, "peftkit", a JSON object:

    schema       1; 2 with `common`, which a reader of 1 would miss
    version      of the library that wrote the file
    name         the adapter's name
    portable     whether factors derived from the base are in the file
    groups       [{kind, convention, options, weights: {name: [rows, channels, kernel, groups]}}]
    transposed   [names of the weights kept as (in, out): of transposed convolutions and Conv1D], where there are any
    read         [names of the weights that are adapted where other code reads them], where there are any
    embedding    [names of the weights that are embeddings', a row for each token], where there are any
    shared       {name of a further weight: [name of the weight whose adapter it shares, whether it is an embedding's]},
                 where there are any
    common       {key of a tensor: [keys that adapters know it by, "<weight's name>.<parameter>"]}, of parameters that
                 several adapters share, in schema 2
    base         {name: base64 of float32 samples of the base weight}
    training     whatever the user passed to `save`
    extras       [names of parameters of the model that trained beside the adapters], where there are any; their
                 tensors are keyed by these names
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats import strict_json
from peftkit.geometry import Shape

SCHEMA = 1
#: of files with tensors that several adapters share
SCHEMA_COMMON = 2
KEY = "peftkit"

#: what a header says of a weight by listing its name
_MARKS = ("transposed", "read", "embedding", "quantised")

#: so many entries no memory can hold, and no index can count
_UNCOUNTABLE = 2**62

#: A base whose samples differ by more than this, relative to their norm, is another one; bf16 rounding is 0.002
SAME_BASE = 0.005
#: likewise where one of the two is quantised: at 4 bits they differ by 0.06 to 0.12, and two models by more than 1
SAME_QUANTISED = 0.3
#: how many entries of a weight tell it from another
_SAMPLES = 32


@dataclass(frozen=True)
class WeightRecord:
    """One weight's adapter, as the header describes it."""

    kind: str
    convention: str
    options: dict[str, Any]
    shape: Shape
    transposed: bool = False  # its weight is kept as (in, out)
    read: bool = False  # adapted where other code reads the weight, and not where the layer is called
    embedding: bool = False  # an embedding's, a row for each token
    quantised: bool = False  # trained on a quantised weight, whose numbers are not quite those of the original


@dataclass(frozen=True)
class Header:
    """What the metadata of a native file says."""

    name: str
    records: dict[str, WeightRecord]
    base: dict[str, np.ndarray]  # weight -> float32 samples
    portable: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    extras: tuple[str, ...] = ()  # the parameters of the model whose values are in the file
    #: weight -> the weight with the record of its adapter, and whether it is an embedding's
    shared: dict[str, tuple[str, bool]] = field(default_factory=dict)
    #: key of a tensor -> the keys "<weight>.<parameter>" that it stands for, of parameters that several adapters share
    common: dict[str, list[str]] = field(default_factory=dict)


def encode(header: Header) -> dict[str, str]:
    """Return the metadata of a safetensors file with this header."""
    groups: dict[str, dict[str, Any]] = {}
    for weight, record in header.records.items():
        described = {"kind": record.kind, "convention": record.convention, "options": record.options}
        group = groups.setdefault(json.dumps(described, sort_keys=True), {**described, "weights": {}})
        shape = record.shape
        group["weights"][weight] = [shape.rows, shape.channels, list(shape.kernel), shape.groups]
    value = {
        "schema": SCHEMA_COMMON if header.common else SCHEMA,
        "version": header.version,
        "name": header.name,
        "portable": header.portable,
        "groups": list(groups.values()),
        **{mark: marked for mark in _MARKS if (marked := [w for w, r in header.records.items() if getattr(r, mark)])},
        "base": {k: base64.b64encode(v.astype("<f4").tobytes()).decode() for k, v in header.base.items()},
        "training": header.training,
        **({"extras": list(header.extras)} if header.extras else {}),
        **({"shared": header.shared} if header.shared else {}),
        **({"common": header.common} if header.common else {}),
    }
    return {KEY: json.dumps(value, ensure_ascii=False)}


def decode(metadata: Mapping[str, str] | None, path: object) -> Header:
    """Read the metadata of a safetensors file.

    Args:
        metadata: the entries of the container.
        path: of the file, for errors.

    Raises:
        FileError: if peftkit did not write it, if another version did, or if it is damaged.
    """
    if not metadata or KEY not in metadata:
        raise FileError(f"{path} has no {KEY!r} entry in its header: peftkit did not write it")
    where = f"the {KEY!r} header of {path}"
    value = strict_json.parse(metadata[KEY], where)
    require_file(isinstance(value, dict), where, "it is damaged, and no JSON object")
    if value.get("schema") not in (SCHEMA, SCHEMA_COMMON):
        raise FileError(
            f"{path} has schema {value.get('schema')!r}, this version of peftkit reads {SCHEMA} and {SCHEMA_COMMON}: "
            "update peftkit"
        )

    def take(holder: dict[str, Any], key: str, kind: type[Any]) -> Any:
        found = holder.get(key)
        expected = f"a {kind.__name__} was expected: it is damaged"
        require_file(isinstance(found, kind), where, f"{key} is {found!r:.60}, {expected}")
        return found

    marked = {mark: set(map(str, take(value, mark, list))) for mark in _MARKS if mark in value}
    records: dict[str, WeightRecord] = {}
    for group in take(value, "groups", list):
        require_file(isinstance(group, dict), where, f"it is damaged: {group!r:.60} is no group of weights")
        kind, convention = take(group, "kind", str), take(group, "convention", str)
        options = take(group, "options", dict)
        for weight, described in take(group, "weights", dict).items():
            require_file(weight not in records, where, f"it is damaged: {weight} is in it twice")
            marks = {mark: weight in names for mark, names in marked.items()}
            records[weight] = WeightRecord(kind, convention, options, _shape(described, where), **marks)
    base = {weight: _samples(text, where) for weight, text in take(value, "base", dict).items()}
    strangers = sorted({*base}.union(*marked.values()) - set(records))
    listed = ", ".join(strangers[:3])
    require_file(not strangers, where, f"it is damaged: it says something of {listed}, which has no adapter in it")
    name, portable, training = take(value, "name", str), take(value, "portable", bool), take(value, "training", dict)
    extras = take(value, "extras", list) if "extras" in value else []
    named = all(isinstance(extra, str) for extra in extras) and len(set(map(str, extras))) == len(extras)
    require_file(named, where, f"it is damaged: extras is {extras!r:.60}, a list of names was expected, each once")
    shared = (
        {k: _sharing(v, records, where) for k, v in take(value, "shared", dict).items()} if "shared" in value else {}
    )
    twice = next((name for name in shared if name in records), "")
    require_file(not twice, where, f"it is damaged: {twice} has an adapter of its own, and shares another's")
    common = _common(take(value, "common", dict), records, where) if value["schema"] == SCHEMA_COMMON else {}
    return Header(name, records, base, portable, training, take(value, "version", str), tuple(extras), shared, common)


def _common(described: dict[str, Any], records: Collection[str], where: str) -> dict[str, list[str]]:
    """{key: [keys that it stands for]}."""
    sound = all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in described.values())
    require_file(sound and bool(described), where, f"it is damaged: common is {described!r:.60}")
    every = [key for keys in described.values() for key in keys]
    require_file(len(set(every)) == len(every), where, "it is damaged: common names a parameter twice")
    strangers = sorted_by_weight(every, records).get(None, ())
    require_file(not strangers, where, f"it is damaged: common names {strangers}, of which no adapter is in it")
    return described


def _sharing(described: Any, records: Collection[str], where: str) -> tuple[str, bool]:
    """[name, whether an embedding's]."""
    sound = isinstance(described, list) and [type(part) for part in described] == [str, bool]
    require_file(sound and described[0] in records, where, f"it is damaged: nothing is shared as {described!r:.60}")
    return described[0], described[1]


def _shape(described: Any, where: str) -> Shape:
    """[rows, channels, kernel, groups]."""
    if isinstance(described, list) and len(described) == 4 and isinstance(described[2], list):
        rows, channels, kernel, groups = described
        sizes = [rows, channels, groups, *kernel]
        sound = all(type(size) is int and 0 < size < 2**31 for size in sizes) and len(kernel) <= 3
        if sound and rows * channels * math.prod(kernel) < _UNCOUNTABLE and rows % groups == 0:
            return Shape(rows, channels, tuple(kernel), groups)
    raise FileError(f"{where} is damaged: {described!r:.60} are no [rows, channels, kernel, groups] of a weight")


def _samples(text: Any, where: str) -> np.ndarray:
    try:
        samples = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (TypeError, ValueError) as error:
        raise FileError(f"{where} is damaged: a fingerprint is no base64 of float32: {error}") from None
    require_file(bool(np.isfinite(samples).all()), where, "it is damaged: a fingerprint is not finite")
    return samples


def sorted_by_weight(keys: Iterable[str], weights: Collection[str]) -> dict[str | None, list[str]]:
    """Sort the keys of a file by the weight they belong to, the longest name that fits; under None without one."""
    found: dict[str | None, list[str]] = {}
    depth = max((weight.count(".") + 1 for weight in weights), default=0)
    for key in sorted(keys):
        parts = key.split(".")
        owners = (".".join(parts[:end]) for end in range(min(len(parts) - 1, depth), -1, -1))
        found.setdefault(next((owner for owner in owners if owner in weights), None), []).append(key)
    return found


def sample_index(size: int) -> Tensor:
    """Return where a fingerprint looks in a weight of that many entries, row by row."""
    return torch.linspace(0, size - 1, _SAMPLES, dtype=torch.float64).long()


def samples(weight: Tensor) -> np.ndarray:
    """Return the fingerprint of W (m, n): entries spread evenly over it, in float32."""
    index = sample_index(weight.numel()).to(weight.device)
    return weight.detach()[index // weight.shape[1], index % weight.shape[1]].float().cpu().numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return ‖ours − theirs‖ / ‖theirs‖ of two sets of samples; infinite where they cannot be compared."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    gap, norm = float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(theirs))
    if gap == 0:
        return 0.0
    return gap / norm if norm else float("inf")
