"""Adapters of a model to a file and back. Files are proven alive before they take their name."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftkit import registry
from peftkit._version import __version__
from peftkit.adapter import Adapter
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
from peftkit.sites import Site, sites
from peftkit.wrap import adapters, install, one_name

_SAMPLES = 16


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
    if path.suffix != ".safetensors":
        raise FileError(f"{path}: a native file is called *.safetensors, {path.suffix or 'no suffix'!r} was given")
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype} was given, a floating point dtype was expected")
    name = one_name(model, name)
    own: dict[str, tuple[Adapter, Tensor]] = {}
    for site, _, adapter, host, slot in adapters(model, name):
        weight = slot.of(cast(Tensor, host._parameters[slot.parameter])).detach()
        if host.adaptation.merged is not None:
            slot_name = next(n for n, s in host.adaptation.slots.items() if s is slot)
            weight = host.adaptation.merged.original(slot_name, weight)
        own[site] = adapter, slot.geometry.matrix(weight)
    tensors = {
        _key(site, key): _packed(tensor, dtype)
        for site, (adapter, _) in own.items()
        for key, tensor in {**adapter.state_dict(), **(adapter.derived() if portable else {})}.items()
    }
    shapes = {site.name: site.slot.geometry.shape for site in sites(model).values()}
    header = Header(
        name=name,
        records={
            site: Record(adapter.kind, adapter.convention, adapter.options, shapes[site])
            for site, (adapter, _) in own.items()
        },
        base={site: _samples(weight) for site, (_, weight) in own.items()},
        portable=portable,
        training=dict(training or {}),
        version=__version__,
    )
    try:
        metadata = native.encode(header)
    except TypeError as error:
        raise OptionError(f"training={training!r} was given, facts that JSON can hold were expected: {error}") from None
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
    header, tensors = _read(path)
    name = header.name if name is None else name
    ours = sites(model)
    missing: list[str] = []
    unexpected: list[str] = []
    mismatched: list[str] = []
    non_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    left = set(tensors)
    built: list[tuple[Site, Adapter]] = []
    distances: dict[str, float] = {}
    for site_name, record in header.records.items():
        keys = {key for key in left if key.startswith(f"{site_name}.") or not site_name}
        site = ours.get(site_name)
        if site is None:
            hint = near(site_name, ours)
            unexpected += [f"{key}: the model has no weight {site_name!r}.{hint}" for key in sorted(keys)]
            left -= keys
            continue
        if site.slot.geometry.shape != record.shape:
            mismatched.append(
                f"{site_name}: the file adapts a {record.shape} weight, the model's is {site.slot.geometry.shape}"
            )
            left -= keys
            continue
        adapter = _rebuild(record, site, path)
        wanted = {**adapter.state_dict(), **(adapter.derived() if header.portable else {})}
        wanted = {_key(site_name, key): tensor for key, tensor in wanted.items()}
        lacking = [key for key in wanted if key not in tensors]
        wrong = [
            f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(t.shape)} expected"
            for key, t in wanted.items()
            if key in tensors and tensors[key].shape != t.shape
        ]
        left -= set(wanted)
        missing += lacking
        mismatched += wrong
        if lacking or wrong or any(key in non_finite for key in wanted):
            continue
        if site_name in header.base:
            distances[site_name] = native.distance(_samples(site.matrix), header.base[site_name])
        _fill(adapter, site.matrix, {key: tensors[_key(site_name, key)] for key in _own_keys(adapter, header.portable)})
        built.append((site, adapter))
    unexpected += sorted(f"{key}: no adapter in the header has it.{near(key, ours)}" for key in left)
    furthest = max(distances.values(), default=0.0)
    report = LoadReport(
        name,
        tuple(site.name for site, _ in built),
        tuple(missing),
        tuple(unexpected),
        tuple(mismatched),
        tuple(non_finite),
        furthest,
    )
    if strict and not report.complete:
        raise MismatchError(f"{path} does not fit this model\n{report}")
    if not built:
        raise MismatchError(f"nothing in {path} fits this model\n{report}")
    _check_base(path, distances, built, header.portable, other_base)
    targeted = [site for site, _ in built]
    refuse_taken(targeted, name)
    shared = tied_with(model, targeted)
    if shared and tied != "untie":
        site, other = next(iter(shared.items()))
        raise TiedWeightsError(f"{site} shares its weight with {other}: pass tied='untie' to give it its own copy")
    install(model, built, name, strength=strength, route=route, untie=set(shared))
    return report


# -- parts ----------------------------------------------------------------------------------------------------------


def _key(site: str, key: str) -> str:
    return f"{site}.{key}" if site else key


def _own_keys(adapter: Adapter, portable: bool) -> list[str]:
    return [*adapter.state_dict(), *(adapter.derived() if portable else ())]


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
    derived = adapter.derived()
    adapter.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in derived})
    given = {key: tensor for key, tensor in tensors.items() if key in derived}
    if given:
        for key, tensor in given.items():
            derived[key].copy_(tensor)
    else:
        adapter.rebase_(weight)


def _rebuild(record: Record, site: Site, path: object) -> Adapter:
    try:
        adapter = registry.build(record.kind, record.shape, site.matrix.detach(), None, **record.options)
    except (OptionError, UnknownAdapterError, TypeError) as error:
        raise FileError(f"{path}: {site.name}: {error}") from error
    if adapter.convention != record.convention:
        raise FileError(
            f"{path}: {site.name} was written under the convention {record.convention!r}, "
            f"{record.kind} is now {adapter.convention!r}: the numbers would mean something else"
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
            f"{path} is not a safetensors file, or is damaged ({error}); other files are never unpickled"
        ) from error


def _check_base(
    path: object, distances: Mapping[str, float], built: list[tuple[Site, Adapter]], portable: bool, other_base: bool
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
        f"{path} was trained on another base: {len(far)} of {len(distances)} weights differ, most of all {worst} "
        f"by {100 * far[worst]:.3g} %. On another base, {means}.{advice}"
    )


def _prove_alive(
    temporary: Path,
    path: Path,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, tuple[Adapter, Tensor]],
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
        for site, (adapter, weight) in own.items():
            if allow_zero:
                break
            twin = copy.deepcopy(adapter).eval()
            keys = _own_keys(twin, header.portable)
            _fill(twin, weight, {key: back[_key(site, key)].to(weight.device) for key in keys})
            if twin(weight, 1.0).sqnorm() > 0:
                return
    if not allow_zero:
        raise FileError(
            f"{path}: every ΔW is zero in the file, so loading it would do nothing; nothing was saved. "
            "Train the adapter first, save in a wider dtype, or pass allow_zero=True"
        )


def _cast_hint(tensor: Tensor) -> str:
    return f" as {tensor.dtype}" if tensor.dtype == torch.float16 else ""


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
