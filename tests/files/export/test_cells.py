"""What is exported is what the program reads: every adapter for every program.

The readers of tests/support/readers were written from the programs' sources, independently of the library. The bound on
ΔW is 1e-6 of its norm (tests/support/cells.py says of what else for adapters that read their base). Every adapter goes
out as it is, in another exact structure, baked against its base, or is refused with a reason: which of these is stated
here cell by cell, from what FORMATS.md says each program reads, so that refusing or baking too much fails too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import peftkit as pk
from tests.support.architectures import EACH_TARGET
from tests.support.cells import (
    LAYERS,
    MIXED,
    RARE_LAYERS,
    TARGETS,
    cell,
    exists,
    of_kinds,
    out,
    require_equal,
    truths,
    weights,
)
from tests.support.readers import READERS
from tests.support.zoo import ADAPTERS

EXACT, LOW, BAKED = "exact", "low rank", "baked"
_MARKS = {"=": EXACT, "~": LOW, "b": BAKED}
#: On the layers of a U-Net: = in the program's own structure, ~ as another of the same ΔW, b baked. FORMATS.md §0, §5
_HOW = """
                      a1111 forge comfyui kohya lycoris diffusers peft
lora                  =     =     =       =     =       =         =
lora rslora           =     =     =       =     =       =         =
lora tucker           =     =     =       =     =       =         =
loha                  =     =     =       ~     =       ~         =
loha tucker           =     =     =       ~     =       ~         =
lokr                  =     =     =       ~     =       ~         =
lokr rank             =     =     =       ~     =       ~         =
lokr tucker           =     =     =       ~     =       ~         =
lokr as told          =     =     =       ~     =       ~         =
loldu                 ~     ~     ~       ~     ~       ~         ~
loldu rank 1          ~     ~     ~       ~     ~       ~         ~
dora                  b     b     b       b     =       =         =
dora full norm        b     b     b       b     =       =         =
dora of loldu         b     b     b       b     =       =         =
dora in               =     =     =       b     b       b         b
dora of loha          b     b     b       b     =       b         b
dora of lokr in       =     =     =       b     b       b         b
full                  =     =     =       ~     =       ~         ~
ia3                   =     b     b       b     b       b         b
ia3 in                =     b     b       b     b       b         b
glora                 =     =     =       b     =       b         b
boft                  =     b     =       b     =       b         b
boft rescaled         =     b     =       b     =       b         b
oft                   =     b     =       b     =       b         b
oft in                b     b     b       b     b       b         =
oft series            b     b     b       b     b       b         =
oft bounded           =     b     =       b     b       b         b
oft rescaled geodesic =     b     b       b     =       b         b
"""
HOW = {
    (line[:21].strip(), target): _MARKS[mark]
    for line in _HOW.splitlines()[2:]
    for target, mark in zip(TARGETS, line[21:].split(), strict=True)
}
#: A1111's (IA)³ and GLoRA are for Linear only; PEFT's OFT rotates patches, which overlap where there is a kernel
HOW_ON: Mapping[tuple[str, str, str], str] = {
    ("ia3", "a1111", "conv 1×1"): BAKED,
    ("ia3", "a1111", "conv 3×3"): BAKED,
    ("glora", "a1111", "conv 1×1"): BAKED,
    ("glora", "a1111", "conv 3×3"): BAKED,
    ("oft in", "peft", "conv 3×3"): BAKED,
    ("oft series", "peft", "conv 3×3"): BAKED,
}
CELLS = [(a, t, layer) for a in ADAPTERS for layer in LAYERS if exists(a, layer) for t in TARGETS]
#: One of each structure: what a program makes of a layer depends on nothing else
STRUCTURES = (
    *(
        "lora",
        "lora tucker",
        "loha",
        "lokr",
        "lokr rank",
        "lokr as told",
        "loldu",
        "full",
        "ia3",
        "ia3 in",
        "glora",
        "oft",
    ),
    *("oft in", "boft", "dora", "dora in", "dora of loha", "dora of lokr in", "oft rescaled geodesic"),
)
RARE_CELLS = [
    (a, t, layer)
    for layer in RARE_LAYERS
    for a in (("lora", "full", "oft") if layer == "transposed" else STRUCTURES)
    if exists(a, layer)
    for t in TARGETS
]


def test_the_table_has_every_adapter() -> None:
    assert {adapter for adapter, _ in HOW} == set(ADAPTERS)
    assert len(CELLS) > 450


@pytest.mark.parametrize("adapter, target, layer", CELLS)
def test_a_program_reads_the_models_own_change(adapter: str, target: str, layer: str) -> None:
    """ΔW to 1e-6 at strength 1, and 0.7·ΔW at 0.7 where the program is linear; every key is read."""
    outcome = cell(adapter, target, layer)
    assert outcome.how == HOW_ON.get((adapter, target, layer), HOW[adapter, target]), outcome


DECOMPOSED = [name for name, case in ADAPTERS.items() if case.options.get("decompose")]


@pytest.mark.parametrize("adapter, target, layer", RARE_CELLS)
def test_on_other_convolutions_a_program_reads_the_same_or_the_reason_is_given(
    adapter: str, target: str, layer: str
) -> None:
    """Nobody reads a transposed convolution, and sd-scripts only Linear and Conv2d.

    LoRA's factors are of the whole convolution in sd-scripts, diffusers and PEFT, not of a group; those of PEFT's LoHa
    and LoKr are of its weight.
    """
    outcome = cell(adapter, target, layer)
    unread = {
        "conv1d": ("kohya",),
        "conv3d": ("kohya",),
        "grouped": ("kohya", "diffusers", "peft"),
        "transposed": TARGETS,
    }
    factors = ADAPTERS[adapter].kind in ("loha", "lokr") and adapter not in ("lokr as told", *DECOMPOSED)
    of_weight = (target, layer) == ("peft", "grouped") and factors
    assert (outcome.how == "refused") == (target in unread[layer] and not of_weight), outcome


@EACH_TARGET
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_file_of_several_layers_is_read_whole(adapter: str, target: str) -> None:
    assert cell(adapter, target, *(name for name in LAYERS if exists(adapter, name))).how != "refused"


@EACH_TARGET
def test_a_file_of_many_kinds_is_read_whole(target: str, tmp_path: Path) -> None:
    model = of_kinds(MIXED)
    report = pk.export(model, out(tmp_path, target), target, family="sd15")
    base, expected = weights(model), truths(model)
    require_equal(READERS[target](out(tmp_path, target), base, "sd15", 1.0), expected)
    assert [w.weight for w in report.weights] == list(MIXED)


PROGRAMS = dict(zip(TARGETS, ("A1111", "Forge", "ComfyUI", "sd-scripts", "LyCORIS", "diffusers", "PEFT"), strict=True))


@EACH_TARGET
def test_a_reason_is_about_the_program_that_was_asked_for(target: str) -> None:
    """Why a cell is baked, refused, or has another law of strength."""
    notes = {
        (adapter, layer): cell(adapter, target, layer).note
        for adapter in STRUCTURES
        for layer in ("linear", "conv 3×3", "grouped")
        if exists(adapter, layer)
    }
    others = [program for name, program in PROGRAMS.items() if name != target]
    assert {at: note for at, note in notes.items() if any(other in note for other in others)} == {}


@EACH_TARGET
@pytest.mark.parametrize(
    "adapter", [name for name, case in ADAPTERS.items() if case.kind in ("dora", "glora", "oft", "boft", "ia3")]
)
def test_bake_writes_the_change_itself(adapter: str, target: str) -> None:
    assert cell(adapter, target, "linear", bake=True).how == BAKED
