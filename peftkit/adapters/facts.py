"""What a kind is, in a line of a table: its family, its formula, when to use it, and what others call it."""

from __future__ import annotations

from dataclasses import dataclass

#: how the kinds differ: by what ΔW is made of
FAMILIES = (
    "low rank",
    "products",
    "frozen factors",
    "factors of the base",
    "rotations",
    "scales",
    "whole matrices",
)


@dataclass(frozen=True)
class Facts:
    """What tables and `peftkit kinds` say of a kind.

    Attributes:
        family: one of `FAMILIES`; "" for kinds of users that say none.
        formula: ΔW, as text.
        when: ends "use it when …".
        peft: the configuration of PEFT with the options that make the same adapter, "" where there is none.
        lycoris: the algorithm of LyCORIS, with its options, "" where there is none.
    """

    family: str = ""
    formula: str = ""
    when: str = ""
    peft: str = ""
    lycoris: str = ""
