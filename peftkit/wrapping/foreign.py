"""Options under the names that other libraries give them, translated into this library's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.adapters import registry
from peftkit.errors import OptionError

#: foreign name -> whose it is, and this library's name; where there are two, the one that the adapter has
_OPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "r": ("PEFT", ("rank", "blocks")),
    "network_dim": ("kohya's sd-scripts", ("rank",)),
    "lora_dim": ("LyCORIS", ("rank",)),
    "lora_alpha": ("PEFT", ("alpha",)),
    "network_alpha": ("kohya's sd-scripts", ("alpha",)),
    "lora_dropout": ("PEFT", ("dropout",)),
    "network_dropout": ("kohya's sd-scripts", ("dropout",)),
    "use_rslora": ("PEFT", ("rslora",)),
    "use_dora": ("PEFT", ("decompose",)),
    "dora_wd": ("LyCORIS", ("decompose",)),
    "use_tucker": ("LyCORIS", ("tucker",)),
    "decompose_factor": ("PEFT", ("factor",)),
    "oft_block_size": ("PEFT", ("block_size",)),
    "boft_block_size": ("PEFT", ("block_size",)),
    "target_modules": ("PEFT", ("targets",)),
    "exclude_modules": ("PEFT", ("exclude",)),
    "adapter_name": ("PEFT", ("name",)),
}

#: foreign name -> whose it is, and what does the same here
_PHRASES: Mapping[str, tuple[str, str]] = {
    "rank_pattern": ("PEFT", "give rules=[Rule(targets, kind, rank=…), …]"),
    "alpha_pattern": ("PEFT", "give rules=[Rule(targets, kind, alpha=…), …]"),
    "conv_dim": ("kohya's sd-scripts", "give rules=[Rule('Conv2d', kind, rank=…), …]"),
    "conv_alpha": ("kohya's sd-scripts", "give rules=[Rule('Conv2d', kind, alpha=…), …]"),
    "modules_to_save": ("PEFT", "leave it out, and set requires_grad_(True) on those modules after wrapping"),
}


def refuse_foreign(kind: str, options: Mapping[str, Any]) -> None:
    """Raise OptionError for an option that only another library has, and name the one that is meant.

    Args:
        kind: a registered adapter.
        options: as the user gave them.
    """
    own = registry.option_names(registry.get(kind))
    for option, value in options.items():
        if option in own:
            continue
        if option in _OPTIONS:
            whose, names = _OPTIONS[option]
            meant = next((name for name in names if name in own), names[0])
            raise OptionError(f"{kind}: {option}={value!r:.100} was given, a name of {whose}: here it is {meant}=")
        if option in _PHRASES:
            whose, instead = _PHRASES[option]
            raise OptionError(f"{kind}: {option}={value!r:.100} was given, an option of {whose}: here, {instead}")
