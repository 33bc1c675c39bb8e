"""TRL's trainers with the base under the adapters as the reference model: no second base is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from peftkit.errors import OptionError, UnsupportedLayerError, require_option
from peftkit.integrations.transformers import AdapterCheckpoints
from peftkit.wrapping.installed import names_of
from peftkit.wrapping.layer import AdaptedLayer
from peftkit.wrapping.strength import disabled
from peftkit.wrapping.walk import unwrapped


class ReferenceModel(nn.Module):
    """The base of a wrapped model as a model of its own, which holds no parameter: what trainers take as `ref_model`.

    A call runs the wrapped model with its adapters disabled. Attributes, as `config`, are those of the wrapped model.

    Args:
        model: a wrapped model.

    Raises:
        OptionError: the model is a name or a path.
        UnknownAdapterError: the model is not wrapped.
        UnsupportedLayerError: its output head is adapted where it is called, and TRL reads its weight.

    Example:
        >>> trainer = trl.DPOTrainer(model, ref_model=ReferenceModel(model))  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"model={model!r:.100} was given, a wrapped model was expected: load it and wrap it first"
            )
        names_of(model)
        _require_readable_head(model)
        self.__dict__["wrapped"] = (
            model  # its parameters are not this module's: what prepares a model must not see them
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # TRL and accelerate put forwards of their own on a model; the wrapped one has them already
        model = self.__dict__["wrapped"]
        with disabled(model):
            return model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model with its adapters disabled."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)


class AdapterDPOTrainer(AdapterCheckpoints, DPOTrainer):
    """TRL's DPOTrainer with the base under the adapters as its reference, and checkpoints without the base.

    Args:
        model: a wrapped model.
        **kwargs: as the trainer takes them.

    Raises:
        UnknownAdapterError: the model is not wrapped.
        OptionError: `ref_model` is another one; or an argument asks for a reference that changes or is stored.

    Example:
        >>> trainer = AdapterDPOTrainer(model, args=arguments, train_dataset=data)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        if kwargs.pop("ref_model", None) is not None:
            raise OptionError("ref_model was given, but the reference is the model's own base: leave it out")
        _require_plain(kwargs.get("args"))
        super().__init__(model, ref_model=ReferenceModel(model), **kwargs)


class AdapterGRPOTrainer(AdapterCheckpoints, GRPOTrainer):
    """TRL's GRPOTrainer with the base under the adapters as its reference, and checkpoints without the base.

    Args:
        model: a wrapped model.
        *args: as the trainer takes them.
        **kwargs: as the trainer takes them.

    Raises:
        UnknownAdapterError: the model is not wrapped.
        OptionError: an argument asks for a reference that changes.

    Example:
        >>> trainer = AdapterGRPOTrainer(model, reward, args=arguments, train_dataset=data)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        reference, arguments = ReferenceModel(model), kwargs.get("args")
        _require_plain(arguments)
        beta = 0.0 if arguments is None else arguments.beta
        if arguments is not None:
            arguments.beta = 0.0  # with another one the trainer loads the base again
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            if arguments is not None:
                arguments.beta = beta
        self.beta, self.ref_model = beta, reference if beta else None


def _require_plain(arguments: Any) -> None:
    """Refuse arguments that need a reference with parameters of its own."""
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        given = getattr(arguments, name, False)
        require_option(not given, name, given, "False", " The reference is the model's own base: leave it out")


def _require_readable_head(model: nn.Module) -> None:
    """Refuse an output head whose adapter acts where the layer is called: TRL multiplies by its weight itself."""
    get = getattr(unwrapped(model), "get_output_embeddings", None)
    if callable(get) and isinstance(get(), AdaptedLayer):
        raise UnsupportedLayerError(
            "the output head is adapted where it is called, and TRL reads its weight: adapt it with "
            "Rule(targets, kind, read=True), or leave it out"
        )
