"""Checkpoints of transformers' Trainer that hold the adapters and what else is trained, and not the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from peftkit.errors import OptionError
from peftkit.integrations.state import base_keys, require_base, require_fit, save_adapters, trained_state
from peftkit.wrapping.installed import names_of
from peftkit.wrapping.walk import unwrapped

_Trainer = transformers.Trainer if TYPE_CHECKING else object


class AdapterCheckpoints(_Trainer):
    """Makes a Trainer's checkpoints hold what is trained of a wrapped model, and not its base.

    To be named before the Trainer among the bases of a class: `class MyTrainer(AdapterCheckpoints, Seq2SeqTrainer)`.
    `AdapterTrainer` is that class for transformers' own.

    A checkpoint's model.safetensors has the adapters, the other parameters that require gradients, and the buffers,
    under the names of the model's state dict. Beside it each adapter has a file as `peftkit.save` writes it,
    adapter-<name>.safetensors, for `peftkit.load`, `peftkit.export` and the others. Resuming and
    `load_best_model_at_end` read model.safetensors onto the wrapped model; optimiser, scheduler and random states are
    the Trainer's own. `save_model` writes the same two. It works in one process and under DistributedDataParallel.

    Args:
        *args: as the Trainer takes them.
        **kwargs: as the Trainer takes them.

    Raises:
        UnknownAdapterError: the model is not wrapped.
        OptionError: the Trainer shards the model, by FSDP or DeepSpeed.
        MismatchError: a checkpoint is of other adapters, or of other trained parameters, than the model's.
        WrongBaseError: a checkpoint was trained on another base.

    Example:
        >>> trainer = AdapterTrainer(model, arguments, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names_of(self._wrapped_model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise OptionError(
                "AdapterCheckpoints writes models that are whole in one process, and this Trainer shards its model by "
                f"{'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}: use its own checkpoints there"
            )

    @property
    def _wrapped_model(self) -> nn.Module:
        model = self.model
        assert isinstance(model, nn.Module)
        return model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._wrapped_model
        state = model.state_dict() if state_dict is None else state_dict
        with _without_base(model):
            super()._save(output_dir, state_dict=trained_state(model, state))
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            assert folder is not None
            save_adapters(model, Path(folder), {"steps": self.state.global_step})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        require_base(self._wrapped_model, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        where = "the checkpoint"
        require_fit(self._wrapped_model, where, load_result.missing_keys, load_result.unexpected_keys)


@contextmanager
def _without_base(model: nn.Module) -> Iterator[None]:
    """Make a block in which `save_pretrained` leaves out the base, also of a state dict that a quantizer makes anew."""
    inside = unwrapped(model)
    if not isinstance(inside, transformers.PreTrainedModel):
        yield
        return
    before = inside._keys_to_ignore_on_save
    inside._keys_to_ignore_on_save = {*(before or ()), *base_keys(inside)}
    try:
        yield
    finally:
        inside._keys_to_ignore_on_save = before


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    """transformers' Trainer with checkpoints that hold no base: see `AdapterCheckpoints`."""
