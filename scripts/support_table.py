"""Print which program reads which adapter how, as docs/guides/programs.md has it (scripts/readme_tables.py writes it).

    python scripts/support_table.py

No cell is a claim: each is what became of adapters that were trained, exported and read back as the program reads
them (`tests.support.cells.cell`), on a Linear, a 1×1 and a 3×3 convolution. If one of them is read as another ΔW, this
fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.cells import ALL_LAYERS, LAYERS, TARGETS, Outcome, cell, exists

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peftkit.files.export import programs
from tests.support.language_cells import LANGUAGE, language_cell
from tests.support.zoo import ADAPTERS

#: title -> the cases of tests/support/zoo.py; those after the first by what sets them apart
ROWS: dict[str, dict[str, str]] = {
    "`lora`, `locon`": {"lora": "", "lora rslora": "`rslora=True`", "lora tucker": "`tucker=True`"},
    "`loha`": {"loha": "", "loha tucker": "`tucker=True`"},
    "`lokr`": {"lokr": "", "lokr rank": "low rank", "lokr tucker": "`tucker=True`"},
    "`loldu`": {"loldu": "", "loldu rank 1": "`train_scale=False`"},
    "`dora`": {"dora": "", "dora of loldu": '`inner="loldu"`'},
    "`dora` of `loha`, `lokr`": {"dora of loha": ""},
    '`dora` of any, `axis="in"`': {"dora in": "", "dora of lokr in": "`lokr`"},
    "`oft`": {"oft": "", "oft rescaled geodesic": "`rescale=True`"},
    '`oft`, `side="in"`': {"oft in": "", "oft series": "`terms=5`"},
    "`boft`": {"boft": "", "boft rescaled": "`rescale=True`"},
    "`ia3`": {"ia3": "", "ia3 in": '`side="in"`'},
    "`glora`": {"glora": ""},
    "`full`": {"full": ""},
}
#: the same of kinds whose ΔW is of a structure that one of these has
METHODS: dict[str, dict[str, str]] = {
    "`svdlora`": {"svdlora": ""},
    "`lora-fa`": {"lora-fa": ""},
    "`mos`": {"mos": ""},
    "`melora`": {"melora": ""},
    "`block-lora`": {"block-lora": ""},
    "`mora`": {"mora": "", "mora rope": '`mode="rope"`'},
    "`miss`": {"miss": "", "miss bat": "`bat=True`"},
    "`vera`": {"vera": ""},
    "`randlora`": {"randlora": "", "randlora of peft": '`pairing="peft"`'},
    "`lora-xs`": {"lora-xs": ""},
    "`svdiff`": {"svdiff": ""},
    "`svft`": {"svft": ""},
    "`anchored`": {"pissa": "", "olora": '`start="olora"`'},
    "`vb-lora`": {"vb-lora": ""},
    "`tied-lora`": {"tied-lora": ""},
    "`tiny-lora`": {"tiny-lora": ""},
    "`fourierft`": {"fourierft": ""},
    "`dylora`": {"dylora": ""},
    "`t-lora`": {"t-lora": ""},
}
#: rows of the table of language models: title -> the case of tests/support/language_cells.py
OTHER_LAYERS = {
    "LoRA of an embedding that is the output's weight too": ["tied embedding"],
    "LoRA of another embedding": ["embedding"],
    "LoRA of the output": ["output"],
    "LoRA of GPT-2's `Conv1D`": ["conv1d"],
    "LoRA of stacks of experts": ["experts"],
    "`full` of a norm": ["norm"],
    "a head that trained beside": ["head"],
}
#: how layers are called in a sentence
PLACES = {"linear": "a Linear", "conv 1×1": "a 1×1 convolution", "conv 3×3": "a 3×3 convolution"}
RARE = {
    "conv1d": "1-dimensional convolutions",
    "conv3d": "3-dimensional convolutions",
    "grouped": "grouped convolutions",
    "transposed": "transposed convolutions",
}

LEGEND = (
    "*exact*: in the program's own structure. *low rank*: as a LoRA of the same ΔW, or ΔW itself, on any base. "
    "*baked*: as ΔW on the base it was exported with."
)
#: footnote marks at the end of a cell
_MARKS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹˒]+")


def table() -> str:
    """The table with its footnotes and what is refused, in Markdown."""
    lines, notes = _table(ROWS | METHODS)
    return "\n".join([*lines, "", LEGEND, *_footnotes(notes), "", *_refusals()]).rstrip()


def table_of(kind: str) -> str:
    """The rows of one kind with their footnotes."""
    own = {row: cases for row, cases in (ROWS | METHODS).items() if f"`{kind}`" in row.partition(" of ")[0]}
    lines, notes = _table(own)
    return "\n".join([*lines, *_footnotes(notes)]).rstrip()


def short() -> str:
    """The table without footnotes: a cell that depends on options or on the layer ends in an asterisk."""
    lines, _ = _table(ROWS)
    return "\n".join([*(_MARKS.sub("\\\\*", line) for line in lines), "", LEGEND])


def language() -> str:
    """What programs for language models read: every kind on the projections of a small Llama, and rare layers."""
    titles = [programs.get(target).title for target in LANGUAGE]
    lines = [f"| adapter | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    for row, cases in [*((row, list(cases)[:1]) for row, cases in ROWS.items()), *OTHER_LAYERS.items()]:
        lines.append(f"| {row} | {' | '.join(language_cell(cases[0], target) for target in LANGUAGE)} |")
    return "\n".join(lines)


def _table(chosen: Mapping[str, Mapping[str, str]]) -> tuple[list[str], list[str]]:
    titles = [programs.get(target).title for target in TARGETS]
    lines = [f"| adapter | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    notes: list[str] = []
    for row, cases in chosen.items():
        shown = [_shown(cases, target, notes) for target in TARGETS]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return lines, notes


def _footnotes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"{_mark(number)} {note}.  " for number, note in enumerate(notes, 1))] if notes else []


def _shown(cases: Mapping[str, str], target: str, notes: list[str]) -> str:
    """What the first case is, marked with footnotes where that depends on the layer or on options."""
    found = {(case, layer): cell(case, target, layer) for case in cases for layer in LAYERS if exists(case, layer)}
    first = next(iter(found.values()))
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for at, outcome in found.items():
        if outcome.how != first.how or outcome.how == "exact":
            groups.setdefault((outcome.how, _reason(outcome)), []).append(at)
    marks: list[str] = []
    for (how, reason), at in groups.items():
        if how != first.how:
            note = f"{how}{_where(at, found, cases)}" + (f": {reason}" if reason else "")
        elif reason:
            exact = [key for key, outcome in found.items() if outcome.how == how]
            note = "a strength s does not mean s·ΔW there" + ("" if at == exact else _where(at, found, cases))
        else:
            continue
        if note not in notes:
            notes.append(note)
        marks.append(_mark(notes.index(note) + 1))
    return first.how + "˒".join(dict.fromkeys(marks))


def _where(at: list[tuple[str, str]], found: dict[tuple[str, str], Outcome], cases: Mapping[str, str]) -> str:
    """ " with rescale=True", " on a 3×3 convolution", or both."""
    parts: list[str] = []
    for case in dict.fromkeys(case for case, _ in at):
        layers = [layer for own, layer in at if own == case]
        every = len(layers) == sum(own == case for own, _ in found)
        places = " or ".join(PLACES[layer] for layer in layers)
        parts.append((f" with {cases[case]}" if cases[case] else "") + ("" if every else f" on {places}"))
    return " and".join(parts)


def _reason(outcome: Outcome) -> str:
    note = outcome.note.partition("path='geodesic'")[0].removesuffix("; ")
    return note.removesuffix(": holds for this base only")


def _mark(number: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(number))


def _refusals() -> list[str]:
    """One sentence for each layer that programs get no adapter of, or not every kind."""
    cases = [case for row in ROWS.values() for case in row]
    lines: list[str] = []
    for layer, title in RARE.items():
        refusals: dict[str, list[str]] = {}
        for target in TARGETS:
            outcomes = {case: cell(case, target, layer) for case in cases if exists(case, layer)}
            refused = [outcome for outcome in outcomes.values() if outcome.how == "refused"]
            if refused:
                read = dict.fromkeys(f"`{ADAPTERS[c].kind}`" for c, o in outcomes.items() if o.how != "refused")
                part = f" (except {', '.join(read)})" if read else ""
                own = programs.get(target).title
                reason = refused[0].note.removeprefix(f"{ALL_LAYERS[layer].path}: ").replace(own, "it")
                refusals.setdefault(reason, []).append(own + part)
        for reason, refusing in refusals.items():
            everywhere = len(refusing) == len(TARGETS)
            lines.append(f"Refused on {title}{'' if everywhere else ' for ' + ', '.join(refusing)}: {reason}.  ")
    return lines


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
