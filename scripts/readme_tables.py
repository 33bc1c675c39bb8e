"""Renew the generated tables of README.md: parameters of each adapter, and what the last `make demo` measured.

python scripts/readme_tables.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import support_table
from torch import nn

import peftkit as pk

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "out" / "digits"
RESULTS = ROOT / "benchmarks" / "results"

#: name, ΔW, kind and options, when to use it
ADAPTERS: list[tuple[str, str, str, dict[str, Any], str]] = [
    ("`lora`, `locon`", "γ·B·A", "lora", {"rank": 8}, "you want the one every tool reads; a good default"),
    (
        "`loha`",
        "γ·(B₁A₁) ⊙ (B₂A₂)",
        "loha",
        {"rank": 4},
        "a style or several concepts: rank up to r² for 2r(m+n) parameters",
    ),
    ("`lokr`", "γ·C ⊗ D", "lokr", {"factor": 8}, "small files, little forgetting"),
    ("`loldu`", "P·L·diag(σz − σ₀z₀)·U", "loldu", {"rank": 256}, "a few hundred numbers must do"),
    ("`dora`", "t·(W + γBA) − W, t = m/‖W + γBA‖", "dora", {"rank": 8}, "LoRA falls short of full fine-tuning"),
    (
        "`loha`, `lokr` with `decompose=True`",
        "the same with their ΔW inside",
        "loha",
        {"rank": 4, "decompose": True},
        "as DoRA",
    ),
    ("`oft`", "(R − I)·W", "oft", {"block_size": 32}, "norms and angles between neurons must stay"),
    ("`boft`", "(R_t ⋯ R_1 − I)·W", "boft", {"block_size": 8}, "OFT with every output reaching every other"),
    ("`ia3`", "diag(w)·W", "ia3", {}, "one gain a channel must do"),
    ("`glora`", "γ(W·A₁A₂ + B₁B₂)", "glora", {"rank": 4}, "the change should follow the base it is put on"),
    ("`full`", "M", "full", {}, "full fine-tuning, kept apart from the base"),
]


def adapters_table() -> str:
    rows = ["| adapter | ΔW | options | parameters | use it when |", "| --- | --- | --- | --- | --- |"]
    for name, formula, kind, options, when in ADAPTERS:
        count = pk.plan(nn.Linear(768, 768, device="meta"), kind, **options).parameters
        shown = ", ".join(f"{k}={v}" for k, v in options.items() if k != "decompose")
        rows.append(f"| {name} | {formula} | {f'`{shown}`' if shown else ''} | {count:,} | {when} |")
    return "\n".join(rows)


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
    rows += ["", "LoLDU's file carries its base's factors, so that it fits another base; it is small without them."]
    return "\n".join(rows)


def replaced(text: str, name: str, table: str) -> str:
    """The text with what stands between <!-- name --> and <!-- /name --> replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"README.md has no {start}"
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", text)


def checkpoint_line(measured: dict[str, dict[str, Any]]) -> str:
    lora = measured["lora"]
    return (
        f"Merging a rank-16 LoCon into an {lora['parameters'] / 1e6:.0f}M-parameter fp16 checkpoint takes "
        f"{lora['memory MB']} MB of memory beside the interpreter, and {lora['merge / copy']} times as long as copying "
        "the file (`make bench`)."
    )


def stopping(found: dict[str, Any]) -> str:
    """What stopping where a rule says costs, against timers; and what moves it."""
    tasks = list(found["rules"]["never stop"])
    runs = ", ".join(f"{found['runs'][task]} of {task}" for task in tasks)
    lines = [
        f"Measured on {sum(found['runs'][task] for task in tasks)} runs that overfit ({runs}; six kinds of adapters, "
        "each with several draws of adapter and data; `python benchmarks/trajectories.py && python "
        "benchmarks/early_stopping.py`). Regret: the validation loss at the returned step over the best of the run, "
        "minus 1, in per cent. Timer: the same of a fixed step, the median of those the rule returned on that task. "
        "The last seven rows are criteria that are not in the library, each with the threshold that is best on digit-9 "
        "and movies.",
        "",
        "| rule | " + " | ".join(f"{task}: regret (timer)" for task in tasks) + " |",
        "| --- |" + " ---: |" * len(tasks),
    ]
    for name, by_task in found["rules"].items():
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
    for task, row in found["learning rates"].items():
        cells = [
            f"{row[name]['steps']:.0f}: {row[name]['regret']:.1f} ({row[name]['one timer']:.1f})"
            for name in ("paper, window 10", "robust, window 5", "robust, window 10")
        ]
        lines.append(f"| {task} | {row['oracle']['steps']:.0f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Noise of the measurement, as a share of the range of CS (median steps, window 10):",
        "",
        "| rule | " + " | ".join(tasks) + " |",
        "| --- |" + " ---: |" * len(tasks),
    ]
    for name, by_task in found["noise"].items():
        lines.append(f"| {name} | " + " | ".join(f"{by_task[task]['steps']:.0f}" for task in tasks) + " |")
    walks = "; ".join(
        f"{name}: {middle:.1f} ({low:.1f} to {high:.1f})" for name, (low, middle, high) in found["random walk"].items()
    )
    lines += ["", f"Windows until a random walk shows its second valley, median (10 % to 90 %): {walks}."]
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> list[str]:
    """Whether a criterion that was searched for beats what is there, on what it was not chosen by."""
    champion, contest = found["champion"], found["contest"]

    def against(name: str) -> str:
        gap, low, high = contest[name]
        return f"{gap:+.1f} ({low:+.1f} to {high:+.1f})"

    rules = [name for name in contest if name.startswith(("paper", "authors", "robust"))]
    best = max(rules, key=lambda name: contest[name][0])
    beaten = all(contest[name][2] < 0 for name in (best, "its timer", "one timer"))
    assert not beaten, "a criterion beats rule and timers: it belongs into the library, and another sentence here"
    return [
        f"The best of the criteria on digit-9 and movies is {champion}. On the other tasks and their learning rates "
        f"its regret is {contest['regret'][0]:.1f} points in the mean over tasks; against the best second-valley rule "
        f"({best}) that is {against(best)}, against a timer set to its own median on each task {against('its timer')}, "
        f"and against one timer for all of them {against('one timer')}, with the intervals that hold 90 % of bootstrap "
        "samples. It does not beat the timers, so the library does not offer it. What all this says: with windows that "
        "fit the run every rule is far better than not stopping, and none is better than a timer that is set well. The "
        "second valley is a timer of about five windows, and the window is the setting that matters: take one of which "
        "five are about as long as you would train at first guess, and look at the picture.",
    ]


def watching_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = ["| adapter |" + "".join(f" {name} | ΔW built |" for name in found) + " memory¹ |"]
    rows.append("| --- |" + " ---: | ---: |" * len(found) + " ---: |")
    for kind in next(iter(found.values())):
        cells = [f" {row[kind]['added']:.2%} | {row[kind]['naive']:.2%} |" for row in found.values()]
        memory = max(row[kind]["memory"] for row in found.values())
        rows.append(f"| `{kind}` |" + "".join(cells) + f" {memory:.2f} |")
    return "\n".join(
        [*rows, "", "¹ the largest allocation of a measurement over the largest weight; building ΔW takes 1."]
    )


def measured(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    readme = ROOT / "README.md"
    text = replaced(readme.read_text(), "adapters", adapters_table())
    text = replaced(text, "support", support_table.table())
    text = replaced(text, "checkpoint", checkpoint_line(measured("checkpoint")))
    text = replaced(text, "stopping", stopping(measured("early_stopping")))
    text = replaced(text, "watching", watching_table(measured("monitor")))
    if (DEMO / "table.json").exists():
        text = replaced(text, "digits", digits_table(json.loads((DEMO / "table.json").read_text())))
        shutil.copy(DEMO / "samples.png", ROOT / "docs" / "digits.png")
        shutil.copy(DEMO / "monitor.png", ROOT / "docs" / "monitor.png")
    else:
        print("no out/digits/table.json: run make demo to renew that table")
    readme.write_text(text)


if __name__ == "__main__":
    main()
