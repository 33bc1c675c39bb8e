"""What each operator must cost on a GPU and what plain PyTorch costs there, modelled.

    python benchmarks/roofline.py [--json FILE]

The model: memory at 85 % of its peak or tensor cores at 60 % of theirs, whichever takes longer, with matrices of m·n
16-bit numbers moved to and from DRAM by every PyTorch call, factors free and no cache. The floor is what a kernel
moves: each matrix once, but the upstream gradient twice, for the row and the column factors.

What a GPU does take is measured by benchmarks/gpu.py.
"""

from __future__ import annotations

from rich.table import Table

from peftkit.bench.operators import OPERATORS, Operator
from peftkit.bench.rows import Row
from peftkit.bench.script import Script

#: peak bytes and bf16 operations per second, from the vendor's data sheets (SXM, and of the A100 the one with 80 GB)
GPUS = {"H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12), "RTX 4090": (1.008e12, 165e12)}

#: m, n, r
SHAPES = [(1024, 1024, 16), (4096, 4096, 32), (4096, 4096, 128)]


def modelled(operator: Operator, m: int, n: int, r: int) -> dict[str, dict[str, float]]:
    """Return bytes, flops and microseconds of the kernel's floor and of eager, by GPU."""
    rows = {}
    for gpu, (bandwidth, peak) in GPUS.items():
        row: dict[str, float] = {}
        for name, passes, products in zip(("floor", "eager"), operator.passes, operator.products, strict=True):
            size, flops = 2 * passes * m * n, 2 * products * m * n * r
            seconds = max(size / (0.85 * bandwidth), flops / (0.6 * peak))
            row |= {f"{name} bytes": size, f"{name} flops": flops, f"{name} us": round(1e6 * seconds, 1)}
        rows[gpu] = row
    return rows


def row(operator: Operator, m: int, n: int, r: int) -> Row:
    """Return the model of an operator at a size; its values are those of `modelled`."""
    return Row("roofline", operator.name, f"{m}×{n}, r {r}", "bfloat16", values=modelled(operator, m, n, r))


def table(rows: list[Row]) -> Table:
    """Return a table of microseconds by operator, size and GPU."""
    shown = Table("operator", "m×n, r", *GPUS, title="microseconds, modelled: floor / eager")
    for row in rows:
        cells = ["{floor us} / {eager us}".format_map(row.values[gpu]) for gpu in GPUS]
        shown.add_row(row.kind, row.case, *cells)
    return shown


def main() -> None:
    script = Script(__file__, __doc__)
    script.parse()
    cells = [(operator, shape) for operator in OPERATORS for shape in SHAPES]
    script.print(table(script.runner.measure([lambda o=o, s=s: row(o, *s) for o, s in cells])))


if __name__ == "__main__":
    main()
