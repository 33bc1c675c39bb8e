"""The command that lists kinds."""

from __future__ import annotations

from collections.abc import Callable

import peftkit as pk
from peftkit.adapters import registry
from tests.support.command import Ran

KINDS = [kind for kind in pk.kinds() if registry.get(kind).__module__.startswith("peftkit.")]


def test_the_command_lists_what_there_is(peftkit: Callable[..., Ran]) -> None:
    ran = peftkit("kinds", "--json", "--shape", "12x8")
    found = {one["kind"]: one for one in ran.json["kinds"]}
    assert found["lora"]["parameters"] == 8 * (12 + 8)
    assert found["lora"]["facts"]["formula"] == "γ·B·A"
    assert {*found} | {reason.partition(":")[0] for reason in ran.json["refused"]} >= {*KINDS}
    shown = peftkit("kinds").out
    assert "γ·B·A" in shown and "not on 768x768: boft" in shown
    assert "two sizes as in 1280x320" in peftkit("kinds", "--shape", "768").err
