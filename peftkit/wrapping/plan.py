"""What wrapping would do: which layer gets which adapter, with every check that wrapping makes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from peftkit.adapters.options import require_dtype
from peftkit.errors import (
    DuplicateNameError,
    OptionError,
    TargetError,
    TiedWeightsError,
    UnsupportedLayerError,
    require_choice,
)
from peftkit.wrapping.budget import bytes_of, divide
from peftkit.wrapping.coverage import Covered, coverage, described, warn_of_little
from peftkit.wrapping.divided import settle
from peftkit.wrapping.dry_run import DryRun, Entry
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.price import price, with_rank
from peftkit.wrapping.rule import Rule
from peftkit.wrapping.select import Selection, Selector, listed, reasons, tied_with
from peftkit.wrapping.share import at_every_place, shared_places
from peftkit.wrapping.sites import Site, as_read
from peftkit.wrapping.vectors import is_norm, vectors
from peftkit.wrapping.walk import dotted


@dataclass(frozen=True, repr=False)
class Plan:
    """Say what `wrap` will do, or did. str(plan) is a table.

    Attributes:
        entries: the weights that get an adapter, in the order of the rules and of the model.
        skipped: (name, reason) of what a glob, an expression or a preset matches and does not adapt.
        untie: names of weights that get a copy of their own, with tied="untie".
        coverage: by type of layer, how many numbers its weights hold, and in how many of them that get an adapter.
        shared: with tied="share", weights that get the adapter of another, which is the same weight, and that one.
        why: with a budget, why each weight has its rank, or none.
        budget: in bytes; None without one.

    Example:
        >>> plan = pk.plan(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), "lora", targets="*", rank=2)
        >>> plan.modules, plan.parameters
        (('0',), 32)
        >>> plan.skipped
        (('1', 'LayerNorm is not a Linear or a convolution'),)
    """

    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=())
    untie: frozenset[str] = frozenset()
    coverage: Mapping[str, Covered] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    budget: int | None = None

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(entry.parameters for entry in self.entries)

    @property
    def bytes(self) -> int:
        """The memory that the trainable parameters take."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules that choose this for each weight by its name: `wrap(model, rules=plan.rules)` carries it out.

        Give `wrap` the `tied`, `dtype` and `name` of the plan too.
        """
        groups: dict[tuple[str, str, bool, bool], list[Entry]] = {}
        for entry in self.entries:
            of_norm = is_norm(entry.site.module) and not entry.site.slot_name
            groups.setdefault((entry.kind, repr(entry.options), entry.read, of_norm), []).append(entry)
        return tuple(
            Rule(
                [_exactly(entry.site.name) for entry in own],
                own[0].kind,
                exclude=_beside(own) if of_norm else (),
                read=read,
                **own[0].options,
            )
            for (_, _, read, of_norm), own in groups.items()
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the weights that get an adapter."""
        return tuple(entry.site.name for entry in self.entries)

    def __str__(self) -> str:
        table = Table(
            "pattern", "adapter", "rank", "layers", "route", "parameters", "MB", title="adapters", title_justify="left"
        )
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.pattern, entry.kind, entry.route), []).append(entry)
        for (pattern, kind, route), entries in groups.items():
            parameters, size = sum(e.parameters for e in entries), sum(e.bytes for e in entries)
            layers, ranks = f"{len(entries)}", _ranks(entries)
            table.add_row(escape(pattern), kind, ranks, layers, route, f"{parameters:,}", f"{size / 1e6:.2f}")
        out = io.StringIO()
        console = Console(file=out, width=110)
        console.print(table)
        if self.budget is not None:
            spent = f"{self.bytes:,} of {self.budget:,} bytes, {self.bytes / self.budget:.1%}"
            console.print(f"budget: {spent}; plan.why has the reasons", highlight=False)
        console.print(described(self.coverage, [e.site for e in self.entries]), markup=False, highlight=False)
        for line in reasons(dict(self.skipped)):
            console.print(f"skipped {line}", markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()

    __repr__ = __str__


@of_models
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
    budget: int | str | None = None,
    scores: Mapping[str, Sequence[float] | Tensor] | None = None,
    **options: Any,
) -> Plan:
    """Show what `wrap` would do with the same arguments, with all its checks, and leave the model untouched.

    Args:
        model: the model, wrapped already or not.
        kind: the adapter: one of `peftkit.kinds()`, as "lora".
        targets: patterns of layers; help(peftkit.wrap) lists the sorts of pattern.
        exclude: patterns of layers to leave out.
        rules: `Rule`s, in place of kind, targets, exclude and options.
        name: what the adapter would be called.
        tied: "skip" or "untie" a targeted weight that another module shares, or "share" the adapter too.
        dtype: of the adapters' parameters; by default at least float32.
        budget: what the adapters may take, in bytes or as "5MB": each weight then gets the rank that fits in it best,
            none, or the kind "full" where that takes no more. An `alpha` is that of each weight, γ = α/r: leave it
            out for γ = 1 at every rank. `wrap(model, rules=plan.rules)` carries it out.
        scores: with a budget, weight -> what its first rank is worth, its second, …, as
            `pk.training.gradient_energy` finds in one pass over data; by default all ranks are as equal as they can be.
        **options: the adapter's own options, as rank=8.

    Returns:
        The plan: entries with counts, bytes and routes, and what was skipped and why. The model is read, not changed,
        and no memory is taken for adapters.

    Raises:
        TargetError: a pattern matches no layer, or only layers that are taken or excluded.
        OptionError: an option is unknown, or its value is not possible for a layer.
        UnsupportedLayerError: what a pattern matches cannot be adapted.
        TiedWeightsError: a targeted weight is shared, and tied was not given.
        DuplicateNameError: a targeted layer has an adapter of that name.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
        >>> pk.plan(model, "lora", rank=4).parameters
        204
        >>> pk.plan(model, "lora", targets="1", rank=4).modules
        ('1',)
    """
    rules = _rules(kind, targets, exclude, rules, options)
    if scores is not None and budget is None:
        raise OptionError("scores were given, and no budget to divide by them: give budget='5MB'")
    require_dtype(dtype)
    require_choice("tied", tied, ("skip", "untie", "share", None))
    settle(model)
    selector = Selector(model)
    chosen, skipped = _choose(selector, rules)
    shared = tied_with(model, [selector.all_sites[site] for site in chosen])
    first: dict[str, str] = {}
    if tied == "share":
        chosen, first = at_every_place(chosen, shared_places(model, selector.all_sites, chosen))
    if tied == "skip":
        chosen, skipped = _without_shared(chosen, skipped, shared)
    elif tied is None:
        _refuse_shared(shared)
    dry = DryRun(dtype)
    why: dict[str, str] = {}
    most = None if budget is None else bytes_of(budget)
    if most is not None:
        chosen, why = _within(selector, chosen, first, dry, most, scores)
        skipped = {**skipped, **{site: "the budget gives it no rank" for site in why if site not in chosen}}
    entries = tuple(
        dry.entry(as_read(found) if rule.read or found.read else found, rule, pattern, found.name in first)
        for found, rule, pattern in ((selector.all_sites[site], *choice) for site, choice in chosen.items())
    )
    refuse_taken([entry.site for entry in entries], name)
    shares = coverage(selector.distinct(), [entry.site for entry in entries])
    untie = frozenset(shared) if tied == "untie" else frozenset()
    return Plan(entries, tuple(skipped.items()), untie, shares, first, why, most)


#: site -> the rule and the pattern that selected it
_Choice = Mapping[str, "tuple[Rule, str]"]


def _rules(
    kind: str | None,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    rules: Sequence[Rule] | None,
    options: Mapping[str, Any],
) -> Sequence[Rule]:
    """The rules as given, or the one that a kind with its targets and options stands for."""
    if rules is None:
        if kind is None:
            raise OptionError("wrap needs an adapter kind, as in wrap(model, 'lora'), or rules=[Rule(…), …]")
        return [Rule(targets, kind, exclude=exclude, **options)]
    if kind is not None or options or exclude or targets != "full":
        raise OptionError("give either a kind with targets and options, or rules, which carry their own")
    if not rules:
        raise OptionError("rules is empty: give at least one Rule")
    return rules


def _choose(selector: Selector, rules: Sequence[Rule]) -> tuple[_Choice, dict[str, str]]:
    """The first rule that matches each site, and what matched and is not adapted, with the reasons."""
    chosen: dict[str, tuple[Rule, str]] = {}
    skipped: dict[str, str] = {}
    presets: list[tuple[str, Selection]] = []
    for rule in rules:
        excluded = {site for pattern in rule.exclude for site in selector.every(pattern)}
        for pattern in rule.targets:
            matched = selector.find(pattern)
            presets += [(pattern, matched)] if selector.is_preset(pattern) else []
            found = [site for site in matched.sites if site not in excluded]
            fresh = [site for site in found if site not in chosen]
            if not fresh:
                taken = "are taken by earlier targets" if found else f"are excluded by {', '.join(rule.exclude)}"
                raise TargetError(f"target {pattern!r} of {rule!r} adapts nothing: the layers it matches {taken}")
            chosen.update(dict.fromkeys(fresh, (rule, pattern)))
            skipped |= matched.refused
    for preset, matched in presets:
        warn_of_little(preset, *selector.promised(matched, chosen))
    left = {name: reason for name, reason in skipped.items() if name not in chosen}
    return chosen, {name: reason for name, reason in left.items() if not selector.adapted(name, chosen)}


def _within(
    selector: Selector,
    chosen: _Choice,
    first: Mapping[str, str],
    dry: DryRun,
    budget: int,
    scores: Mapping[str, Sequence[float] | Tensor] | None,
) -> tuple[_Choice, dict[str, str]]:
    """The choice with the ranks that a budget allows, without the weights that get none, and the reasons."""
    owned = {site: choice for site, choice in chosen.items() if site not in first}
    prices = {site: price(selector.all_sites[site], rule, dry) for site, (rule, _) in owned.items()}
    steps, why = divide(prices, budget, scores)
    made: dict[tuple[int, int | None], Rule] = {}
    found: dict[str, tuple[Rule, str]] = {}
    for site, (rule, pattern) in chosen.items():
        own = first.get(site, site)
        rank = prices[own].rank(steps[own])
        if rank != 0:
            found[site] = made.setdefault((id(rule), rank), with_rank(rule, rank)), pattern
    return found, why


def _exactly(name: str) -> str:
    """The pattern of a weight by its whole name."""
    return f"re:{re.escape(name)}"


def _beside(norms: Sequence[Entry]) -> list[str]:
    """The patterns of what norms have beside their weights, which their names stand for too."""
    own = [(entry.site.module_name, slot) for entry in norms for slot in vectors(entry.site.module) if slot]
    return [_exactly(dotted(name, slot)) for name, slot in own]


def _ranks(entries: Sequence[Entry]) -> str:
    """The ranks of some weights, for the table."""
    ranks = [entry.options["rank"] for entry in entries if entry.options.get("rank") is not None]
    low, high = (min(ranks), max(ranks)) if ranks else ("", "")
    return f"{low}" if low == high else f"{low}–{high}"


def _refuse_shared(shared: Mapping[str, str]) -> None:
    """Raise if there are sites whose weight is shared."""
    if shared:
        raise TiedWeightsError(
            f"{listed(f'{a} shares its weight with {b}' for a, b in shared.items())}: merged into one, an "
            "adapter would change both. Pass tied='share' to put one adapter on both, tied='untie' to give the layer "
            "its own copy, or tied='skip'"
        )


def _without_shared(
    chosen: _Choice, skipped: Mapping[str, str], shared: Mapping[str, str]
) -> tuple[_Choice, dict[str, str]]:
    """The choice without the sites whose weight is shared, which are skipped."""
    kept = {site: choice for site, choice in chosen.items() if site not in shared}
    if not kept:
        raise TargetError("every targeted layer shares its weight with another and tied='skip' leaves none")
    return kept, {**skipped, **{site: f"shares its weight with {other}" for site, other in shared.items()}}


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
    hosts = [(site, site.module) for site in targeted]
    taken = [s.label for s, host in hosts if isinstance(host, Adapted) and host.adapter(name, s.slot_name) is not None]
    if taken:
        raise DuplicateNameError(
            f"{listed(taken)} already has an adapter named {name!r}: choose another name=, "
            f"or unwrap(model, {name!r}) first"
        )
