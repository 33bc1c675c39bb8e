"""Keys of a wrapped model's state dict, "<module>.adapters.<name>.<tensor>", as full checkpoints hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: what torch.compile and checkpoint_wrapper put into names; what DDP and trainers put before them is found by matching
_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")
_ADAPTER = re.compile(r"(?:^|\.)adapters\.([\w-]+)\.")


def adapters_in(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the adapters whose tensors are among the keys of a state dict, () for a plain model's.

    Example:
        >>> from peftkit.files.formats.state_dict import adapters_in
        >>> adapters_in(["0.weight", "0.adapters.style.up", "0.adapters.style.down"])
        ('style',)
    """
    return tuple(dict.fromkeys(found[1] for key in keys if (found := _ADAPTER.search(key))))


def plain_key(key: str) -> str:
    """Return a key without the segments that torch's wrappers put into it.

    Example:
        >>> from peftkit.files.formats.state_dict import plain_key
        >>> plain_key("_orig_mod.0.weight")
        '0.weight'
    """
    return _SEGMENTS.sub("", key)
