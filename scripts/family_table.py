"""Print the model families and what each program reads of them, as docs/guides/families.md has it.

python scripts/family_table.py
"""

from __future__ import annotations

from peftkit.files.export import programs
from peftkit.files.families.family import Family
from peftkit.files.families.names import FAMILIES

#: by what a name begins with in each style, for the table
STYLES = {
    "kohya": "`lora_unet_`",
    "diffusers": "diffusers' own",
    "ldm": "`diffusion_model.`",
    "transformer": "`lora_transformer_`",
    "lycoris": "`lycoris_`",
    "peft": "`base_model.model.`",
}


def table() -> str:
    """The table in Markdown: a row a family, a column a program."""
    read = {name for family in FAMILIES.values() for name in family.reads}
    targets = [target for name, target in programs.TARGETS.items() if name in read]
    lines = [
        f"| family | `family=` | modules | {' | '.join(target.title for target in targets)} |",
        "| --- | --- | ---: |" + " --- |" * len(targets),
    ]
    for family in FAMILIES.values():
        cells = [_cell(family, target.name) for target in targets]
        counts = " + ".join(str(len(part.modules)) for part in family.parts)
        lines.append(f"| {family.title} | `{family.name}` | {counts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(family: Family, program: str) -> str:
    style = family.style(program)
    return "refused" if style is None else STYLES[style]


if __name__ == "__main__":
    print(table())
