"""Renew the generated parts of README.md and docs/: what adapters cost, which program reads them, what was measured.

    python scripts/readme_tables.py

A generated part stands between <!-- name --> and <!-- /name -->. Numbers come from benchmarks/results/ and, for the
digits, from the last `make demo`; what programs read comes from exporting and reading (scripts/support_table.py).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_table
import recipe_table
import support_table

import peftkit as pk
from peftkit.adapters import registry
from peftkit.adapters.describe import Description
from peftkit.adapters.facts import FAMILIES
from peftkit.bench.rows import Row, read
from peftkit.bench.timing import Spread

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "out" / "digits"
RESULTS = ROOT / "benchmarks" / "results"

#: the layers of the step table
STEP_CASES = ("320×320, 64 tokens", "1280×1280, 64 tokens", "1280×1280, 512 tokens", "conv 1280×1280 k3, 16²")

#: the kinds of README.md, of a structure of their own
STRUCTURES = ("lora", "loha", "lokr", "loldu", "dora", "oft", "boft", "ia3", "glora", "full")


#: the options that parameters are counted for, where they are not the defaults
COUNTED: dict[str, dict[str, Any]] = {
    "dora": {"rank": 8},
    "oft": {"block_size": 32},
    "lora-xs": {"rank": 32},
    "fourierft": {"frequencies": 1000},
    "loldu": {"rank": 256},
    "boft": {"block_size": 8},
    "svdlora": {"rank": 8},
    "dylora": {"rank": 8},
    "anchored": {"rank": 8},
    "miss": {"rank": 8},
    "melora": {"rank": 8, "blocks": 4},
    "block-lora": {"rank": 8, "blocks": 4},
    "svft": {"off_diag": 4},
    "vb-lora": {"rank": 4, "vectors": 90},
    "tiny-lora": {"size": 13},
}


def described(kind: str) -> Description:
    """A kind on a 768×768 Linear, with the options of the table."""
    return pk.describe(kind, 768, 768, **COUNTED.get(kind, {}))


def _options(found: Description) -> str:
    """The options that say how many numbers there are: those given, or rank and the like as they are by default."""
    given = COUNTED.get(found.kind) or {
        name: found.options[name]
        for name in ("rank", "block_size", "factor", "frequencies")
        if found.options.get(name) is not None
    }
    return f"`{', '.join(f'{name}={value}' for name, value in given.items())}`" if given else ""


def adapters_table() -> str:
    """What the kinds of README.md are, with what they train on a 768×768 Linear."""
    rows = ["| adapter | ΔW | options | parameters | use it when |", "| --- | --- | --- | ---: | --- |"]
    for found in map(described, STRUCTURES):
        names = ", ".join(f"`{name}`" for name in (found.kind, *found.aliases) if "_" not in name)
        facts = found.facts
        rows.append(f"| {names} | {facts.formula} | {_options(found)} | {found.parameters:,} | {facts.when} |")
    return "\n".join(rows)


def kinds_tables() -> str:
    """All kinds by family: what they are, what files of them hold, what others call them, and their papers."""
    own = [kind for kind in pk.kinds() if registry.get(kind).__module__.startswith("peftkit.")]
    found = [described(kind) for kind in own]
    head = ["| adapter | ΔW | options | parameters | use it when | in files | in PEFT | in LyCORIS | source |"]
    head.append("| --- | --- | --- | ---: | --- | --- | --- | --- | --- |")
    parts: list[str] = []
    for family in FAMILIES:
        rows = [_kind_row(one) for one in found if one.facts.family == family]
        parts += [f"**{family.capitalize()}**", "", *head, *rows, ""]
    return "\n".join(parts).rstrip()


def _kind_row(found: Description) -> str:
    others = " ".join(f"`{name}`" for name in found.aliases if "_" not in name)
    facts, paper = found.facts, found.paper.rpartition("/")[2]
    cells = [
        f"[`{found.kind}`]({found.kind}.md) {others}".rstrip(),
        facts.formula,
        _options(found),
        f"{found.parameters:,}",
        facts.when,
        _in_files(found.kind),
        facts.peft and f"`{facts.peft}`",
        facts.lycoris,
        f"[{paper}]({found.paper})",
    ]
    return f"| {' | '.join(cells)} |"


def _in_files(kind: str) -> str:
    """What programs get, of the first row of the table on the kind's page."""
    page = (ROOT / "docs" / "algorithms" / f"{kind}.md").read_text()
    table = page.partition("<!-- support -->")[2].strip().splitlines()
    titles, cells = ([cell.strip() for cell in line.strip("|").split("|")][1:] for line in (table[0], table[2]))
    groups: dict[str, list[str]] = {}
    for title, cell in zip(titles, cells, strict=True):
        groups.setdefault(cell.rstrip("⁰¹²³⁴⁵⁶⁷⁸⁹˒"), []).append(title)
    if len(groups) == 1:
        return next(iter(groups))
    *few, most = sorted(groups, key=lambda how: len(groups[how]))
    return "; ".join([*(f"{how} in {', '.join(groups[how])}" for how in few), f"{most} elsewhere"])


def digits_table(measured: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| adapter | parameters | file kB | held-out loss | samples that are 9s | merged into another base |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, row in measured.items():
        loss = row.get("held-out after", row.get("held-out"))
        size = f"{row['parameters']:,} | {row['kB']:.0f}" if "kB" in row else " | "
        rows.append(
            f"| {'(base)' if kind == 'base' else kind} | {size} | {loss:.4f} | {row['share']:.0%} "
            f"| {row['share on the other base']:.0%} |"
        )
    rows += [
        "",
        "Held-out loss: of the 490 other nines, on the noisier half of the diffusion's times. Samples: 100 of every "
        f"model, judged by a classifier that is right about {measured['base']['judge accuracy']:.1%} of real digits. "
        "The files of LoLDU, LoRA-XS and PiSSA carry their base's factors, so that they fit another base; without them "
        "they are small.",
    ]
    return "\n".join(rows)


def replaced(text: str, name: str, table: str) -> str:
    """The text with what stands between <!-- name --> and <!-- /name --> replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"there is no {start} in the document"
    return pattern.sub(lambda _: f"{start}\n\n{table}\n\n{end}", text)


def checkpoint_line(measured: dict[str, Any]) -> str:
    lora = next(row["values"] for row in measured["rows"] if row["kind"] == "lora")
    peer = ""
    if "lycoris / merge" in lora:
        peer = (
            f" The merge of lycoris-lora 4.1.3, given the same weights in a model, takes {lora['lycoris / merge']} "
            f"times as long and {lora['lycoris memory MB']:,} MB."
        )
    return (
        f"Merging a rank-16 LoCon into an {lora['parameters'] / 1e6:.0f}M-parameter fp16 checkpoint takes "
        f"{lora['memory MB']} MB of memory beside the interpreter, and {lora['merge / copy']} times as long as copying "
        f"the file (`make bench`).{peer}"
    )


def by_kind(found: dict[str, Any], question: str) -> dict[str, dict[str, dict[str, Any]]]:
    """kind -> case -> values, of the rows of a results file that answer a question."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["question"] == question:
            cells.setdefault(row["kind"], {})[row["case"]] = row["values"]
    return cells


def stopping(found: dict[str, Any]) -> str:
    """What stopping where a rule says costs, against timers; and what moves it."""
    rules, rates, noise, null = (by_kind(found, name) for name in ("rules", "learning rates", "noise", "random walk"))
    counts = {task: row["runs"] for task, row in by_kind(found, "runs")["oracle"].items()}
    tasks = list(rules["never stop"])
    runs = ", ".join(f"{counts[task]} of {task}" for task in tasks)
    lines = [
        f"Measured on {sum(counts[task] for task in tasks)} runs that overfit ({runs}; six kinds of adapters, "
        "each with several draws of adapter and data; `python benchmarks/trajectories.py && python "
        "benchmarks/early_stopping.py`). Regret: the validation loss at the returned step over the best of the run, "
        "minus 1, in per cent. Timer: the same of a fixed step, the median of those the rule returned on that task. "
        "The last seven rows are criteria that are not in the library, each with the threshold that is best on digit-9 "
        "and movies.",
        "",
        "| rule | " + " | ".join(f"{task}: regret (timer)" for task in tasks) + " |",
        "| --- |" + " ---: |" * len(tasks),
    ]
    for name, by_task in rules.items():
        cells = [f"{row['regret']:.1f} ({row['timer']:.1f})" for row in by_task.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *verdict(found)]
    lines += [
        "",
        "Learning rates of a third and three times (median steps, and regret with that of a timer set at the plain "
        "rate). The best step moves with the rate; those of the rules stay with their windows:",
        "",
        "| task | best step | paper, window 10 | robust, window 5 | robust, window 10 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for task, oracle in rates["oracle"].items():
        cells = [
            "{steps:.0f}: {regret:.1f} ({one timer:.1f})".format_map(rates[name][task])
            for name in ("paper, window 10", "robust, window 5", "robust, window 10")
        ]
        lines.append(f"| {task} | {oracle['steps']:.0f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Noise of the measurement, as a share of the range of CS (median steps, window 10):",
        "",
        "| rule | " + " | ".join(tasks) + " |",
        "| --- |" + " ---: |" * len(tasks),
    ]
    for name, by_task in noise.items():
        lines.append(f"| {name} | " + " | ".join(f"{by_task[task]['steps']:.0f}" for task in tasks) + " |")
    walks = "; ".join(
        name + ": {median:.1f} ({low:.1f} to {high:.1f})".format_map(row["windows"]) for name, row in null.items()
    )
    lines += ["", f"Windows until a random walk shows its second valley, median (10 % to 90 %): {walks}."]
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> list[str]:
    """Whether a criterion that was searched for beats what is there, on what it was not chosen by."""
    ((champion, contest),) = by_kind(found, "contest").items()
    own = contest["regret"]["gap"]

    def against(name: str) -> str:
        return "{gap:+.1f} ({low:+.1f} to {high:+.1f})".format_map(contest[name])

    rules = [name for name in contest if name.startswith(("paper", "authors", "robust"))]
    best = max(rules, key=lambda name: contest[name]["gap"])
    beaten = all(contest[name]["high"] < 0 for name in (best, "its timer", "one timer"))
    assert not beaten, "a criterion beats rule and timers: it belongs into the library, and another sentence here"
    return [
        f"The best of the criteria on digit-9 and movies is {champion}. On the other tasks and their learning rates "
        f"its regret is {own:.1f} points in the mean over tasks; against the best second-valley rule "
        f"({best}) that is {against(best)}, against a timer set to its own median on each task {against('its timer')}, "
        f"and against one timer for all of them {against('one timer')}, with the intervals that hold 90 % of bootstrap "
        "samples. It does not beat the timers, so the library does not offer it. What all this says: with windows that "
        "fit the run every rule is far better than not stopping, and none is better than a timer that is set well. The "
        "second valley is a timer of about five windows, and the window is the setting that matters: take one of which "
        "five are about as long as you would train at first guess, and look at the picture.",
    ]


def watching_table(found: dict[str, Any]) -> str:
    by = by_kind(found, "monitor")
    models = list(next(iter(by.values())))
    rows = ["| adapter |" + "".join(f" {name} | ΔW built |" for name in models) + " memory¹ |"]
    rows.append("| --- |" + " ---: | ---: |" * len(models) + " ---: |")
    for kind, row in by.items():
        cells = [f" {row[name]['added']:.2%} | {row[name]['naive']:.2%} |" for name in models]
        memory = max(row[name]["memory"] for name in models)
        rows.append(f"| `{kind}` |" + "".join(cells) + f" {memory:.2f} |")
    return "\n".join(
        [*rows, "", "¹ the largest allocation of a measurement over the largest weight; building ΔW takes 1."]
    )


def step_table(found: list[Row]) -> str:
    """A training step of one layer over the frozen layer, ours and the peers'; and how the other cells do."""
    shown = [row for row in found if row.dtype == "float32"]
    cases = [case for case in dict.fromkeys(row.case for row in shown) if case in STEP_CASES]
    lines = [
        "| adapter | " + " | ".join(cases) + " | kept MB at 4096×4096, 512 tokens |",
        "| --- |" + " --- |" * (len(cases) + 1),
    ]
    by = {(row.kind, row.case): row for row in shown}
    for kind in dict.fromkeys(row.kind for row in shown):
        cells = [_ours_and_others(by[kind, case].ratio) for case in cases]
        kept = by[kind, "4096×4096, 512 tokens"].memory
        others = ", ".join(f"{way} {kept[way]:.3g}" for way in kept if way != "ours")
        lines.append(f"| `{kind}` | " + " | ".join(cells) + f" | **{kept['ours']:.3g}** {others} |")
    compared = [row for row in found if row.against_best is not None]
    slower = [row for row in compared if (row.against_best or 0) > 1.1]
    worst = max(compared, key=lambda row: row.against_best or 0)
    lines += [
        "",
        f"In {len(compared) - len(slower)} of {len(compared)} cells (kinds × layers × fp32 and bf16) ours is the "
        f"fastest or within 10 % of it; the worst is {worst.against_best:.2f} times the best peer ({worst.kind}, "
        f"{worst.case}, {worst.dtype}).",
    ]
    return "\n".join([*lines, "", *every_step(found)])


def every_step(found: list[Row]) -> list[str]:
    """All cells, folded: a row per layer and dtype, a column per kind."""
    kinds = list(dict.fromkeys(row.kind for row in found))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in found:
        others = [f"{spread.median:.2f}" for way, spread in row.ratio.items() if way != "ours"]
        shown = f"**{row.ratio['ours'].median:.2f}**" + (f" ({', '.join(others)})" if others else "")
        cells.setdefault((row.case, row.dtype), {})[row.kind] = shown
    return [
        "<details><summary>Every cell: ours (lycoris, its bypass but for DoRA, PEFT)</summary>",
        "",
        "| layer | dtype | " + " | ".join(f"`{kind}`" for kind in kinds) + " |",
        "| --- | --- |" + " --- |" * len(kinds),
        *(
            f"| {case} | {dtype} | " + " | ".join(own[kind] for kind in kinds) + " |"
            for (case, dtype), own in cells.items()
        ),
        "",
        "</details>",
    ]


def _ours_and_others(ratio: dict[str, Spread]) -> str:
    others = ", ".join(f"{way} {spread.median:.2f}" for way, spread in ratio.items() if way != "ours")
    return f"**{ratio['ours'].median:.2f}** {others}"


def merge_table(found: list[Row]) -> str:
    """Merging for good, in seconds, and the memory it takes."""
    lines = ["| adapter | model | ours s (MB) | lycoris s (MB) | peft s (MB) |", "| --- | --- | ---: | ---: | ---: |"]
    for row in found:
        cells = [
            f"{row.ratio[way].median * row.reference_ms / 1e3:.2f} ({row.memory[way]:.0f})" if way in row.ratio else ""
            for way in ("ours", "lycoris", "peft")
        ]
        lines.append(f"| `{row.kind}` | {row.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ops_table(found: list[Row]) -> str:
    """Building ΔW and adding it, over the floor."""
    lines = [
        "| operation | adapter | layer | dtype | ours | lycoris | peft | ours MB |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        if row.question in ("dense", "add") and row.case.startswith("4096"):
            ways = ("ours", "lycoris", "peft")
            cells = [f"{row.ratio[way].median:.1f}" if way in row.ratio else "" for way in ways]
            name = {"dense": "building ΔW", "add": "adding it to W"}[row.question]
            lines.append(
                f"| {name} | `{row.kind}` | {row.case} | {row.dtype} | "
                + " | ".join(cells)
                + f" | {row.memory['ours']:.1f} |"
            )
    return "\n".join(lines)


def unet_table(found: list[Row]) -> str:
    """A training step of the whole U-Net, and the MB it keeps for backward beyond the frozen one."""
    ways = ("ours", "lycoris", "lycoris bypass", "peft")
    lines = ["| adapter | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for row in found:
        cells = [f"{row.ratio[way].median:.2f} ({row.memory[way]:.0f})" if way in row.ratio else "" for way in ways]
        lines.append(f"| `{row.kind}` | " + " | ".join([f"**{cells[0]}**", *cells[1:]]) + " |")
    frozen = found[0]
    lines += [
        "",
        f"{frozen.case}, batch 1; the frozen model keeps {frozen.memory['frozen']:.0f} MB. Ways that build ΔW of every "
        "layer in every step (lycoris but for its bypass, peft's LoHa and LoKr) are measured for LoRA only.",
    ]
    return "\n".join(lines)


def overhead_table(found: dict[str, Any]) -> str:
    """µs beyond the frozen layer of one call that computes next to nothing."""
    ways = ("ours", "lycoris", "lycoris bypass", "peft")
    lines = ["| adapter | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for row in found["rows"]:
        taken = row["values"]["microseconds"]
        cells = [f"{taken[way]:.0f}" if way in taken else "" for way in ways]
        lines.append(f"| `{row['kind']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def routes_line(found: dict[str, Any]) -> str:
    rows = [{"kind": row["kind"], "layer": row["case"], **row["values"]} for row in found["rows"]]
    wrong = sum(row["over the other"] > 1.1 for row in rows)
    worst = max(rows, key=lambda row: row["over the other"])
    long = [row for row in rows if row["chosen"] == "dense" and row["training"] and row["positions"] >= 512]
    dense = max(long, key=lambda row: row["over the frozen layer"])
    return (
        f'`route="auto"` counts operations and bytes. In {len(rows) - wrong} of {len(rows)} cells '
        "(kinds and ranks × layers × tokens × training or not) it takes the faster route or one within 10 % of it; at "
        f"worst {worst['over the other']:.2f} times the other ({worst['kind']}, {worst['layer']}, "
        f"{'training' if worst['training'] else 'inference'}; `python benchmarks/routes.py`). A training step on the "
        f"dense route, where it is taken for 512 positions and more, is at most {dense['over the frozen layer']:.2f} "
        f"times the frozen layer's ({dense['kind']} of rank {dense['options']['rank']}, {dense['layer']})."
    )


def shortcuts_table(found: dict[str, Any]) -> str:
    lines = ["| shortcut | |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {row['case']} | {next(iter(row['values'].values()))} |" for row in found["rows"])])


def starts_table(found: list[Row]) -> str:
    """How near the first step of each start is to the gradient, what the pass keeps, and how long it takes."""
    cells = {(row.kind, row.case): row for row in found if row.question == "starts"}
    layers = list(dict.fromkeys(layer for _, layer in cells))
    best = [f"{cells['lora-ga', layer].values['best']:.2f}" for layer in layers]
    lines = [
        "| start | " + " | ".join(layers) + " | memory | time |",
        "| --- |" + " ---: |" * (len(layers) + 2),
        "| best of rank 2r | " + " | ".join(best) + " | 1 | |",
    ]
    for how in dict.fromkeys(how for how, _ in cells):
        own = [cells[how, layer] for layer in layers]
        shown = [
            f"{row.values['alignment']:.2f}" + (f" (PEFT {row.values['peft']:.2f})" if "peft" in row.values else "")
            for row in own
        ]
        memory = f"{own[0].values['memory']:.2f}" if own[0].values["memory"] else ""
        lines.append(f"| {how} | " + " | ".join(shown) + f" | {memory} | {own[0].ratio['ours'].median:.1f} |")
    unets = [row for row in found if row.question != "starts"]
    whole = "; ".join(f"{row.kind} {row.values['memory']:.1%}, {row.values['passes']} passes" for row in unets)
    return "\n".join(
        [
            *lines,
            "",
            "Alignment: the cosine of the first step of gradient descent and of the weight's gradient, rank 8. Memory: "
            "what the pass keeps, over all gradients, and time over one forward and backward pass of the data, both of "
            f"the Linear layer. On the {unets[0].values['layers']} layers of SD 1.5's U-Net at rank 4, the pass keeps, "
            f"over the model: {whole} (`python benchmarks/starts.py`).",
        ]
    )


def headlines(unet: list[Row], merges: list[Row], steps: list[Row]) -> str:
    """Three comparisons with the peers, for README.md."""
    dora = next(row for row in unet if row.kind == "dora")
    lora = next(row for row in merges if row.kind == "lora")
    against_peers = [row.against_best for row in steps if row.against_best is not None]
    near = sum(ratio <= 1.1 for ratio in against_peers)
    ours, peft = (f"{dora.ratio[way].median:.2f} ({dora.memory[way]:.0f} MB)" for way in ("ours", "peft"))
    seconds = {way: lora.ratio[way].median * lora.reference_ms / 1e3 for way in ("ours", "lycoris", "peft")}
    merging = ", ".join(f"{name} {seconds[name]:.2g} s ({lora.memory[name]:.0f} MB)" for name in ("lycoris", "peft"))
    weights = lora.case.partition(": ")[2].partition(" layers")[0]
    return "\n".join(
        [
            f"- A training step of SD 1.5's U-Net with DoRA takes {ours} times the frozen model's; with peft {peft}. "
            "In brackets: what waits for backward.",
            f"- Merging a LoRA for good into that U-Net's {weights} weights takes {seconds['ours']:.2g} s and "
            f"{lora.memory['ours']:.0f} MB; {merging}.",
            f"- A training step of one layer is the fastest or within 10 % of it in {near} of {len(against_peers)} "
            "cells (kinds × layers × fp32 and bf16), against lycoris, its bypass and peft.",
        ]
    )


def measured(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def compared(name: str) -> list[Row]:
    """The rows of a file of `peftkit bench`."""
    return read(RESULTS / f"{name}.json")


#: document -> generated part -> what makes it; these take seconds together
MEASURED: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "adapters": adapters_table,
        "headlines": lambda: headlines(compared("unet"), compared("merge"), compared("step")),
    },
    "docs/algorithms/index.md": {"adapters": kinds_tables},
    "docs/guides/starts.md": {"starts": lambda: starts_table(compared("starts"))},
    "docs/guides/families.md": {"families": family_table.table},
    "docs/benchmarks/training.md": {
        "step": lambda: step_table(compared("step")),
        "unet": lambda: unet_table(compared("unet")),
        "overhead": lambda: overhead_table(measured("overhead")),
        "routes": lambda: routes_line(measured("routes")),
    },
    "docs/benchmarks/merging.md": {
        "merge": lambda: merge_table([*compared("merge"), *compared("merge-oft")]),
        "checkpoint": lambda: checkpoint_line(measured("checkpoint")),
        "ops": lambda: ops_table(compared("ops")),
        "shortcuts": lambda: shortcuts_table(measured("shortcuts")),
    },
    "docs/benchmarks/monitor.md": {
        "stopping": lambda: stopping(measured("early_stopping")),
        "watching": lambda: watching_table(measured("monitor")),
    },
}


def support() -> dict[str, dict[str, Callable[[], str]]]:
    """As MEASURED, of what programs read and what rules do: every cell is tried, which takes half a minute."""
    parts: dict[str, dict[str, Callable[[], str]]] = {
        "README.md": {"support": support_table.short},
        "docs/guides/programs.md": {"support": support_table.table, "language": support_table.language},
        "docs/guides/optimisers.md": {"recipes": recipe_table.table},
    }
    for kind in pk.kinds():
        parts[f"docs/algorithms/{kind}.md"] = {"support": functools.partial(support_table.table_of, kind)}
    return parts


def renewed(document: str, parts: dict[str, Callable[[], str]]) -> str:
    """The document's text with its generated parts made again."""
    text = (ROOT / document).read_text()
    for name, make in parts.items():
        text = replaced(text, name, make())
    return text


def main() -> None:
    for document, parts in [*support().items(), *MEASURED.items()]:  # the table of kinds reads those of their pages
        (ROOT / document).write_text(renewed(document, parts))
    if not (DEMO / "table.json").exists():
        print("no out/digits/table.json: run make demo to renew the table of the digits")
        return
    digits = json.loads((DEMO / "table.json").read_text())
    document = "docs/algorithms/index.md"
    (ROOT / document).write_text(renewed(document, {"digits": lambda: digits_table(digits)}))
    shutil.copy(DEMO / "samples.png", ROOT / "docs" / "digits.png")
    shutil.copy(DEMO / "monitor.png", ROOT / "docs" / "monitor.png")


if __name__ == "__main__":
    main()
