"""Draw the structure of every algorithm's ΔW as docs/algorithms/<kind>.svg, all in one style.

    python scripts/structure_pictures.py

A picture is an equation of matrices: trained ones are filled, frozen ones grey, what is computed of them is outlined.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "algorithms"

#: what m, n, r, … are in the pictures, in pixels
SIZES = {
    "m": 120,
    "n": 150,
    "r": 26,
    "u_p": 40,
    "u_q": 46,
    "v_p": 56,
    "v_q": 66,
    "b": 18,
    "k": 64,
    "r*": 60,
    "n/k": 50,
    "h": 90,
}
_COLOURS = {"trained": ("#5c6bc0", "#fff"), "frozen": ("#d5d5d5", "#222"), "computed": ("none", "#222")}
_GAP, _TOP, _HEIGHT = 10, 30, 190


@dataclass(frozen=True)
class Matrix:
    """A matrix of the equation.

    fill: "full", "diagonal", "blocks" along it, "butterfly", blocks of rows apart, or "pieces" of a bank.
    """

    name: str
    rows: str
    columns: str
    kind: str = "trained"
    fill: str = "full"


#: kind -> the equation, of matrices and of the signs between them
PICTURES: dict[str, tuple[Matrix | str, ...]] = {
    "lora": (Matrix("ΔW", "m", "n", "computed"), "= γ", Matrix("B", "m", "r"), "·", Matrix("A", "r", "n")),
    "loha": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("B₁", "m", "r"),
        "·",
        Matrix("A₁", "r", "n"),
        "⊙",
        Matrix("B₂", "m", "r"),
        "·",
        Matrix("A₂", "r", "n"),
    ),
    "lokr": (Matrix("ΔW", "m", "n", "computed"), "= γ", Matrix("C", "u_p", "u_q"), "⊗", Matrix("D", "v_p", "v_q")),
    "loldu": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("P·L", "m", "r", "frozen"),
        "·",
        Matrix("δ", "r", "r", "trained", "diagonal"),
        "·",
        Matrix("U", "r", "n", "frozen"),
    ),
    "dora": (
        Matrix("W + ΔW", "m", "n", "computed"),
        "=",
        Matrix("m/‖·‖", "m", "m", "trained", "diagonal"),
        "· (",
        Matrix("W", "m", "n", "frozen"),
        "+ γ",
        Matrix("B", "m", "r"),
        "·",
        Matrix("A", "r", "n"),
        ")",
    ),
    "oft": (
        Matrix("W + ΔW", "m", "n", "computed"),
        "=",
        Matrix("R", "m", "m", "trained", "blocks"),
        "·",
        Matrix("W", "m", "n", "frozen"),
    ),
    "boft": (
        Matrix("W + ΔW", "m", "n", "computed"),
        "=",
        Matrix("R₂", "m", "m", "trained", "butterfly"),
        "·",
        Matrix("R₁", "m", "m", "trained", "blocks"),
        "·",
        Matrix("W", "m", "n", "frozen"),
    ),
    "ia3": (
        Matrix("W + ΔW", "m", "n", "computed"),
        "=",
        Matrix("1 + w", "m", "m", "trained", "diagonal"),
        "·",
        Matrix("W", "m", "n", "frozen"),
    ),
    "glora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ (",
        Matrix("W", "m", "n", "frozen"),
        "·",
        Matrix("A₁", "n", "r"),
        "·",
        Matrix("A₂", "r", "n"),
        "+",
        Matrix("B₁", "m", "r"),
        "·",
        Matrix("B₂", "r", "n"),
        ")",
    ),
    "full": (Matrix("ΔW", "m", "n", "computed"), "=", Matrix("M", "m", "n")),
    "svdlora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("P", "m", "r"),
        "·",
        Matrix("λ", "r", "r", "trained", "diagonal"),
        "·",
        Matrix("Q", "r", "n"),
    ),
    "lora-fa": (Matrix("ΔW", "m", "n", "computed"), "= γ", Matrix("B", "m", "r"), "·", Matrix("A", "r", "n", "frozen")),
    "mos": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("B", "m", "r"),
        "·",
        Matrix("M", "r", "r"),
        "·",
        Matrix("A", "r", "n"),
    ),
    "melora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("B", "m", "r*", "trained", "blocks"),
        "·",
        Matrix("A", "r*", "n", "trained", "blocks"),
    ),
    "block-lora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("B", "m", "r"),
        "·",
        Matrix("A₁", "r", "n/k"),
        "·",
        Matrix("[I … I]", "n/k", "n", "frozen"),
    ),
    "mora": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("D", "m", "k", "frozen"),
        "·",
        Matrix("M", "k", "k"),
        "·",
        Matrix("C", "k", "n", "frozen"),
    ),
    "miss": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("Dᵀ", "m", "r"),
        "·",
        Matrix("[I … I]", "r", "n", "frozen"),
    ),
    "vera": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("b", "m", "m", "trained", "diagonal"),
        "·",
        Matrix("B", "m", "r", "frozen"),
        "·",
        Matrix("d", "r", "r", "trained", "diagonal"),
        "·",
        Matrix("A", "r", "n", "frozen"),
    ),
    "vb-lora": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("B", "m", "r", "computed", "pieces"),
        "·",
        Matrix("A", "r", "n", "computed", "pieces"),
        "− B₀·A₀, of",
        Matrix("bank", "h", "b"),
    ),
    "tied-lora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("v", "m", "m", "trained", "diagonal"),
        "·",
        Matrix("B", "m", "r"),
        "·",
        Matrix("u", "r", "r", "trained", "diagonal"),
        "·",
        Matrix("A", "r", "n"),
    ),
    "tiny-lora": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("U·√S", "m", "r", "frozen"),
        "· Σ v ·",
        Matrix("P", "r", "r", "frozen"),
        "·",
        Matrix("√S·Vᵀ", "r", "n", "frozen"),
    ),
    "randlora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ Σ",
        Matrix("B", "m", "r", "frozen"),
        "·",
        Matrix("Λ", "r", "r", "trained", "diagonal"),
        "·",
        Matrix("A", "r", "n", "frozen"),
        "·",
        Matrix("Γ", "n", "n", "trained", "diagonal"),
    ),
    "lora-xs": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ",
        Matrix("U", "m", "r", "frozen"),
        "·",
        Matrix("R", "r", "r"),
        "·",
        Matrix("S·Vᵀ", "r", "n", "frozen"),
    ),
    "anchored": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ (",
        Matrix("B", "m", "r"),
        "·",
        Matrix("A", "r", "n"),
        "−",
        Matrix("B₀", "m", "r", "frozen"),
        "·",
        Matrix("A₀", "r", "n", "frozen"),
        ")",
    ),
    "svdiff": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("U", "m", "m", "frozen"),
        "·",
        Matrix("δ", "m", "m", "trained", "diagonal"),
        "·",
        Matrix("Vᵀ", "m", "n", "frozen"),
    ),
    "svft": (
        Matrix("ΔW", "m", "n", "computed"),
        "=",
        Matrix("U", "m", "m", "frozen"),
        "·",
        Matrix("M", "m", "m", "trained", "diagonal"),
        "·",
        Matrix("Vᵀ", "m", "n", "frozen"),
    ),
    "fourierft": (
        Matrix("ΔW", "m", "n", "computed"),
        "= s · Re",
        Matrix("F", "m", "m", "frozen"),
        "·",
        Matrix("C", "m", "n", "trained", "diagonal"),
        "·",
        Matrix("F", "n", "n", "frozen"),
    ),
    "t-lora": (
        Matrix("ΔW", "m", "n", "computed"),
        "= γ (",
        Matrix("P", "m", "b"),
        "·",
        Matrix("λ", "b", "b", "trained", "diagonal"),
        "·",
        Matrix("Q", "b", "n"),
        "−",
        Matrix("P₀", "m", "b", "frozen"),
        "·",
        Matrix("λ₀", "b", "b", "frozen", "diagonal"),
        "·",
        Matrix("Q₀", "b", "n", "frozen"),
        ")",
    ),
    "dylora": (Matrix("ΔW", "m", "n", "computed"), "= γ", Matrix("B", "m", "b"), "·", Matrix("A", "b", "n")),
}


def picture(equation: tuple[Matrix | str, ...]) -> str:
    """The SVG of one equation."""
    shapes: list[str] = []
    x, middle = _GAP, _TOP + _HEIGHT // 2
    for part in equation:
        if isinstance(part, str):
            width = 11 * len(part)
            shapes.append(_text(x + width / 2, middle + 6, part, 20))
        else:
            width = SIZES[part.columns]
            shapes += _matrix(part, x, middle - SIZES[part.rows] / 2)
        x += width + _GAP
    height = _TOP + _HEIGHT + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x} {height}" width="{x}" height="{height}"'
    return "\n".join([f'{head} font-family="sans-serif" text-anchor="middle">', *shapes, "</svg>", ""])


def _matrix(matrix: Matrix, x: float, y: float) -> list[str]:
    width, height = SIZES[matrix.columns], SIZES[matrix.rows]
    colour, ink = _COLOURS[matrix.kind]
    whole = matrix.fill == "full"
    shapes = [_box(x, y, width, height, colour if whole else "none")]
    if matrix.fill == "diagonal":
        shapes.append(f'<path d="M{x:g} {y:g}l{width} {height}" stroke="{colour}" stroke-width="5"/>')
    elif matrix.fill == "blocks":
        side = width / 4
        shapes += [_box(x + i * side, y + i * side, side, side, colour) for i in range(4)]
    elif matrix.fill == "pieces":  # one vector of the bank is as long as a piece is
        side = SIZES["b"]
        shapes += [_box(x, y + at, width, side, colour) for at in range(0, height - side, side) if height > width]
        shapes += [_box(x + at, y, side, height, colour) for at in range(0, width - side, side) if width > height]
    elif matrix.fill == "butterfly":  # rows two half-blocks apart meet
        side = width / 8
        pairs = [(row, column) for row in range(8) for column in range(8) if (row - column) in (0, 2, -2)]
        meets = [(row, column) for row, column in pairs if row // 4 == column // 4]
        shapes += [_box(x + column * side, y + row * side, side, side, colour) for row, column in meets]
    if whole:
        shapes.append(_text(x + width / 2, y + height / 2 + 5, matrix.name, 15, ink))
    else:
        shapes.append(_text(x + width / 2, y - 8, matrix.name, 15))
    shapes.append(_text(x + width / 2, y + height + 17, f"{matrix.rows}×{matrix.columns}", 12, "#666"))
    return shapes


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#444"/>'


def _text(x: float, y: float, text: str, size: int, colour: str = "#222") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}">{text}</text>'


def main() -> None:
    for kind, equation in PICTURES.items():
        (FOLDER / f"{kind}.svg").write_text(picture(equation))


if __name__ == "__main__":
    main()
