"""What is known of the model that adapters are for: its configuration, its name, and the paths of its modules."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from peftkit.errors import OptionError, require_file
from peftkit.files.base import Base
from peftkit.files.formats import strict_json
from peftkit.wrapping.walk import named_modules, unwrapped

_CONFIG = "config.json"
#: libraries whose classes PEFT can look up by name
_LIBRARIES = ("transformers", "diffusers")
#: how names of transformers' classes end -> PEFT's task; of encoder-decoders see `ModelFacts.task`
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
#: the heads that PEFT looks for in a folder of these tasks, and fails without
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model.

    Attributes:
        config: the entries of its config.json, none where it is not known.
        name: on the hub, or its folder; "" where it is not known.
        modules: the paths of its modules, None where they are not known.
        library: the module that its class is defined in, "" where that is not known.
        said: what the folder of PEFT that the adapters are from says of the model, as PEFT calls it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    modules: frozenset[str] | None = None
    library: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The name of the model's class, "" where it is not known."""
        listed = self.config.get("architectures")
        return str(listed[0]) if isinstance(listed, list) and listed else ""

    @property
    def task(self) -> str | None:
        """PEFT's word for what the model does, None where its class does not say."""
        if self.architecture.endswith("ForConditionalGeneration"):
            return "SEQ_2_SEQ_LM" if self.config.get("is_encoder_decoder") else None
        return next((task for end, task in _TASKS.items() if self.architecture.endswith(end)), None)

    def peft_entries(self, saved: Collection[str] = ()) -> dict[str, Any]:
        """Return what PEFT's configuration says of the model, by which AutoPeftModel finds it and its class.

        saved: the modules that the folder has whole.
        """
        entries = dict(self.said)
        heads = _HEADS.get(self.task or "")
        if self.name:
            entries["base_model_name_or_path"] = self.name
        if self.task is not None and (heads is None or not set(heads).isdisjoint(saved)):
            entries["task_type"] = self.task
        elif self.architecture and self.library and "task_type" not in entries:
            entries["auto_mapping"] = {"base_model_class": self.architecture, "parent_library": self.library}
        return entries


def facts_of(
    source: nn.Module | None,
    base: Base | None,
    said: Mapping[str, Any],
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> ModelFacts:
    """Collect what is known of a model: what the user says, else what the model itself does, its base, or the adapter.

    Args:
        source: the wrapped model, None where the adapters are from a file.
        base: the model or the checkpoint that a file is for, where it is at hand.
        said: what the folder of PEFT that the adapters are from says of the model.
        config: the model's config.json, the folder it is in, or its entries.
        name: the model's, on the hub or as a folder.

    Raises:
        FileError: there is no such configuration, or it is damaged.
        OptionError: `config` is neither a path nor entries.
    """
    if not isinstance(config, (Mapping, str, os.PathLike, type(None))):
        raise OptionError(
            f"config={config!r:.100} was given, and a path or a dictionary was expected: pass its to_dict(), or the "
            "folder of the model"
        )
    model = source if source is not None else None if base is None else base.model
    folder = None if model is not None or base is None else _folder_of(base.path)
    own, library = ({}, "") if model is None else _of_model(model)
    if config is not None:
        own = config if isinstance(config, Mapping) else _read(Path(config))
    elif model is None and folder is not None:
        own = _read(folder)
    elif model is None and isinstance(local := said.get("base_model_name_or_path"), str):
        own = _read(Path(local)) if os.path.isfile(os.path.join(local, _CONFIG)) else {}
    found = name or own.get("_name_or_path") or (str(folder) if folder is not None else "")
    modules = _paths(model) if model is not None else None if base is None else _parents(base)
    return ModelFacts(own, found if isinstance(found, str) else "", modules, library, said)


def _of_model(model: nn.Module) -> tuple[Mapping[str, Any], str]:
    """The configuration of a model of transformers or diffusers, with its class, and the module of that class."""
    model = unwrapped(model)
    cls = next((c for c in type(model).__mro__ if c.__module__.partition(".")[0] in _LIBRARIES), None)
    config = getattr(model, "config", None)
    if cls is None or config is None:
        return {}, ""
    entries: dict[str, Any] = dict(config) if isinstance(config, Mapping) else config.to_dict()
    entries["architectures"] = [cls.__name__]
    entries.setdefault("_name_or_path", getattr(config, "_name_or_path", ""))
    return entries, cls.__module__


def _folder_of(path: Path) -> Path | None:
    """The folder of a checkpoint that has a configuration."""
    folder = path if os.path.isdir(path) else path.parent
    return folder if os.path.isfile(folder / _CONFIG) else None


def _read(path: Path) -> dict[str, Any]:
    """The entries of a config.json, or of the one in a folder."""
    path = path / _CONFIG if os.path.isdir(path) else path
    found = strict_json.read_json(path)
    require_file(isinstance(found, dict), path, f"it holds a {type(found).__name__}, and a configuration is an object")
    return found


def _paths(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in named_modules(model, every_name=True) if name)


def _parents(base: Base) -> frozenset[str]:
    """The modules around the tensors of a checkpoint; those without tensors are not known."""
    parts = [key.split(".")[:-1] for key in base.where]
    return frozenset(".".join(own[:end]) for own in parts for end in range(1, len(own) + 1))
