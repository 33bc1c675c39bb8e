"""What each operator must cost on a GPU, what plain PyTorch costs there, and where there is a GPU, what it does cost.

    python benchmarks/roofline.py [--json] [--save]

The model: memory at 85 % of its peak or tensor cores at 60 % of theirs, whichever takes longer, with matrices of m·n
16-bit numbers moved to and from DRAM by every PyTorch call, factors free and no cache. The floor is what a kernel
moves: each matrix once, but the upstream gradient twice, for the row and the column factors.

Measured, per operator: microseconds of the kernel, of eager PyTorch, of torch.compile and, where lycoris-lora is
installed and has a kernel for it, of lycoris, with the cache emptied in between; the error against float64, and whether
a second run gives the same bits.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peftkit import kernels
from peftkit.kernels import operators

RESULTS = Path(__file__).parent / "results"

#: peak bytes and bf16 operations per second, from the vendor's data sheets (SXM, and of the A100 the one with 80 GB)
GPUS = {"H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12), "RTX 4090": (1.008e12, 165e12)}

#: m, n, r
SHAPES = [(1024, 1024, 16), (4096, 4096, 32), (4096, 4096, 128)]

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Operator:
    """passes: matrices of m·n numbers that the kernel and eager move; products: their flops over 2·m·n·r."""

    name: str
    passes: tuple[int, int]
    products: tuple[int, int]
    kernel: Callable[[Tensor, list[Tensor]], Any]
    eager: Callable[[Tensor, Tensors], Any]
    lycoris: Callable[[Tensor, Tensors], Any] | None = None


def _hadamard(f: Tensors) -> Tensor:
    return (f[0] @ f[1]) * (f[2] @ f[3])


def _moments(W: Tensor, f: Tensors) -> Tensor:
    delta = _hadamard(f)
    return torch.stack([(delta * W).sum(1), delta.square().sum(1)])


def _backward(G: Tensor, f: Tensors) -> list[Tensor]:
    B1, A1, B2, A2 = f
    of1, of2 = G * (B2 @ A2), G * (B1 @ A1)
    return [of1 @ A1.mT, B1.mT @ of1, of2 @ A2.mT, B2.mT @ of2]


def _lycoris_hadamard(f: Tensors) -> Tensor:
    """What their LoHa calls for its ΔW, which picks the backend."""
    loha = importlib.import_module("lycoris.functional.loha")
    scale = 1.0 if f[0].is_cuda else torch.ones(())  # without a kernel, their backward takes no number
    return loha.diff_weight(f[1], f[0], f[3], f[2], None, None, gamma=scale)


def _lycoris_backward(G: Tensor, f: Tensors) -> list[Tensor]:
    """The gradients of `_lycoris_hadamard`; their forward is run once for all."""
    if not _lycoris_graph or _lycoris_graph[0] is not f:
        leaves = [factor.detach().requires_grad_() for factor in f]
        _lycoris_graph[:] = [f, leaves, _lycoris_hadamard(leaves)]
    _, leaves, delta = _lycoris_graph
    return list(torch.autograd.grad(delta, leaves, G, retain_graph=True))


#: the factors, their leaves and the ΔW of the last call
_lycoris_graph: list[Any] = []


OPERATORS = [
    Operator(
        "LoHa ΔW",
        (1, 5),
        (2, 2),
        lambda W, f: operators.hadamard(None, f, 1.0),
        lambda W, f: _hadamard(f),
        lambda W, f: _lycoris_hadamard(f),
    ),
    Operator(
        "LoHa W + λΔW",
        (2, 8),
        (2, 2),
        lambda W, f: operators.hadamard(W, f, 0.5),
        lambda W, f: torch.add(W, _hadamard(f), alpha=0.5),
        lambda W, f: torch.add(W, _lycoris_hadamard(f), alpha=0.5),
    ),
    Operator("LoHa moments", (1, 12), (2, 2), lambda W, f: operators.hadamard_moments(W, f), _moments),
    Operator(
        "LoHa backward",
        (2, 12),
        (8, 6),
        lambda G, f: operators.hadamard_backward(G, f, 1.0),
        _backward,
        _lycoris_backward,
    ),
]


def inputs(m: int, n: int, r: int, device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A matrix (m, n) and the factors B1, A1, B2, A2 of rank r, all normal."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(m, n), (m, r), (r, n), (m, r), (r, n)]
    W, *factors = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    return W, factors


def modelled(operator: Operator, m: int, n: int, r: int) -> dict[str, dict[str, float]]:
    """Per GPU, bytes, flops and microseconds of the kernel's floor and of eager."""
    rows = {}
    for gpu, (bandwidth, peak) in GPUS.items():
        row: dict[str, float] = {}
        for name, passes, products in zip(("floor", "eager"), operator.passes, operator.products, strict=True):
            size, flops = 2 * passes * m * n, 2 * products * m * n * r
            seconds = max(size / (0.85 * bandwidth), flops / (0.6 * peak))
            row |= {f"{name} bytes": size, f"{name} flops": flops, f"{name} us": round(1e6 * seconds, 1)}
        rows[gpu] = row
    return rows


def measured(operator: Operator, m: int, n: int, r: int) -> dict[str, Any]:
    """What the GPU of this machine does."""
    W, factors = inputs(m, n, r, "cuda", torch.bfloat16)
    compiled = torch.compile(operator.eager, fullgraph=True, dynamic=False)
    calls = {
        "kernel": lambda: operator.kernel(W, factors),
        "eager": lambda: operator.eager(W, factors),
        "compiled": lambda: compiled(W, factors),
    }
    peer = operator.lycoris
    if peer is not None and importlib.util.find_spec("lycoris"):
        calls["lycoris"] = lambda: peer(W, factors)
    with kernels.use("triton"):
        exact = _flat(operator.eager(W.double(), [factor.double() for factor in factors]))
        errors = {
            f"{name} error": float((_flat(call()).double() - exact).norm() / exact.norm())
            for name, call in calls.items()
        }
        times = {f"{name} us": _microseconds(call) for name, call in calls.items()}
        repeats = torch.equal(_flat(calls["kernel"]()), _flat(calls["kernel"]()))
    return {**times, **errors, "repeats": repeats}


def _flat(result: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in (result if isinstance(result, list) else [result])])


def _microseconds(call: Callable[[], object], rounds: int = 30) -> float:
    """The median over rounds, each after a write that is larger than any cache."""
    cache, times = torch.empty(1 << 28, dtype=torch.int8, device="cuda"), []
    for _ in range(rounds):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return round(statistics.median(times), 1)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        title="microseconds: floor / eager, modelled; with a GPU: kernel / eager / compiled / lycoris, measured"
    )
    for column in ("operator", "m×n, r", *GPUS, "measured", "error", "repeats"):
        shown.add_column(column)
    for row in rows:
        model = [f"{row[gpu]['floor us']} / {row[gpu]['eager us']}" for gpu in GPUS]
        own = row.get("measured")
        here = ["", "", ""]
        if own:
            ways = ("kernel", "eager", "compiled", "lycoris")
            times = " / ".join(str(own[f"{way} us"]) for way in ways if f"{way} us" in own)
            here = [times, f"{own['kernel error']:.1e} / {own['eager error']:.1e}", str(own["repeats"])]
        shown.add_row(row["operator"], "{}×{}, {}".format(*row["shape"]), *model, *here)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--save", action="store_true", help="keep what a GPU measured in benchmarks/results")
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if arguments.save and gpu is None:
        parser.error("--save: PyTorch finds no GPU to measure on")
    rows = []
    for operator in OPERATORS:
        for shape in SHAPES:
            row: dict[str, Any] = {"operator": operator.name, "shape": shape, **modelled(operator, *shape)}
            if gpu is not None:
                row["measured"] = measured(operator, *shape)
            rows.append(row)
    if arguments.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        Console().print(table(rows))
    if arguments.save and gpu is not None:
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        (RESULTS / f"{name}.json").write_text(
            json.dumps({"gpu": gpu, "rows": rows}, ensure_ascii=False, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
