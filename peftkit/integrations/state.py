"""What a checkpoint of a training run needs of a wrapped model's state dict, and what it can do without."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkit.errors import MismatchError
from peftkit.files.fingerprint import require_same_base, samples
from peftkit.files.formats import native
from peftkit.files.read import read
from peftkit.files.save import save
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, names_of


def base_keys(model: nn.Module) -> set[str]:
    """Return the keys of a state dict that hold the base: frozen parameters of no adapter, and what is made of them."""
    adapters = {id(t) for at in installed_adapters(model) for t in (*at.adapter.parameters(), *at.adapter.buffers())}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    buffers = {id(b) for b in model.buffers()}
    kept = adapters | trained | buffers
    own = model.state_dict(keep_vars=True)  # by its tensors: wrappers spell names in ways of their own
    return {key for key, value in own.items() if isinstance(value, Tensor) and id(value) not in kept}


def trained_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a state dict that training changes: adapters, trainable parameters, buffers.

    Args:
        model: a wrapped model.
        state: its state dict.

    Raises:
        UnknownAdapterError: there is no adapter on the model: all of it would be left out.
    """
    names_of(model)
    base = base_keys(model)
    return {key: value for key, value in state.items() if key not in base}


def missing_trained(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Return those of the missing keys that a checkpoint should have: not the base, and not another name of a tensor.

    Args:
        model: a wrapped model.
        missing: keys of its state dict.
    """
    lost, base = set(missing), base_keys(model)
    own = model.state_dict(keep_vars=True)
    present = {id(value) for key, value in own.items() if key not in lost}
    return sorted(key for key in lost - base if id(own.get(key)) not in present)


def may_lack_base(model: nn.Module) -> RemovableHandle:
    """Let `load_state_dict` of a wrapped model take, also strictly, a state dict with nothing of the base.

    Returns:
        A handle whose `remove()` ends it.
    """
    return model.register_load_state_dict_post_hook(_forgive)


def _forgive(model: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    if base_keys(model) <= set(missing):  # some of the base without the rest is a mistake
        missing[:] = missing_trained(model, missing)


def require_fit(model: nn.Module, where: object, missing: Iterable[str], unexpected: Collection[str]) -> None:
    """Raise MismatchError unless a checkpoint had what is trained of a model, and nothing else.

    Args:
        model: a wrapped model.
        where: the checkpoint, for the message.
        missing: keys of the model's state dict that it lacks; it may lack the base.
        unexpected: its keys that the model lacks.
    """
    lost = missing_trained(model, missing)
    if lost or unexpected:
        lines = [f"missing: {key}" for key in lost[:8]] + [f"unexpected: {key}" for key in sorted(unexpected)[:8]]
        raise MismatchError(
            f"{where} is of other adapters or other trained parameters than this model's: wrap the model as for the "
            f"run that is resumed ({len(lost)} missing, {len(unexpected)} unexpected)\n  " + "\n  ".join(lines)
        )


def adapter_file(folder: Path, name: str) -> Path:
    """Return where a checkpoint has the file of one adapter."""
    return folder / f"adapter-{name}.safetensors"


def save_adapters(model: nn.Module, folder: Path, training: Mapping[str, Any] | None = None) -> None:
    """Write every adapter of a model to a file of its own, as `peftkit.save` does."""
    for name in names_of(model):
        save(model, adapter_file(folder, name), name, training=training, allow_zero=True)


def require_base(model: nn.Module, folder: Path) -> None:
    """Raise WrongBaseError unless the base is the one that the adapter files of a checkpoint were trained on."""
    for name in names_of(model):
        path = adapter_file(folder, name)
        if path.is_file():
            require_fingerprints(model, path, read(path).base, name)


def fingerprints(model: nn.Module) -> dict[str, Tensor]:
    """Return a few entries of every frozen weight that has an adapter, by its name, for a checkpoint to note."""
    return {at.site: torch.from_numpy(samples(at.base)) for at in _on_frozen(model)}


def require_fingerprints(
    model: nn.Module, where: object, noted: Mapping[str, np.ndarray], name: str | None = None
) -> None:
    """Raise WrongBaseError unless the weights under the adapters have the entries that were noted.

    Args:
        model: a wrapped model.
        where: the checkpoint, for the message.
        noted: what is known of weights by their names; others are not compared.
        name: of one adapter; by default all.
    """
    here = {at.site: at for at in _on_frozen(model, name) if at.site in noted}
    distances = {site: native.distance(samples(at.base), noted[site]) for site, at in here.items()}
    kinds = {site: at.adapter.kind for site, at in here.items()}
    require_same_base(where, "this model", distances, kinds, list(here), other_base=False)


def _on_frozen(model: nn.Module, name: str | None = None) -> list[InstalledAdapter]:
    """The adapters on weights that do not train beside them."""
    installed = installed_adapters(model, names_of(model, name))
    return [at for at in installed if not at.host.weight_of(at.slot).requires_grad]
