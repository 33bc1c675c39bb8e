"""Which layer gets which adapter. Patterns, presets, and a dry run that checks everything wrap would do."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from peftkit.adapters import registry
from peftkit.adapters.base import require_dtype
from peftkit.errors import (
    DuplicateNameError,
    OptionError,
    TargetError,
    TiedWeightsError,
    UnsupportedLayerError,
)
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.wrapping.routes import choose
from peftkit.wrapping.select import Selector, listed, patterns, tied_with
from peftkit.wrapping.sites import Site


class Rule:
    """Layers and the adapter they get: Rule("*.attn*", "loha", rank=4).

    targets, exclude: patterns, one or several. Where rules overlap, the first that matches a layer wins.
    """

    def __init__(
        self, targets: str | Sequence[str], kind: str, *, exclude: str | Sequence[str] = (), **options: Any
    ) -> None:
        self.targets = patterns(targets)
        if not self.targets:
            raise TargetError("targets is empty: name at least one layer, class or preset")
        self.exclude = patterns(exclude)
        self.kind = registry.get(kind).kind
        self.options = options

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Rule({', '.join(self.targets)!r}, {self.kind!r}{options})"


@dataclass(frozen=True)
class Entry:
    """One weight and the adapter planned for it."""

    site: Site
    kind: str
    options: dict[str, Any]
    pattern: str
    parameters: int
    bytes: int
    route: str


@dataclass(frozen=True, repr=False)
class Plan:
    """What `wrap` will do, or did. str(plan) is a table."""

    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=())
    untie: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        """Trainable parameters in all."""
        return sum(entry.parameters for entry in self.entries)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(entry.site.name for entry in self.entries)

    def __str__(self) -> str:
        table = Table(
            "pattern", "adapter", "layers", "route", "parameters", "MB", title="adapters", title_justify="left"
        )
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.pattern, entry.kind, entry.route), []).append(entry)
        for (pattern, kind, route), entries in groups.items():
            parameters, size = sum(e.parameters for e in entries), sum(e.bytes for e in entries)
            table.add_row(escape(pattern), kind, f"{len(entries)}", route, f"{parameters:,}", f"{size / 1e6:.2f}")
        out = io.StringIO()
        console = Console(file=out, width=110)
        console.print(table)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            console.print(f"skipped {listed(names)}: {reason}", markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()

    __repr__ = __str__


def plan(
    model: nn.Module,
    kind: str | None = None,
    *,
    targets: str | Sequence[str] = "full",
    exclude: str | Sequence[str] = (),
    rules: Sequence[Rule] | None = None,
    name: str = "default",
    tied: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """Resolve targets to layers and check every adapter against its layer, without touching the model.

    A target is a module name, a glob over names ("*.to_q"), "re:…" matched against the whole name, a class name
    ("Linear", "BasicTransformerBlock"), or a preset ("full", "attn-mlp", "attn-only"). A name or class of a module
    with layers inside selects them all. Every pattern, of exclude too, must select something.
    tied: what to do with a targeted weight another module shares: "skip" or "untie"; without it, raises.
    The table's route is that of a training step on 4096 tokens or pixels.

    Raises TargetError, OptionError, UnsupportedLayerError, TiedWeightsError, DuplicateNameError.
    """
    if rules is None:
        if kind is None:
            raise OptionError("wrap needs an adapter kind, as in wrap(model, 'lora'), or rules=[Rule(…), …]")
        rules = [Rule(targets, kind, exclude=exclude, **options)]
    elif kind is not None or options or exclude or targets != "full":
        raise OptionError("give either a kind with targets and options, or rules, which carry their own")
    if not rules:
        raise OptionError("rules is empty")
    require_dtype(dtype)
    if tied not in (None, "skip", "untie"):
        raise OptionError(f"tied={tied!r} was given, 'skip', 'untie' or None was expected")
    finder = Selector(model)
    chosen: dict[str, tuple[Rule, str]] = {}
    for rule in rules:
        excluded = {site for pattern in rule.exclude for site in finder.find(pattern)}
        for pattern in rule.targets:
            found = [site for site in finder.find(pattern) if site not in excluded]
            fresh = [site for site in found if site not in chosen]
            if not fresh:
                taken = "are taken by earlier targets" if found else f"are excluded by {', '.join(rule.exclude)}"
                raise TargetError(f"target {pattern!r} of {rule!r} adapts nothing: the layers it matches {taken}")
            chosen.update(dict.fromkeys(fresh, (rule, pattern)))
    shared = tied_with(model, [finder.sites[name] for name in chosen])
    if shared and tied is None:
        raise TiedWeightsError(
            f"{listed(f'{a} shares its weight with {b}' for a, b in shared.items())}: merged into one, an "
            "adapter would change both. Pass tied='untie' to give the layer its own copy, or tied='skip'"
        )
    skipped = list(finder.skipped.items())
    if tied == "skip":
        skipped += [(site, f"shares its weight with {shared[site]}") for site in chosen if site in shared]
        chosen = {site: choice for site, choice in chosen.items() if site not in shared}
        if not chosen:
            raise TargetError("every targeted layer shares its weight with another and tied='skip' leaves none")
    dry = _DryRun(dtype)
    entries = tuple(dry.entry(finder.sites[site], rule, pattern) for site, (rule, pattern) in chosen.items())
    refuse_taken([entry.site for entry in entries], name)
    return Plan(entries, tuple(skipped), frozenset(shared) if tied == "untie" else frozenset())


class _DryRun:
    """Builds adapters on the meta device, once per distinct shape: counts without memory, and every refusal."""

    OUTPUTS = 4096

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.seen: dict[Any, tuple[int, int, str]] = {}

    def entry(self, site: Site, rule: Rule, pattern: str) -> Entry:
        geometry = site.slot.geometry
        key = (geometry.shape, site.parameter.dtype, site.read, id(rule))
        if key not in self.seen:
            weight = torch.empty(geometry.shape.rows, geometry.shape.columns, dtype=site.parameter.dtype, device="meta")
            try:
                adapter = registry.build(rule.kind, geometry.shape, weight, self.dtype, **rule.options)
            except OptionError as error:
                raise type(error)(f"{site.label}: {error}") from None
            except TypeError as error:
                raise OptionError(f"{site.name}: {rule!r}: {error}") from error
            if site.read and adapter.input_dropout:
                raise UnsupportedLayerError(
                    f"{site.name}: {rule.kind} with dropout={adapter.input_dropout} drops elements of the layer's "
                    "input, but this weight is read without calling its layer; use rank_dropout or leave it out"
                )
            parameters = [p for p in adapter.parameters() if p.requires_grad]
            count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
            if site.read:
                route = "weight"
            else:
                compute = accumulation_dtype(weight.dtype)
                delta = adapter.delta(weight)
                route = choose([delta], geometry.shape, self.OUTPUTS, training=True, narrow=compute != weight.dtype)
            self.seen[key] = count, size, route
        return Entry(site, rule.kind, dict(rule.options), pattern, *self.seen[key])


def refuse_taken(targeted: Sequence[Site], name: str) -> None:
    """Raise if `name` cannot name an adapter, or does so already on one of the targeted weights."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in dir(nn.ModuleDict()):
        raise OptionError(f"name={name!r} was given; a name is letters, digits, '_' and '-', and not a method's")
    for site in targeted:
        own = [a for a in ("adapters", "adapter_state") if hasattr(site.module, a)]
        if own and "adapter_state" not in site.module.__dict__:
            raise UnsupportedLayerError(
                f"{site.label} has an attribute {own[0]!r} of its own, which wrapping would hide"
            )
    taken = [
        site.label
        for site in targeted
        if isinstance(held := site.module._modules.get("adapters"), nn.ModuleDict)
        and name in held
        and (not site.slot_name or site.slot_name in held[name]._modules)
    ]
    if taken:
        raise DuplicateNameError(
            f"{listed(taken)} already has an adapter named {name!r}: choose another name=, "
            f"or unwrap(model, {name!r}) first"
        )
