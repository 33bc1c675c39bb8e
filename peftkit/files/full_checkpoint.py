"""An adapter out of a full checkpoint, the state dict of a wrapped model, as Trainer or Lightning write it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftkit.errors import FullCheckpointError, MergeStateError, MismatchError, UnknownAdapterError, WrongBaseError
from peftkit.files.base import Base, open_base
from peftkit.files.bind import alike, shown
from peftkit.files.extras import listed
from peftkit.files.fingerprint import sample_index
from peftkit.files.formats import native
from peftkit.files.formats.state_dict import adapters_in, plain_key
from peftkit.files.load_report import LoadReport
from peftkit.wrapping.extras import BaseParameter, base_parameters
from peftkit.wrapping.in_common import distinct_state
from peftkit.wrapping.installed import adapted_modules, installed_adapters
from peftkit.wrapping.strength import set_strength
from peftkit.wrapping.walk import dotted

#: how many keys decide what a checkpoint puts before the names of the model
_ENOUGH = 20


@dataclass
class _Found:
    """What a checkpoint has for a model: tensors by where they go, and all that is amiss."""

    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of the model, of the checkpoint
    loaded: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)


def take(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None,
    *,
    strength: float,
    strict: bool,
    other_base: bool,
    allow_pickle: bool,
) -> LoadReport:
    """Fill in the tensors of an adapter that is on a model from a full checkpoint.

    Parameters of the model that require gradients beside the adapters are filled in too. Nothing is changed if anything
    raises.

    Args:
        model: wrapped as the model of the checkpoint was.
        path: the checkpoint.
        name: of the adapter, in the model and in the checkpoint; may be left out where the checkpoint has one.
        strength: λ of the adapter from then on.
        strict: raise unless every tensor of the adapter is in the checkpoint and fits.
        other_base: accept a model whose other parameters are not those of the checkpoint.
        allow_pickle: read pickles, as data.

    Raises:
        FullCheckpointError: the model has no such adapter.
        MismatchError: the adapter on the model is another one than that of the checkpoint.
        WrongBaseError: other parameters of the model differ from the checkpoint's.
        MergeStateError: the adapter is merged.
    """
    checkpoint = open_base(path, allow_pickle=allow_pickle)
    stored = {plain_key(key): key for key in checkpoint.where}
    name = _name(path, adapters_in(stored), name)
    adapters = _installed(model, path, name)
    prefix = _prefix(stored, [key for own in adapters.values() for key in own])
    found = _Found()
    for site, own in adapters.items():
        _find(found, checkpoint, stored, prefix, site, own)
    for own in base_parameters(model):
        _find_beside(found, checkpoint, stored.get(prefix + own.name), own)
    report = _report(found, name, _strangers(stored, prefix, name, adapters))
    if not report.loaded or (strict and not report.complete):
        raise MismatchError(
            f"{path}: the adapter {name!r} in it is not the one on this model: wrap with the same kind, targets and "
            f"options\n{report}"
        )
    _require_same_rest(path, found.distances, other_base)
    with torch.no_grad():
        for tensor, value in found.values:
            tensor.copy_(value)
    for at in installed_adapters(model, [name]):
        at.adapter.refresh_parts_()
    set_strength(model, strength, name)
    return report


# -- parts ----------------------------------------------------------------------------------------------------------


def _name(path: object, names: tuple[str, ...], asked: str | None) -> str:
    """The adapter to take."""
    if asked is None and len(names) > 1:
        raise UnknownAdapterError(f"{path} holds the adapters {', '.join(names)}: say which by name=")
    name = next(iter(names)) if asked is None else asked
    if name not in names:
        raise UnknownAdapterError(f"{path} holds no adapter {name!r}; there is {', '.join(names)}")
    return name


def _installed(model: nn.Module, path: object, name: str) -> dict[str, dict[str, Tensor]]:
    """Adapters of that name on the model -> their tensors, by the keys of a state dict."""
    hosts = {id(host): host_name for host_name, host in adapted_modules(model).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for at, own in distinct_state(installed_adapters(model, [name], every_place=True)):
        merged = at.host.adapter_state.merged
        if merged is not None and name in merged.names:
            raise MergeStateError(f"{name!r} is merged into {at.site or 'the model'}: restore(model) before loading it")
        before = dotted(hosts[id(at.host)], at.key)
        found[at.site] = {f"{before}.{key}": tensor for key, tensor in own.items()}
    if not found:
        raise FullCheckpointError(
            f"{path} is a full checkpoint of a model with the adapter {name!r}, which says neither its kind nor its "
            f"options, and this model has no adapter of that name: call wrap(model, …, name={name!r}) as for the "
            "training, then load(model, …) again; save(model, …) writes the adapter alone"
        )
    return found


def _prefix(stored: Mapping[str, str], expected: Iterable[str]) -> str:
    """What the checkpoint puts before the names of this model, such as "model." of Lightning."""
    counts: Counter[str] = Counter()
    for _, key in zip(range(_ENOUGH), expected, strict=False):
        counts.update(other[: -len(key)] for other in stored if other == key or other.endswith(f".{key}"))
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _find(
    found: _Found, checkpoint: Base, stored: Mapping[str, str], prefix: str, site: str, own: Mapping[str, Tensor]
) -> None:
    """The tensors of one adapter, which is taken whole or not at all."""
    lost = [key for key in own if prefix + key not in stored]
    found.missing += lost
    values = {key: checkpoint.tensor(stored[prefix + key]) for key in own if key not in lost}
    unlike = [key for key, value in values.items() if not alike(value, own[key])]
    found.mismatched += [f"{key}: {shown(values[key])} in the file, {shown(own[key])} expected" for key in unlike]
    endless = [k for k, v in values.items() if k not in unlike and not torch.isfinite(v.to(own[k].dtype)).all()]
    found.non_finite += endless
    if not (lost or unlike or endless):
        found.values += [(own[key], value) for key, value in values.items()]
        found.loaded.append(site)


def _find_beside(found: _Found, checkpoint: Base, key: str | None, own: BaseParameter) -> None:
    """A parameter of the model itself: its value where it trains, how far it is from the checkpoint's where not."""
    parameter = own.tensor.detach()
    if key is None:
        found.missing += [own.name] if own.tensor.requires_grad else []
    elif not own.tensor.requires_grad:
        if checkpoint.info(key).shape != tuple(parameter.shape):
            found.mismatched.append(f"{own.name}: {checkpoint.info(key)} in the file, {shown(parameter)} in the model")
        elif parameter.is_floating_point() and parameter.numel():
            index = sample_index(parameter.numel())
            ours = parameter.flatten()[index.to(parameter.device)].float().cpu().numpy()
            theirs = checkpoint.elements(key, index.tolist()).float().numpy()
            found.distances[own.name] = native.distance(ours, theirs)
    else:
        value = checkpoint.tensor(key)
        if not alike(value, parameter):
            found.mismatched.append(f"{own.name}: {shown(value)} in the file, {shown(parameter)} in the model")
        elif not torch.isfinite(value.to(parameter.dtype)).all():
            found.non_finite.append(own.name)
        else:
            found.values.append((parameter, value))
            found.extras.append(own.name)


def _strangers(
    stored: Mapping[str, str], prefix: str, name: str, adapters: Mapping[str, Mapping[str, Tensor]]
) -> tuple[str, ...]:
    """The tensors of that adapter in the checkpoint that the model has no place for."""
    known = {prefix + key for own in adapters.values() for key in own}
    return tuple(key for key in stored if adapters_in([key]) == (name,) and key not in known)


def _report(found: _Found, name: str, strangers: tuple[str, ...]) -> LoadReport:
    return LoadReport(
        name,
        tuple(found.loaded),
        tuple(found.missing),
        tuple(f"{key}: the model has no such adapter" for key in strangers),
        tuple(found.mismatched),
        tuple(found.non_finite),
        max(found.distances.values(), default=0.0),
        tuple(found.extras),
    )


def _require_same_rest(path: object, distances: Mapping[str, float], other_base: bool) -> None:
    """Raise WrongBaseError if frozen parameters of the model are not what they are in the checkpoint."""
    far = [name for name, distance in distances.items() if distance > native.SAME_BASE]
    if far and not other_base:
        raise WrongBaseError(
            f"{path} and this model differ in {listed(far)} of no adapter. What trained beside the adapters is loaded "
            "where it is trainable, by requires_grad_(True); for another base on purpose, pass other_base=True"
        )
