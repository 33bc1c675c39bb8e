"""What an adapter on a weight costs at every rank that it can have."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from peftkit.adapters import registry
from peftkit.errors import OptionError
from peftkit.wrapping.dry_run import DryRun
from peftkit.wrapping.rule import Rule
from peftkit.wrapping.sites import Site


@dataclass(frozen=True)
class Price:
    """What an adapter on one weight costs, in bytes.

    Attributes:
        ranks: those worth having, rising.
        bytes: what each of them takes, rising too.
        full: of a ΔW of every number.
    """

    ranks: tuple[int, ...]
    bytes: tuple[int, ...]
    full: int

    @property
    def narrow(self) -> int:
        """How many of the ranks take less than a full ΔW."""
        return sum(own < self.full for own in self.bytes)

    def steps(self) -> list[int]:
        """Return what each step to the next rank costs; the last one is to a full ΔW, if a rank would cost as much."""
        totals = [0, *self.bytes[: self.narrow]] + [self.full] * (self.narrow < len(self.bytes))
        return [after - before for before, after in itertools.pairwise(totals)]

    def rank(self, step: int) -> int | None:
        """Return the rank after so many steps; None for a full ΔW."""
        return 0 if step == 0 else self.ranks[step - 1] if step <= self.narrow else None


def price(site: Site, rule: Rule, dry: DryRun) -> Price:
    """Return what the rule's adapter on one weight costs at every rank.

    Raises:
        OptionError: the rule's kind has no rank of its own, the rule gives one, or larger ranks cost less.
    """
    cls = registry.get(rule.kind)
    why_not = f"{rule!r} gives one" if "rank" in rule.options else "" if registry.takes(cls, "rank") else "it has none"
    if why_not or cls.shares:
        raise OptionError(
            f"{site.label}: a budget chooses a rank for each weight, and {rule.kind} takes none: "
            f"{why_not or 'layers share its numbers'}. Leave it out, or name another kind"
        )
    shape = site.slot.geometry.shape
    costs = _costs(site, rule, dry, min(shape.rows, shape.columns))
    if costs[max(costs)] < costs[min(costs)]:
        raise OptionError(
            f"{site.label}: {rule.kind} takes fewer bytes the larger its rank, so that a budget does not say which to "
            "take. Give it a rank and no budget"
        )
    kept: dict[int, int] = {}
    for rank, cost in sorted(costs.items(), reverse=True):
        if not kept or cost < min(kept.values()):  # no larger rank takes as little
            kept[rank] = cost
    ranks = tuple(sorted(kept))
    return Price(ranks, tuple(kept[rank] for rank in ranks), dry.alone(site, with_rank(rule, None)))


def _costs(site: Site, rule: Rule, dry: DryRun, most: int) -> Mapping[int, int]:
    """The bytes at every rank that the kind can have: found on a line where four of them are on one."""
    try:
        seen = {rank: dry.alone(site, with_rank(rule, rank)) for rank in (1, min(2, most), min(3, most), most)}
    except OptionError:
        seen = {}
    if seen:
        first, more = seen[1], seen[min(2, most)] - seen[1]
        line = {rank: first + (rank - 1) * more for rank in range(1, most + 1)}
        if all(line[rank] == cost for rank, cost in seen.items()):
            return line
    found: dict[int, int] = {}
    refusal: OptionError | None = None
    for rank in range(1, most + 1):
        try:
            found[rank] = dry.alone(site, with_rank(rule, rank))
        except OptionError as error:
            refusal = refusal or error
    if not found:
        assert refusal is not None
        raise refusal
    return found


def with_rank(rule: Rule, rank: int | None) -> Rule:
    """Return the rule with a rank; None for a full ΔW."""
    if rank is None:
        return Rule(rule.targets, "full", exclude=rule.exclude, read=rule.read)
    return Rule(rule.targets, rule.kind, exclude=rule.exclude, read=rule.read, **rule.options, rank=rank)
