"""Adapters of a model to a file and back. Files are proven alive before they take their name."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftkit import registry
from peftkit._version import __version__
from peftkit.adapted import Placed, one_name, placed
from peftkit.adapter import Adapter, require_dtype
from peftkit.errors import (
    FileError,
    MismatchError,
    OptionError,
    TiedWeightsError,
    UnknownAdapterError,
    WrongBaseError,
    near,
)
from peftkit.formats import native
from peftkit.formats.native import Header, Record
from peftkit.plan import refuse_taken, tied_with
from peftkit.sites import Site, dotted, sites
from peftkit.wrap import check_install, install, require_strength

_SAMPLES = 32


@dataclass(frozen=True)
class LoadReport:
    """What a file and a model had to say to each other. str(report) lists it."""

    name: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()
    base_distance: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every key of the file went to the model and every parameter came from the file."""
        return not (self.missing or self.unexpected or self.mismatched or self.non_finite)

    def __str__(self) -> str:
        lines = [f"adapter {self.name!r}: {len(self.loaded)} weights loaded"]
        for title in ("missing", "unexpected", "mismatched", "non_finite"):
            items = getattr(self, title)
            if items:
                lines.append(f"{title.replace('_', '-')} ({len(items)}):")
                lines += [f"  {item}" for item in items[:8]] + (["  …"] if len(items) > 8 else [])
        return "\n".join(lines)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    training: Mapping[str, Any] | None = None,
    allow_zero: bool = False,
) -> Path:
    """Write one adapter to a safetensors file that `load` needs nothing else to read.

    name: which adapter, where there are several. dtype: of its matrices; vectors and scalars keep theirs.
    portable: also write what is derived from the base (LoLDU's factors), so that the file fits any base.
    training: JSON-able facts to keep in the header.

    The file is written under another name, read back, and moved into place only if every tensor is there, finite,
    and at least one ΔW is not zero after the cast (unless allow_zero). On failure nothing is left behind.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise FileError(f"{path}: a native file is called *.safetensors, {path.suffix or 'no suffix'!r} was given")
    if not path.parent.is_dir():
        raise FileError(f"there is no folder {path.parent} to write {path.name} in")
    require_dtype(dtype)
    name = one_name(model, name)
    own = {at.site: at for at in placed(model, [name])}
    tensors: dict[str, Tensor] = {}
    for site, at in own.items():
        for key in _stored_keys(at.adapter, portable):
            full = dotted(site, key)
            if full in tensors:
                raise FileError(f"two adapters of {name!r} would be saved under the key {full!r}: give them two names")
            tensors[full] = _packed(at.adapter.state_dict()[key], dtype)
    header = Header(
        name=name,
        records={
            site: Record(at.adapter.kind, at.adapter.convention, at.adapter.options, at.slot.geometry.shape)
            for site, at in own.items()
        },
        base={site: _samples(at.base) for site, at in own.items()},
        portable=portable,
        training=dict(training or {}),
        version=__version__,
    )
    try:
        metadata = native.encode(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"training={training!r:.200} was given, facts that JSON can hold were expected: {error}"
        ) from None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        _prove_alive(temporary, path, tensors, own, allow_zero)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    strength: float = 1.0,
    strict: bool = True,
    other_base: bool = False,
    tied: str | None = None,
    route: str = "auto",
) -> LoadReport:
    """Wrap the model as the file says and fill in its tensors.

    name: to give the adapter; by default the one it was saved under. strict: raise unless every key of the file
    goes to the model and every parameter comes from the file; with strict=False load the weights that fit whole, and
    read the report. other_base: accept a base other than the one the file was trained on. tied: as in `wrap`.
    Nothing is changed if anything raises. Never unpickles.

    Raises FileError, MismatchError, WrongBaseError.
    """
    if tied not in (None, "untie"):
        raise OptionError(f"tied={tied!r} was given, 'untie' or None was expected")
    require_strength(strength)
    header, tensors = _read(path)
    name = header.name if name is None else name
    fitting, distances, report = _compare(path, name, header, tensors, sites(model))
    if strict and not report.complete:
        raise MismatchError(f"{path} does not fit this model\n{report}")
    if not fitting:
        raise MismatchError(f"nothing in {path} fits this model\n{report}")
    targeted = [site for site, _ in fitting]
    refuse_taken(targeted, name)
    check_install(targeted, strength, route)
    shared = tied_with(model, targeted)
    if shared and tied is None:
        site_name, other = next(iter(shared.items()))
        raise TiedWeightsError(f"{site_name} shares its weight with {other}: pass tied='untie' to give it its own copy")
    built: list[tuple[Site, Adapter]] = []
    for site, record in fitting:
        weight = site.matrix.detach()
        adapter = _rebuild(record, weight, f"{path}: {site.label}")
        keys = _stored_keys(adapter, header.portable)
        _fill(adapter, weight, {key: tensors[dotted(site.name, key)] for key in keys})
        built.append((site, adapter))
    _check_base(path, distances, built, header.portable, other_base)
    install(model, built, name, strength=strength, route=route, untie=set(shared))
    return report


# -- parts ----------------------------------------------------------------------------------------------------------


def _compare(
    path: object, name: str, header: Header, tensors: Mapping[str, Tensor], ours: Mapping[str, Site]
) -> tuple[list[tuple[Site, Record]], dict[str, float], LoadReport]:
    """The weights whose adapters fit whole, how far each is from the file's base, and the report on all of them."""
    missing: list[str] = []
    unexpected: list[str] = []
    mismatched: list[str] = []
    non_finite: list[str] = []
    fitting: list[tuple[Site, Record]] = []
    keys_of = _sorted_by_site(tensors, header.records)
    for site_name, record in header.records.items():
        site, keys = ours.get(site_name), keys_of.get(site_name, [])
        if site is None:
            hint = near(site_name, ours)
            unexpected += [f"{key}: the model has no weight {site_name!r}.{hint}" for key in keys or [site_name]]
            continue
        shape = site.slot.geometry.shape
        if shape != record.shape:
            mismatched.append(f"{site.label}: the file adapts a {record.shape} weight, the model's is {shape}")
            continue
        # Built without memory first: a header is free to ask for any rank
        sketch = _rebuild(record, site.matrix.to("meta"), f"{path}: {site.label}")
        expected = {dotted(site_name, key): sketch.state_dict()[key] for key in _stored_keys(sketch, header.portable)}
        both = [(key, tensors[key], t) for key, t in expected.items() if key in tensors]
        lacking = [key for key in expected if key not in tensors]
        wrong = [f"{key}: {_shown(t)} in the file, {_shown(e)} expected" for key, t, e in both if not _fits(t, e)]
        broken = [key for key, t, e in both if not torch.isfinite(t.to(e.dtype)).all()]
        missing += lacking
        mismatched += wrong
        non_finite += broken
        unexpected += [f"{key}: {record.kind} has no such parameter here" for key in keys if key not in expected]
        if not (lacking or wrong or broken):
            fitting.append((site, record))
    unexpected += [f"{key}: no adapter in the header has it.{near(key, ours)}" for key in keys_of.get(None, [])]
    distances = {
        site.name: native.distance(_samples(site.matrix.detach()), header.base[site.name]) for site, _ in fitting
    }
    loaded = tuple(site.name for site, _ in fitting)
    problems = (tuple(missing), tuple(unexpected), tuple(mismatched), tuple(non_finite))
    return fitting, distances, LoadReport(name, loaded, *problems, max(distances.values(), default=0.0))


def _stored_keys(adapter: Adapter, portable: bool) -> list[str]:
    """The tensors a file holds: all of the adapter's, without what its base can give again unless portable."""
    derived = adapter.derived()
    return [key for key in adapter.state_dict() if portable or key not in derived]


def _sorted_by_site(tensors: Mapping[str, Tensor], records: Mapping[str, Record]) -> dict[str | None, list[str]]:
    """The keys of a file by the weight they belong to, the longest name that fits; None for those without one."""
    found: dict[str | None, list[str]] = {}
    for key in sorted(tensors):
        parts = key.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        found.setdefault(next((owner for owner in owners if owner in records), None), []).append(key)
    return found


def _fits(ours: Tensor, expected: Tensor) -> bool:
    return ours.shape == expected.shape and ours.is_floating_point() == expected.is_floating_point()


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} {tensor.dtype}"


def _packed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous CPU copy, its matrices cast; vectors and scalars are few, and their differences are what counts."""
    cast_to = dtype if dtype is not None and tensor.is_floating_point() and tensor.dim() >= 2 else tensor.dtype
    return tensor.detach().to("cpu", cast_to, copy=True).contiguous()


def _samples(weight: Tensor) -> np.ndarray:
    """Entries of W (m, n) spread evenly over it, in float32: a fingerprint that survives a cast."""
    index = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(weight.device)
    return weight.detach()[index // weight.shape[1], index % weight.shape[1]].float().cpu().numpy()


def _fill(adapter: Adapter, weight: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's tensors into an adapter, and derive from W what the file does not hold."""
    adapter.load_state_dict({**adapter.state_dict(), **tensors})
    if not set(adapter.derived()) <= set(tensors):
        adapter.rebase_(weight)


def _rebuild(record: Record, weight: Tensor, where: str) -> Adapter:
    """A fresh adapter as the header describes it. weight: W (m, n)."""
    try:
        adapter = registry.build(record.kind, record.shape, weight, None, **record.options)
    except (OptionError, UnknownAdapterError, TypeError) as error:
        raise FileError(f"{where}: {error}") from error
    if adapter.convention != record.convention:
        raise FileError(
            f"{where} was written under the convention {record.convention!r}, {record.kind} is now "
            f"{adapter.convention!r}: the numbers would mean something else"
        )
    return adapter


def _read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = native.decode(file.metadata(), path)
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileError(
            f"{path} is not a safetensors file, or is damaged ({error}); others are never unpickled"
        ) from error


def _check_base(
    path: object,
    distances: Mapping[str, float],
    built: Sequence[tuple[Site, Adapter]],
    portable: bool,
    other_base: bool,
) -> None:
    far = {site: d for site, d in distances.items() if d > native.SAME_BASE}
    if not far:
        return
    strangers = [adapter for site, adapter in built if site.name in far]
    bound = [a for a in strangers if a.derived() and not portable]
    if other_base and not bound:
        return
    worst = max(far, key=lambda site: far[site])
    kinds = {a.kind: a.on_another_base for a in (bound if other_base else strangers)}
    means = "; ".join(f"{kind} {meaning}" for kind, meaning in kinds.items())
    advice = "" if bound else " To use it here on purpose, pass other_base=True."
    raise WrongBaseError(
        f"{path} was trained on another base: {len(far)} of {len(distances)} weights differ, most of all "
        f"{worst or 'its own'} by {100 * far[worst]:.3g} %. On another base, {means}.{advice}"
    )


def _prove_alive(
    temporary: Path,
    path: Path,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Placed],
    allow_zero: bool,
) -> None:
    """Read the file back as a loader would and make sure it holds what was meant."""
    header, back = _read(temporary)
    if set(back) != set(tensors) or len(back) != len(tensors):
        raise FileError(f"{path}: {len(back)} tensors were read back, {len(tensors)} were written")
    for key, tensor in back.items():
        if not torch.isfinite(tensor).all():
            raise FileError(f"{path}: {key} is not finite{_cast_hint(tensors[key])}; nothing was saved")
    with torch.no_grad():
        for site, at in own.items():
            twin, weight = copy.deepcopy(at.adapter).eval(), at.base
            keys = _stored_keys(twin, header.portable)
            _fill(twin, weight, {key: back[dotted(site, key)].to(weight.device) for key in keys})
            if allow_zero or twin(weight, 1.0).sqnorm() > 0:
                return
    raise FileError(
        f"{path}: every ΔW is zero in the file, so loading it would do nothing; nothing was saved. "
        "Train the adapter first, save in a wider dtype, or pass allow_zero=True"
    )


def _cast_hint(tensor: Tensor) -> str:
    return f" as {tensor.dtype}" if tensor.dtype == torch.float16 else ""


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
