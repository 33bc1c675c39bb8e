"""Rule: which adapter goes on which layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit.adapters import registry
from peftkit.errors import TargetError, require_option
from peftkit.wrapping.foreign import refuse_foreign
from peftkit.wrapping.select import patterns


class Rule:
    """Pair target patterns with an adapter; `wrap` and `plan` take a list of rules, and the first that matches wins.

    Args:
        targets: one pattern or several, as in `wrap`.
        kind: the adapter, as in `wrap`.
        exclude: patterns of layers that this rule leaves alone.
        read: True adapts the weight where other code reads it, `F.linear(h, layer.weight)`, and not the layer's call:
            for layers whose weight goes into a fused loss or kernel (lm_head under Liger, Mamba's conv1d and dt_proj).
            By default a layer is adapted where it is called, unless torch or the layer's class reads its weight.
        **options: the adapter's own options.

    Raises:
        TargetError: targets is empty, or no strings.
        UnknownAdapterError: no adapter is called `kind`.
        OptionError: an option is another library's; the message names this one's.

    Example:
        >>> model = nn.TransformerEncoderLayer(16, 2, 32)
        >>> plan = pk.wrap(model, rules=[pk.Rule("*.out_proj", "loha", rank=4), pk.Rule("Linear", "lora", rank=8)])
        >>> [(entry.site.name, entry.kind) for entry in plan.entries]
        [('self_attn.out_proj', 'loha'), ('linear1', 'lora'), ('linear2', 'lora')]
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        kind: str,
        *,
        exclude: str | Sequence[str] = (),
        read: bool = False,
        **options: Any,
    ) -> None:
        self.targets = patterns(targets)
        if not self.targets:
            raise TargetError("targets is empty: name at least one layer, class or preset")
        self.exclude = patterns(exclude)
        self.kind = registry.get(kind).kind
        require_option(isinstance(read, bool), "read", read, "True or False")
        refuse_foreign(self.kind, options)
        self.read, self.options = read, options

    def __repr__(self) -> str:
        given = {"read": True, **self.options} if self.read else self.options
        options = "".join(f", {name}={value!r}" for name, value in given.items())
        return f"Rule({', '.join(self.targets)!r}, {self.kind!r}{options})"
