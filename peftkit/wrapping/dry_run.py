"""What an adapter on a weight would take and how it would compute, found on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.errors import OptionError, UnsupportedLayerError
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.wrapping.in_common import Pool, own_numbers
from peftkit.wrapping.routes import OUTPUTS, choose, choose_lookup
from peftkit.wrapping.rule import Rule
from peftkit.wrapping.sites import Site
from peftkit.wrapping.vectors import require_kind


@dataclass(frozen=True)
class Entry:
    """One weight and the adapter planned for it.

    Attributes:
        site: the weight; `site.name` is its name in the model.
        kind: the adapter's registered name.
        options: the adapter's options as the rule gives them.
        pattern: the target that selected the weight.
        parameters: how many numbers the adapter trains, without those that it shares with an adapter before it.
        bytes: the memory they take.
        route: how a training step on 4096 tokens or pixels computes: "factored", "dense", "weight" where the weight
            is read without its layer being called, or "input" where the change depends on the layer's input and has
            no dense route.
        read: whether the rule adapts the weight where other code reads it.
    """

    site: Site
    kind: str
    options: dict[str, Any]
    pattern: str
    parameters: int
    bytes: int
    route: str
    read: bool = False


class DryRun:
    """Builds adapters on the meta device, once per distinct shape: counts without memory, and every refusal."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.seen: dict[Any, tuple[Adapter, str]] = {}
        self.pool = Pool()

    def entry(self, site: Site, rule: Rule, pattern: str, again: bool = False) -> Entry:
        """The entry for one site. again: its adapter is another's, and counted there."""
        adapter, route = self._measured(site, rule)
        own = [] if again else own_numbers(adapter, self.pool, site.parameter.device)
        counts = sum(p.numel() for p in own), sum(p.nbytes for p in own)
        return Entry(site, rule.kind, dict(rule.options), pattern, *counts, route, rule.read)

    def alone(self, site: Site, rule: Rule) -> int:
        """The bytes of the rule's adapter on one site, which shares nothing."""
        return sum(p.nbytes for p in self._measured(site, rule)[0].parameters() if p.requires_grad)

    def _measured(self, site: Site, rule: Rule) -> tuple[Adapter, str]:
        geometry = site.slot.geometry
        sort = geometry.shape, geometry.vector, site.looks_up
        key = (*sort, site.dtype, site.slot.base, site.read, repr(rule))
        if key not in self.seen:
            self.seen[key] = self._measure(site, rule)
        return self.seen[key]

    def _measure(self, site: Site, rule: Rule) -> tuple[Adapter, str]:
        """The rule's adapter on one site, without values, and its route."""
        shape = site.slot.geometry.shape
        require_kind(site, rule.kind, decompose=bool(rule.options.get("decompose")))
        weight = torch.empty(shape.rows, shape.columns, dtype=site.dtype, device="meta")
        try:
            adapter = registry.build(rule.kind, shape, weight, self.dtype, **rule.options)
        except OptionError as error:
            raise type(error)(f"{site.label}: {error}") from None
        except TypeError as error:
            raise OptionError(f"{site.label}: {rule!r}: {error}") from error
        if adapter.input_dropout and (site.looks_up or site.read):
            rows = "the input of an embedding is numbers of rows"
            read = "this weight is read without calling its layer"
            raise UnsupportedLayerError(
                f"{site.label}: {rule.kind} with dropout={adapter.input_dropout} drops elements of the layer's "
                f"input, but {rows if site.looks_up else read}; use rank_dropout or leave it out"
            )
        return adapter, self._route(site, adapter, weight)

    def _route(self, site: Site, adapter: Adapter, weight: Tensor) -> str:
        """The route of a training step, as in `Entry.route`; raises where a weight is read and ΔW is no matrix."""
        delta = adapter.delta(weight)
        if site.slot.base is not None:
            return "factored" if delta.is_matrix else "input"
        if site.looks_up and not site.read and delta.is_matrix:
            return choose_lookup(site.slot.geometry.shape, OUTPUTS)
        if not site.read and not site.looks_up:
            narrow = accumulation_dtype(weight.dtype) != weight.dtype
            route = choose([delta], site.slot.geometry.shape, OUTPUTS, training=True, narrow=narrow)
            return route if delta.is_matrix else "input"
        if not delta.is_matrix:
            why = "is looked up, and has no input" if site.looks_up else "is read without calling its layer"
            raise UnsupportedLayerError(
                f"{site.label}: the change of {adapter.kind} depends on the layer's input, but this weight {why}; "
                "leave it out with `exclude`"
            )
        return "weight"
