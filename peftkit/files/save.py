"""Adapters of a model into a file, proven alive before it takes its name."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftkit._version import __version__
from peftkit.adapters.options import require_dtype
from peftkit.errors import FileError, LeftOutWarning, OptionError, require_file
from peftkit.files import hub
from peftkit.files.bind import fill, stored_keys
from peftkit.files.extras import listed
from peftkit.files.fingerprint import samples
from peftkit.files.formats import container, disk, native
from peftkit.files.formats.native import Header, WeightRecord
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.divided import by_first_process, gathered, gathered_adapter, gathered_base, require_not_empty
from peftkit.wrapping.extras import BaseParameter, extras_of, require_unmerged
from peftkit.wrapping.in_common import places
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, one_name, other_places
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.roll import require_none_lost
from peftkit.wrapping.walk import dotted


@of_models
@by_first_process
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    training: Mapping[str, Any] | None = None,
    allow_zero: bool = False,
    overwrite: bool | None = None,
    extras: bool = True,
    push: str | None = None,
    card: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write one adapter to a safetensors file that `load` needs nothing else to read.

    The file holds the adapter at strength 1, whatever λ it has on the model; `load` takes one of its own.

    What trained is what is saved: parameters of the model that require gradients beside the adapters (a head, norms,
    biases, new embeddings) go into the file as they are now, each once. Buffers, such as the running statistics of
    BatchNorm, are no parameters and do not.

    The file is written under another name, read back, and moved into place only if it holds what was meant. On failure
    nothing is left behind.

    A model that fully_shard divides is saved by all processes together: each calls this, the first writes the file, and
    all return or raise as it does.

    Args:
        model: a wrapped model.
        path: the *.safetensors file to write.
        name: which adapter, where there are several.
        dtype: of the matrices; vectors and scalars keep theirs.
        portable: also write what is derived from the base (LoLDU's factors), so that the file fits any base.
        training: JSON-able facts to keep in the header.
        allow_zero: write an adapter of which every ΔW is zero.
        overwrite: False refuses a file that is there, which is replaced by default.
        extras: False leaves out the parameters that train beside the adapters, with a LeftOutWarning that names them.
        push: "owner/name" of a repository on the Hugging Face hub, to which the file is uploaded as well with a card
            that lists what is adapted; it is created where there is none.
        card: entries of the card's metadata, such as license, base_model, tags and language.

    Returns:
        The path.

    Raises:
        FileError: a path that cannot be written, a tensor that is not finite in the dtype, every ΔW zero there, or a
            hub that does not take the file.
        OptionError: a dtype that adapters are not kept in, facts that JSON does not hold, or no name of a repository.
        UnknownAdapterError: no adapter of that name, or several and no name.
        MergeStateError: an adapter is merged into a weight that trains beside it.
        SharedParameterError: a parameter that adapters share has become several.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> pk.save(model, "style.safetensors").name
        'style.safetensors'
    """
    path = Path(path)
    container.require_name(path, "a native file")
    disk.require_output(path, overwrite=overwrite)
    require_dtype(dtype)
    if push is not None:
        hub.require_repository(push)
    if card and push is None:
        raise OptionError("card= was given, which goes with push= to a repository of the hub: give both")
    name = one_name(model, name)
    require_not_empty(model)
    require_none_lost(model)
    own = {at.site: at for at in installed_adapters(model, [name])}
    for at in own.values():
        at.require_values()
    shared = places(own.values())
    own = {site: replace(at, adapter=gathered_adapter(at.adapter)) for site, at in own.items()}
    beside = _beside(model, path, extras)
    _require_derivable(path, own, beside, portable)
    once = _stored_once(own, beside, shared.values())
    tensors = _tensors(own, beside, name, dtype, portable, once)
    metadata = _metadata(own, beside, name, portable, training, other_places(model, name), once)
    with disk.atomic(path) as file:
        container.emit(file, tensors, metadata)
        file.flush()
        _prove_alive(Path(file.name), path, tensors, own, allow_zero, portable, once)
    if push is not None:
        hub.push(path, push, _card(push, own, beside, {"base_model": _base_name(model), **card}))
    return path


def _base_name(model: nn.Module) -> str | None:
    """The name that a model of transformers or diffusers was loaded by, None where it has none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _card(
    repository: str,
    own: Mapping[str, InstalledAdapter],
    beside: Mapping[str, BaseParameter],
    facts: Mapping[str, Any],
) -> str:
    """The README.md of a repository: what is adapted, on which base, and how to load it."""
    kinds = sorted({at.adapter.kind for at in own.values()})
    rows = ["| weight | adapter | options | shape |", "| --- | --- | --- | --- |"]
    for site, at in own.items():
        options = ", ".join(f"{key}={value}" for key, value in at.adapter.options.items())
        rows.append(f"| `{site}` | {at.adapter.kind} | {options} | {at.slot.geometry.shape} |")
    rows += [f"| `{name}` | trained beside | | {tuple(extra.tensor.shape)} |" for name, extra in beside.items()]
    code = ["```python", "import peftkit as pk", "", f'pk.load(model, "{repository}")', "```"]
    tags = ["peftkit", *kinds]
    lines = [*code, "", f"{len(own)} weights are adapted:", "", *rows]
    return hub.model_card(repository.partition("/")[2], {"library_name": "peftkit", "tags": tags, **facts}, lines)


# -- parts ----------------------------------------------------------------------------------------------------------


def _beside(model: nn.Module, path: Path, extras: bool) -> dict[str, BaseParameter]:
    """The parameters that train beside the adapters; none, after a warning that names them, where they are left out."""
    found = extras_of(model)
    if found and not extras:
        advice = "load() would give a model without them; leave out extras=False to save them too"
        warnings.warn(f"{path}: {listed(tuple(found))} left out; {advice}", LeftOutWarning, stacklevel=4)
        return {}
    require_unmerged(found.values())
    for extra in found.values():
        require_file(
            extra.tensor.dtype in container.NAMES,
            path,
            f"{extra.name} is {extra.tensor.dtype}, which safetensors cannot hold",
        )
    return found


def _on_extras(own: Mapping[str, InstalledAdapter], beside: Mapping[str, BaseParameter]) -> list[str]:
    """The adapters whose weight trains beside them, by name."""
    held = {id(extra.tensor) for extra in beside.values()}
    return [site for site, at in own.items() if id(own_parameters(at.host)[at.slot.parameter]) in held]


def _require_derivable(
    path: Path, own: Mapping[str, InstalledAdapter], beside: Mapping[str, BaseParameter], portable: bool
) -> None:
    """Refuse a file without factors of a weight that has trained since they were taken from it."""
    for site in _on_extras(own, beside):
        kind, where = own[site].adapter.kind, site or "the model"
        require_file(
            portable or not own[site].adapter.derived(),
            path,
            f"{kind} of {where} is made of the factors of a weight that has trained since, so that they "
            "cannot be derived from it again: pass portable=True",
        )


def _stored_once(
    own: Mapping[str, InstalledAdapter],
    beside: Mapping[str, BaseParameter],
    shared: Iterable[Sequence[tuple[str, str]]],
) -> dict[str, str]:
    """Key of a parameter that several adapters share -> the key under which the file has it."""
    taken = {*beside, *(dotted(site, key) for site, at in own.items() for key in at.adapter.state_dict())}
    found: dict[str, str] = {}
    for held in shared:
        if len(held) == 1:
            continue
        plain = f"shared.{held[0][1].rpartition('.')[2]}"
        numbered = (f"{plain}.{number}" for number in itertools.count(1))
        key = next(key for key in itertools.chain([plain], numbered) if key not in taken)
        taken.add(key)
        found |= {dotted(site, parameter): key for site, parameter in held}
    return found


def _tensors(
    own: Mapping[str, InstalledAdapter],
    beside: Mapping[str, BaseParameter],
    name: str,
    dtype: torch.dtype | None,
    portable: bool,
    once: Mapping[str, str],
) -> dict[str, Tensor]:
    """The adapters' tensors by the keys of the file, and the extras'. once: from `_stored_once`."""
    tensors = {key: _packed(gathered(extra.tensor), dtype) for key, extra in beside.items()}
    for site, at in own.items():
        for key in stored_keys(at.adapter, portable):
            full = dotted(site, key)
            if full in beside:
                raise FileError(
                    f"{full} would be a tensor of {name!r} and a parameter that trains beside it: rename one"
                )
            if full in tensors:
                raise FileError(f"two adapters of {name!r} would be saved under the key {full!r}: give them two names")
            if once.get(full, full) not in tensors:
                tensors[once.get(full, full)] = _packed(at.adapter.state_dict()[key], dtype)
    return tensors


def _metadata(
    own: Mapping[str, InstalledAdapter],
    beside: Mapping[str, BaseParameter],
    name: str,
    portable: bool,
    training: Mapping[str, Any] | None,
    shared: dict[str, tuple[str, bool]],
    once: Mapping[str, str],
) -> dict[str, str]:
    """What the header says of the adapters and of the weights they were trained on."""
    held = _on_extras(own, beside)
    bases = {site: at for site, at in own.items() if site not in held}  # a weight in the file needs no fingerprint
    header = Header(
        name=name,
        records={
            site: WeightRecord(
                at.adapter.kind,
                at.adapter.convention,
                at.adapter.options,
                at.slot.geometry.shape,
                at.slot.geometry.transposed,
                _is_read(at),
                at.looks_up,
                at.slot.base is not None,
            )
            for site, at in own.items()
        },
        base={
            site: print_
            for site, at in bases.items()
            if not at.adapter.replaces and np.isfinite(print_ := samples(gathered_base(at))).all()
        },
        portable=portable,
        training=dict(training or {}),
        version=__version__,
        extras=tuple(beside),
        shared=shared,
        common={key: [full for full, other in once.items() if other == key] for key in dict.fromkeys(once.values())},
    )
    try:
        return native.encode(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"training={training!r:.200} was given, facts that JSON can hold were expected: {error}"
        ) from None


def _is_read(at: InstalledAdapter) -> bool:
    """Whether a layer's matrix is adapted where it is read, which its layer does not say by itself."""
    matrix = not at.slot_name and not at.slot.geometry.vector
    return matrix and at.slot.parameter in at.host.adapter_state.reads


def _packed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous CPU copy, its matrices cast; vectors and scalars are few, and their differences are what counts."""
    cast_to = dtype if dtype is not None and tensor.is_floating_point() and tensor.dim() >= 2 else tensor.dtype
    return tensor.detach().to("cpu", cast_to, copy=True).contiguous()


def _prove_alive(
    temporary: Path,
    path: Path,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, InstalledAdapter],
    allow_zero: bool,
    portable: bool,
    once: Mapping[str, str],
) -> None:
    """Read the file back as a loader would and make sure it holds what was meant."""
    back = container.read(temporary).tensors()
    require_file(
        set(back) == set(tensors) and len(back) == len(tensors),
        path,
        f"{len(back)} tensors were read back, {len(tensors)} were written",
    )
    for key, tensor in back.items():
        require_file(
            bool(torch.isfinite(tensor).all()),
            path,
            f"{key} is not finite{_cast_hint(tensors[key])}; nothing was saved",
        )
    with torch.no_grad():
        for site, at in own.items():
            twin, weight = copy.deepcopy(at.adapter).eval(), gathered_base(at)
            keys = stored_keys(twin, portable)
            full = {key: dotted(site, key) for key in keys}
            fill(twin, weight, {key: back[once.get(own, own)].to(weight.device) for key, own in full.items()})
            delta = twin(weight, 1.0)
            if allow_zero or not delta.is_matrix or delta.sqnorm() > 0:
                return
    raise FileError(
        f"{path}: every ΔW is zero in the file, so loading it would do nothing; nothing was saved. "
        "Train the adapter first, save in a wider dtype, or pass allow_zero=True"
    )


def _cast_hint(tensor: Tensor) -> str:
    return f" as {tensor.dtype}" if tensor.dtype == torch.float16 else ""
