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
CHECKPOINT = ROOT / "benchmarks" / "results" / "checkpoint.json"

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


def main() -> None:
    readme = ROOT / "README.md"
    text = replaced(readme.read_text(), "adapters", adapters_table())
    text = replaced(text, "support", support_table.table())
    text = replaced(text, "checkpoint", checkpoint_line(json.loads(CHECKPOINT.read_text())))
    if (DEMO / "table.json").exists():
        text = replaced(text, "digits", digits_table(json.loads((DEMO / "table.json").read_text())))
        shutil.copy(DEMO / "samples.png", ROOT / "docs" / "digits.png")
        shutil.copy(DEMO / "monitor.png", ROOT / "docs" / "monitor.png")
    else:
        print("no out/digits/table.json: run make demo to renew that table")
    readme.write_text(text)


if __name__ == "__main__":
    main()
