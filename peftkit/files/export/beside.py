"""What trained beside the adapters: for PEFT whole modules and biases of adapted layers, for LyCORIS changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapters import registry
from peftkit.errors import ExportError, LossyError
from peftkit.files.base import Base, of_model
from peftkit.files.entries import AdapterEntry
from peftkit.files.export.job import Job
from peftkit.files.extras import listed
from peftkit.files.formats import container, peft
from peftkit.files.formats.state_dict import adapters_in
from peftkit.wrapping.divided import gathered
from peftkit.wrapping.extras import base_parameters, extras_of
from peftkit.wrapping.vectors import every_site, is_rare_norm
from peftkit.wrapping.walk import dotted


@dataclass(frozen=True)
class Beside:
    """Parameters that trained beside the adapters, by name.

    base: the model with all its tensors, None where it is not at hand. shared: of the parameters, those in several
    places of the model.
    """

    values: Mapping[str, Tensor]
    base: Base | None = None
    shared: tuple[str, ...] = ()

    def around(self, module: str) -> dict[str, Tensor] | None:
        """The tensors of a module that did not train; None where the model is not at hand, or has no such module."""
        own = [key for key in (() if self.base is None else self.base.where) if key.startswith(f"{module}.")]
        rest = [key for key in own if key not in self.values and not adapters_in([key])]
        return {key: self.base.tensor(key) for key in rest} if self.base is not None and own else None

    @classmethod
    def of_model(cls, model: nn.Module, *, vectors: bool = False) -> Beside:
        """Collect the parameters of a model that train beside its adapters. vectors: norms and biases have some."""
        places: defaultdict[int, list[str]] = defaultdict(list)
        for own in base_parameters(model, every_name=True):
            places[id(own.tensor)].append(own.name)
        found = extras_of(model)
        shared = tuple(name for name, own in found.items() if len(places[id(own.tensor)]) > 1)
        return cls(
            {name: gathered(own.tensor) for name, own in found.items()},
            of_model(model) if found or vectors else None,
            shared,
        )


def as_changes(values: Mapping[str, Tensor], model: nn.Module, base: Base) -> Iterator[AdapterEntry]:
    """Yield parameters that trained as adapters of kind "full", on what they were before.

    Args:
        values: the parameters, by name.
        model: the model that they are of.
        base: the model as it was before it trained.

    Raises:
        LossyError: a parameter that is no matrix, norm or bias of its own, or that the base does not have.
    """
    found = {dotted(s.module_name, s.slot.parameter): s for s in every_site(model).values() if s.slot.start is None}
    for name, value in values.items():
        site = found.get(name)
        if site is None or base.where.get(name) is None or tuple(base.info(name).shape) != tuple(value.shape):
            raise LossyError(
                f"{name} trained beside the adapters, and is no matrix, norm or bias that {base.path} has in its "
                "shape; pass extras=False to leave out all that trained beside"
            )
        geometry = site.slot.geometry
        W = geometry.matrix(base.tensor(name))
        adapter = registry.build("full", geometry.shape, W, torch.float32)
        change = geometry.matrix(value).float() - W.to(value.device).float()
        adapter.load_state_dict({**adapter.state_dict(), "change": change.cpu()})
        yield AdapterEntry(
            site.name,
            adapter.eval(),
            geometry.shape,
            W,
            site.name,
            geometry.transposed,
            embedding=site.looks_up,
            vector=geometry.vector,
            rare_norm=is_rare_norm(site.module),
        )


def in_peft_folder(
    beside: Beside, found: Sequence[Job], kind: str, dtype: torch.dtype | None, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the options of PEFT's configuration that bring these parameters.

    A module without adapters is one of `modules_to_save`; the bias of an adapted layer comes with bias="lora_only".

    Args:
        beside: the parameters.
        found: the adapters of the folder.
        kind: PEFT's type of them.
        dtype: of matrices, None for the one they have.
        path: of the folder, for errors.

    Raises:
        LossyError: parameters that PEFT has no place for.
        ExportError: a module of which the file has a part, and the model with the rest is not at hand.
        FileError: a number that is not finite in that dtype.
    """
    sites = [job.piece.module.removeprefix(peft.PREFIX) for job in found]
    own_names = all(item.name == site for job, site in zip(found, sites, strict=True) for _, item in job.members)
    tensors: dict[str, Tensor] = {}
    saved: dict[str, None] = {}
    lost = [] if own_names else list(beside.values)
    biased = False
    for name, value in beside.values.items() if own_names else ():
        module, _, last = name.rpartition(".")
        if module in sites and last == "bias" and kind in peft.BIASED:
            key, biased = f"{module}.base_layer.bias", True
        elif name in beside.shared or not module or any(_claims(module, site) for site in sites):
            lost.append(name)
            continue
        else:
            key, saved[module] = name, None
        tensors[key] = value
    for module in saved:  # PEFT reads such a module whole or not at all
        around = beside.around(module)
        if around is None:
            raise ExportError(f"{path}: {module} trained beside the adapters, and PEFT's file has it whole: give base=")
        tensors |= around
    if lost:
        raise LossyError(
            f"{path}: {listed(lost)} trained beside the adapters, and PEFT has no place for weights under adapters, "
            "shared parameters and modules around adapted ones; pass extras=False to leave out all that trained beside"
        )
    options = {"modules_to_save": list(saved)} if saved else {}
    packed = {
        peft.PREFIX + key: container.packed(tensor, dtype if _is_matrix(tensor) else None, path, key)
        for key, tensor in tensors.items()
    }
    return packed, options | ({"bias": "lora_only"} if biased else {})


def _is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is cast: vectors keep the dtype they have."""
    return tensor.is_floating_point() and tensor.dim() >= 2


def _claims(module: str, site: str) -> bool:
    """Whether PEFT, which goes by how names end, would take an adapted layer, or what is around it, for the module."""
    parts = site.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts) + 1))
