"""Folders of accelerate's `save_state` that hold the adapters and what else is trained, and not the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftkit.errors import OptionError
from peftkit.integrations.state import may_lack_base, require_base, save_adapters, trained_state
from peftkit.kernels.torch_private import wrapped
from peftkit.wrapping.installed import names_of
from peftkit.wrapping.walk import unwrapped


def adapter_checkpoints(accelerator: Accelerator, model: nn.Module) -> list[RemovableHandle]:
    """Make `save_state` leave the base of a wrapped model out, and `load_state` do without it.

    The model's file in the folder has the adapters, the other parameters that require gradients, and the buffers, under
    their usual names. Beside it each adapter has a file as `peftkit.save` writes it, adapter-<name>.safetensors.
    Optimisers, schedulers, samplers and random states are accelerate's own. Of the keys of the model's file only the
    base's may be missing; a folder with the whole model loads as before. Other models of the accelerator are saved
    whole.

    Args:
        accelerator: of one process, or of several with a whole model in each.
        model: a wrapped model, as `accelerator.prepare` returned it.

    Returns:
        Handles; `remove()` of each ends it.

    Raises:
        UnknownAdapterError: the model is not wrapped.
        OptionError: the model was not prepared by this accelerator, or is sharded by it, when state is saved.
        WrongBaseError: the folder is of another base, when state is loaded.

    Example:
        >>> model, optimizer = accelerator.prepare(model, optimizer)  # doctest: +SKIP
        >>> handles = adapter_checkpoints(accelerator, model)  # doctest: +SKIP
        >>> accelerator.save_state("state")  # doctest: +SKIP
    """
    names_of(model)

    def strip(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        # of a model under DistributedDataParallel the accelerator keeps the model inside
        where = next((i for i, other in enumerate(models) if unwrapped(other) is unwrapped(model)), None)
        if where is None or len(weights) != len(models):
            what = "was not prepared by" if where is None else "is sharded by"
            raise OptionError(f"{folder}: the model of adapter_checkpoints {what} this accelerator, and is not saved")
        weights[where] = trained_state(models[where], weights[where])
        if accelerator.is_main_process:
            save_adapters(model, Path(folder))

    def compare(models: list[nn.Module], folder: str) -> None:
        del models
        require_base(model, Path(folder))

    saving, loading = accelerator.register_save_state_pre_hook(strip), accelerator.register_load_state_pre_hook(compare)
    return [saving, loading, *map(may_lack_base, _levels(model))]


def _levels(model: nn.Module) -> list[nn.Module]:
    """The model, and what is inside each wrapper of torch around it: any of them may be what is loaded."""
    levels = [model]
    while (inside := wrapped(levels[-1])) is not None:
        levels.append(inside[1])
    return levels
