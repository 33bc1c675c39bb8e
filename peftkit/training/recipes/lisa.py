"""LISA: a few blocks of a model train at a time, drawn anew every few steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.errors import OptionError, TargetError, require_integer, require_option
from peftkit.training.recipes.recipe import Attachment, Recipe
from peftkit.wrapping.pipeline import as_module
from peftkit.wrapping.select import Selector, listed, patterns

#: the block that a weight is in: its name up to the first number, "model.layers.3" of "model.layers.3.mlp.up_proj"
_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


class LISA(Recipe):
    """LISA: every K steps γ blocks are drawn, and their adapters alone train until the next draw.

    Blocks are drawn uniformly, without replacement, from a generator of the rule's own, so that processes with one seed
    draw alike. The adapters of the others have requires_grad False and no gradients, and the optimiser drops its state
    of those that fall asleep: gradients and state take the memory of the blocks that are awake
    (https://arxiv.org/abs/2403.17919). It is for adapters of every kind; with `full` it is the paper's method. What
    layers have in common, as the bank of `vb-lora`, is awake with any of them.

    The optimiser must have been made with the parameters of all blocks. So must DistributedDataParallel, which averages
    the gradients of what trained when it was made, and no others: make it before the rule is attached, with
    find_unused_parameters=True.

    Args:
        model: a wrapped model.
        groups: the blocks, each a pattern of `wrap`'s targets or several; a weight is in the first that matches it. By
            default the names up to the first number, as "model.layers.3", while weights without one, as embeddings and
            the head, stay awake.
        every: K, 20 steps by default.
        awake: γ, 2 blocks by default.
        always: patterns of what stays awake; it is in no block.
        name: of one adapter; by default all.
        seed: of the draws.

    Raises:
        OptionError: γ is more than there are blocks, K or γ is no integer from 1, or a weight is in no block.
        TargetError: a pattern matches no adapted weight, or only those of earlier blocks.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> _ = pk.wrap(model, "full")
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> rule = pk.training.LISA(model, every=10, awake=1, always="3")
        >>> handle = rule.attach(optimizer)  # draws now; handle.remove() wakes all
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['2.adapters.default.change', '3.adapters.default.change']
    """

    wanted: ClassVar[str] = "parameters that train"
    inside: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Sequence[str | Sequence[str]] | None = None,
        every: int = 20,
        awake: int = 2,
        always: str | Sequence[str] = (),
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        require_integer("every", every, 1, "an integer")
        require_integer("awake", awake, 1, "an integer")
        super().__init__(model, name=name)
        sites = list(dict.fromkeys(part.at.site for part in self.parts.values()))
        require_option(not isinstance(groups, str), "groups", groups, "a list of patterns")
        blocks = _selected(as_module(model), sites, groups, always)
        require_option(bool(blocks), "groups", groups, "patterns, as no weight that may sleep has a number in its name")
        require_option(awake <= len(blocks), "awake", awake, f"at most {len(blocks)}, the number of blocks,")
        #: block -> the parameters of its adapters
        self.blocks = {block: self._parameters(own) for block, own in blocks.items()}
        sleeping = {site for own in blocks.values() for site in own}
        self._always = set(self._parameters(site for site in sites if site not in sleeping))
        self._every, self._count = every, awake
        self._generator = torch.Generator().manual_seed(seed)
        self._steps, self._awake = 0, ()

    @property
    def awake(self) -> tuple[str, ...]:
        """The blocks that train now, of those that sleep at times; none before they are drawn."""
        return self._awake

    def takes(self, adapter: Adapter) -> bool:
        return any(p.requires_grad for p in adapter.parameters())

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Draw now, unless a state was loaded, and every K steps of an optimiser; see `Recipe.attach`.

        Returns:
            A handle, whose remove() ends that and wakes all blocks.

        Raises:
            OptionError: the optimiser lacks parameters of a block, or the rule is attached already.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for block, own in self.blocks.items():
            if not all(id(p) in known for p in own):
                raise OptionError(
                    f"LISA: the optimiser was made without parameters of block {block!r}, which may wake later: make "
                    "it of pk.adapter_parameters(model) before the rule is attached"
                )
        attachment = super().attach(optimizer)
        self._wake(self._awake or self._drawn())
        return attachment

    def release_(self) -> None:
        self._wake(tuple(self.blocks))
        self._awake = ()
        super().release_()

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        self._steps += 1
        if self._steps % self._every == 0:
            self._wake(self._drawn())

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "steps": self._steps, "awake": list(self._awake)}

    def resume_(self, state: Mapping[str, Any]) -> None:
        unknown = sorted(set(state["awake"]) - set(self.blocks))
        if unknown:
            raise OptionError(
                f"LISA: the state is of blocks {', '.join(unknown)}, and there is {', '.join(self.blocks)}: make the "
                "rule with the groups of the run that goes on"
            )
        self._generator.set_state(state["generator"])
        self._steps, self._awake = state["steps"], tuple(state["awake"])
        if self._optimizer is not None:
            self._wake(self._awake or self._drawn())

    def _parameters(self, sites: Iterable[str]) -> list[nn.Parameter]:
        """The parameters that train of the adapters on some weights, each once."""
        own = set(sites)
        adapters = (part.adapter for part in self.parts.values() if part.at.site in own)
        return list(dict.fromkeys(p for adapter in adapters for p in adapter.parameters() if p.requires_grad))

    def _drawn(self) -> tuple[str, ...]:
        """Blocks for the next steps, in the order of the model."""
        chosen = set(torch.randperm(len(self.blocks), generator=self._generator)[: self._count].tolist())
        return tuple(block for index, block in enumerate(self.blocks) if index in chosen)

    def _wake(self, names: tuple[str, ...]) -> None:
        """Let some blocks train, and free the gradients and the optimiser's state of the others."""
        assert self._optimizer is not None
        self._awake = names
        # What layers have in common is awake with any of them
        awake = self._always.union(*(self.blocks[block] for block in names))
        for parameter in dict.fromkeys(p for own in self.blocks.values() for p in own):
            parameter.requires_grad_(parameter in awake)
            if parameter not in awake:
                parameter.grad = None
                self._optimizer.state.pop(parameter, None)


def _blocks(sites: Iterable[str]) -> dict[str, list[str]]:
    """Block -> the weights in it, of those with a number in their names."""
    blocks: dict[str, list[str]] = {}
    for site in sites:
        found = _BLOCK.match(site)
        if found:
            blocks.setdefault(found.group(), []).append(site)
    return blocks


def _selected(
    model: nn.Module,
    sites: Sequence[str],
    groups: Sequence[str | Sequence[str]] | None,
    always: str | Sequence[str],
) -> dict[str, list[str]]:
    """Block -> the weights in it, of patterns; what stays awake is in none."""
    selector = Selector(model)

    def matched(pattern: str) -> set[str]:
        found = selector.every(pattern) & set(sites)
        if not found:
            raise TargetError(f"LISA: {pattern!r} matches no weight with an adapter")
        return found

    kept = {site for pattern in patterns(always) for site in matched(pattern)}
    if groups is None:
        return _blocks(site for site in sites if site not in kept)
    blocks: dict[str, list[str]] = {}
    taken = set(kept)
    for group in map(patterns, groups):
        found = {site for pattern in group for site in matched(pattern)} - taken
        if not found:
            raise TargetError(f"LISA: {', '.join(group)!r} matches only what `always` and earlier groups have taken")
        blocks[", ".join(group)] = [site for site in sites if site in found]
        taken |= found
    left = [site for site in sites if site not in taken]
    if left:
        raise OptionError(
            f"groups={groups!r} was given, and {listed(left)} is in none of them: add a group, or name it in always="
        )
    return blocks
