"""Parameter groups of an optimiser: learning rates by factor and by module, decay where it makes ΔW smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any, NamedTuple

from torch import nn

from peftkit.errors import OptionError, TargetError, did_you_mean, require_number, require_option
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.divided import settle
from peftkit.wrapping.in_common import require_together
from peftkit.wrapping.installed import installed_adapters, names_of
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.select import PRESETS, class_names, patterns, regular_expression
from peftkit.wrapping.walk import named_modules

#: pattern -> learning rate, as a mapping or in pairs
Rules = Mapping[str, float] | Sequence[tuple[str, float]]


@of_models
def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    ratio: float = 1.0,
    weight_decay: float = 0.0,
    rules: Rules = (),
    name: str | None = None,
) -> list[dict[str, Any]]:
    r"""Return the trainable parameters in groups with a learning rate and a weight decay each, for any optimiser.

    With `ratio` this is LoRA+ for every kind that has factors: those that start at 0, as B of LoRA, get lr·ratio, and
    those beside them lr (https://arxiv.org/abs/2402.12354, which advises 16). Weight decay acts on the parameters with
    which ΔW goes to 0: on factors and angles, not on DoRA's magnitudes, on gates or on trained scales.

    Trainable parameters beside the adapters, as a new head, are in the groups too: at lr, with weight decay on those
    of two and more dimensions. What is frozen is left out; what is shared is in one group, once, by the first module
    that has it.

    Args:
        model: a wrapped model.
        lr: η, the learning rate.
        ratio: by how much the rate of a factor that starts at 0 is larger, 1 by default.
        weight_decay: λ of what is decayed, 0 by default.
        rules: pattern -> a learning rate in place of `lr`, as a dict or in pairs. Patterns are those of `wrap`'s
            targets, over every module with trainable parameters, norms and embeddings too; the first that matches
            counts.
        name: of one adapter, whose parameters are taken and no other adapter's; by default all.

    Returns:
        Dicts with "params", "lr" and "weight_decay", no two with the same numbers.

    Raises:
        OptionError: a number is not one that an optimiser takes; `ratio` was given and no adapter has a factor that
            starts at 0 beside others; or nothing requires gradients.
        TargetError: a pattern matches no module with trainable parameters, or only what earlier ones have taken.
        UnknownAdapterError: there is no adapter of that name, or none at all.
        SharedParameterError: a parameter that adapters share has become several.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> groups = pk.parameter_groups(model, lr=1e-4, ratio=16, rules={"2": 2e-4})
        >>> [(group["lr"], len(group["params"])) for group in groups]
        [(0.0016, 1), (0.0001, 1), (0.0032, 1), (0.0002, 1)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    for option, value in (("lr", lr), ("ratio", ratio), ("weight_decay", weight_decay)):
        require_number(option, value)
    require_option(ratio != 0, "ratio", ratio, "a number above 0")
    trained = list(_trained(model, name))
    if not trained:
        raise OptionError("no parameter of the model requires gradients: there is nothing to train")
    if ratio != 1 and not any(each.starts_at_zero for each in trained):
        raise OptionError(
            f"ratio={ratio!r} was given, but no adapter on this model has a factor that starts at 0 beside others: "
            "leave it out"
        )
    rates = _rates(model, _pairs(rules), trained, lr)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for each, rate in zip(trained, rates, strict=True):
        key = rate * ratio if each.starts_at_zero else rate, weight_decay if each.decays else 0.0
        groups.setdefault(key, []).append(each.parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


class _Trained(NamedTuple):
    """A trainable parameter, the module that rules know it by, and what is known of it."""

    parameter: nn.Parameter
    #: names of its weight and of its module; they differ for the projections of an attention
    owners: tuple[str, ...]
    starts_at_zero: bool
    decays: bool


def _trained(model: nn.Module, name: str | None) -> Iterator[_Trained]:
    """Every trainable parameter once: the adapters', weight by weight, then the others, module by module."""
    settle(model)  # an optimiser of what a forward pass has left whole would change nothing
    seen: set[int] = set()
    names = names_of(model, name)
    require_together(model, names)
    for at in installed_adapters(model, names):
        host = at.site.removesuffix(f".{at.slot_name}") if at.slot_name else at.site
        for key, parameter in at.adapter.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                owners = tuple(dict.fromkeys((at.site, host)))
                yield _Trained(parameter, owners, key in at.adapter.starts_at_zero, key in at.adapter.decays)
    for module_name, module in named_modules(model):
        for parameter in own_parameters(module).values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Trained(parameter, (module_name,), False, parameter.dim() > 1)


def _rates(
    model: nn.Module, rules: Sequence[tuple[str, float]], trained: Sequence[_Trained], lr: float
) -> Sequence[float]:
    """The learning rate of each parameter by the first rule that matches it, before `ratio`."""
    names = _Names(model, tuple(dict.fromkeys(owner for each in trained for owner in each.owners)))
    chosen: dict[int, float] = {}
    for pattern, rate in rules:
        selected = names.selected(pattern)
        found = [i for i, each in enumerate(trained) if not selected.isdisjoint(each.owners)]
        fresh = [i for i in found if i not in chosen]
        if not fresh:
            what = "only what earlier rules have taken" if found else "no module with trainable parameters"
            raise TargetError(f"rule {pattern!r} matches {what}.{'' if found else did_you_mean(pattern, names.owners)}")
        chosen |= dict.fromkeys(fresh, rate)
    return [chosen.get(i, lr) for i in range(len(trained))]


class _Names:
    """The names of a model's modules, and of those that own trainable parameters, for patterns to select among."""

    def __init__(self, model: nn.Module, owners: Sequence[str]) -> None:
        self.owners = owners
        self.modules = dict(named_modules(model, every_name=True))
        #: module -> the first of its names, which its parameters go by
        self.first = {id(module): name for name, module in named_modules(model)}

    def selected(self, pattern: str) -> set[str]:
        """The owners that a pattern selects; it means what it does as a target, over modules of any class."""
        if pattern.startswith("re:"):
            return self._named(regular_expression(pattern[3:]))
        if any(c in pattern for c in "*?["):
            return self._named(re.compile(translate(pattern)))
        if pattern in self.modules or pattern in self.owners:
            return self._inside([pattern])
        classes = re.compile(PRESETS.get(pattern, re.escape(pattern)))
        typed = [name for name, module in self.modules.items() if any(map(classes.fullmatch, class_names(module)))]
        return self._inside(typed) or self._named(re.compile(rf".*\.{re.escape(pattern)}"))

    def _named(self, regex: re.Pattern[str]) -> set[str]:
        """The owners of which a whole name matches."""
        found = {self.first[id(module)] for name, module in self.modules.items() if regex.fullmatch(name)}
        return {owner for owner in self.owners if owner in found or regex.fullmatch(owner)}

    def _inside(self, names: Sequence[str]) -> set[str]:
        """The owners of these names, and those inside the modules of these names."""
        holders = {self.first[id(self.modules[name])] if name in self.modules else name for name in names}
        return {owner for owner in self.owners if not holders.isdisjoint(_with_parents(owner))}


def _with_parents(name: str) -> list[str]:
    """The name of a module and those of the modules around it, the root's last: "a.b", "a", ""."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _pairs(rules: Rules) -> list[tuple[str, float]]:
    """The rules in pairs, checked."""
    given = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for rule in given:
        paired = isinstance(rule, (tuple, list)) and len(rule) == 2
        require_option(paired, "rules", rules, "a dict, or pairs, of a pattern and a learning rate")
        patterns(rule[0])
        require_number(f"rules[{rule[0]!r}]", rule[1])
    return given
