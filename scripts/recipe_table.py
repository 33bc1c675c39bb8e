"""Print which training rule is for which kinds, and how near it is to its definition, for docs/guides/optimisers.md.

    python scripts/recipe_table.py

No cell is a claim: kinds are those whose adapters the rule takes, on a Linear, and distances are measured, in fp64,
between the rule and its definition written another way (`tests.support.rules`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peftkit as pk
from peftkit.adapters import registry
from peftkit.errors import OptionError
from peftkit.training import Recipe
from tests.support.rules import RULES, RuleCase
from tests.support.zoo import OPTIONS

#: distances are shown as the first of these that they are below: far from rounding, which is another on other machines
STEPS = (1e-12, 1e-9, 1e-6)


def table() -> str:
    """The table in Markdown."""
    lines = ["| rule | kinds | compared with | largest difference |", "| --- | --- | --- | --- |"]
    for name, case in RULES.items():
        lines.append(f"| `{name}` | {kinds(case)} | {case.definition} | {shown(case)} |")
    return "\n".join(lines)


def kinds(case: RuleCase) -> str:
    """The kinds that a rule takes, by their options in the tests or by those of its own case."""
    own = [kind for kind in pk.kinds() if registry.get(kind).__module__.startswith("peftkit.")]
    taken = [kind for kind in own if takes(case.make, kind) or kind == case.kind]
    return "every kind" if taken == own else ", ".join(f"`{kind}`" for kind in taken)


def takes(make: Callable[[nn.Module], Recipe], kind: str) -> bool:
    """Whether a rule takes adapters of a kind."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pk.wrap(model, kind, **OPTIONS[kind])
    try:
        make(model)
    except OptionError:
        return False
    return True


def shown(case: RuleCase) -> str:
    """The distance of a rule that is to be its definition bit for bit, or a step that it is below."""
    distance = case.distance()
    if case.bound == 0:
        return "none" if distance == 0 else f"{distance:.0e}"
    return f"below {next(step for step in STEPS if distance < step):.0e}"


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
