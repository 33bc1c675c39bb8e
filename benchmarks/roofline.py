"""What operations on one weight must cost on a GPU, by the bytes they move and the numbers they multiply.

    python benchmarks/roofline.py [--size 4096] [--rank 32] [--measure]

Times of H100, A100 and 4090 are a model: 85 % of the memory's speed and 60 % of the tensor cores' in bf16, the second
level cache ignored. "eager" is what plain torch moves for the same, matrix by matrix. --measure times, where there is a
GPU, kernel and eager torch beside the model, with their errors against float64, and keeps them in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peftkit import kernels
from peftkit.bench.rows import environment
from peftkit.bench.timing import Spread, contest
from peftkit.kernels import ops

RESULTS = Path(__file__).parent / "results"
ITEM = 2  # bytes of bf16


@dataclass(frozen=True)
class Gpu:
    """Memory in TB/s and bf16 products in TFLOP/s, as the maker states them."""

    name: str
    memory: float
    products: float

    def microseconds(self, moved: float, flops: float) -> float:
        return 1e6 * max(moved / (0.85e12 * self.memory), flops / (0.6e12 * self.products))


GPUS = (Gpu("H100", 3.35, 989), Gpu("A100", 2.04, 312), Gpu("4090", 1.01, 165))


@dataclass(frozen=True)
class Work:
    """One operation: matrices of the weight's size that must move, and that eager torch moves; multiplications."""

    name: str
    must: float
    eager: float
    flops: float
    kernel: bool


def works(n: int, rank: int) -> list[Work]:
    """On a weight n × n with factors of that rank."""
    product = 2 * n * n * rank
    return [
        Work("lora merge, addmm_ in place", 2, 2, product, False),
        Work("loha ΔW", 1, 5, 2 * product, True),  # two products are written, read, and their product is written
        Work("loha merge", 2, 10, 2 * product, True),
        Work("loha backward", 1, 14, 6 * product, True),
        Work("lokr merge, one addcmul", 2, 2, 2 * n * n, False),
        Work("oft merge, bmm of blocks of 32", 2, 2, 2 * n * n * 32, False),
        Work("dora norms, closed form", 1, 1, product, False),
        Work("monitor of loha", 1, 9, 2 * product, True),
        Work("monitor of lora, closed form", 1, 1, product, False),
    ]


def modelled(n: int, rank: int) -> Table:
    table = Table("operation", "MB", "GFLOP", *(f"{gpu.name} µs: floor / eager" for gpu in GPUS), "kernel")
    table.title = f"{n}×{n}, rank {rank}, bf16; times are modelled"
    for work in works(n, rank):
        matrix = n * n * ITEM
        times = (
            f"{gpu.microseconds(work.must * matrix, work.flops):.0f} / "
            f"{gpu.microseconds(work.eager * matrix, work.flops):.0f}"
            for gpu in GPUS
        )
        table.add_row(
            work.name,
            f"{work.must * matrix / 1e6:.0f}",
            f"{work.flops / 1e9:.1f}",
            *times,
            "yes" if work.kernel else "",
        )
    return table


def measured(n: int, rank: int, device: str) -> dict[str, dict[str, float | bool]]:
    """Kernel, eager and compiled torch of the operations that have a kernel: microseconds, errors, repeatability."""
    torch.manual_seed(0)
    factors = [torch.randn(s, device=device).bfloat16() for s in ((n, rank), (rank, n)) * 2]
    W = torch.randn(n, n, device=device).bfloat16()

    def eager_merge(W: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        return W + (B1 @ A1) * (B2 @ A2)

    def eager_moments(W: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        delta = ((B1 @ A1) * (B2 @ A2)).float()
        return torch.stack([(delta * W.float()).sum(1), delta.square().sum(1)])

    def eager_backward(W: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        one, two = W * (B2 @ A2), W * (B1 @ A1)
        return torch.cat([g.flatten() for g in (one @ A1.mT, B1.mT @ one, two @ A2.mT, B2.mT @ two)])

    def kernel_backward() -> Tensor:
        return torch.cat([g.flatten() for g in ops.hadamard_backward(W, factors)])

    own: dict[str, tuple[Callable[[], Tensor], Callable[..., Tensor]]] = {
        "loha merge": (lambda: ops.delta(W, factors, "hadamard", 1.0, None), eager_merge),
        "monitor of loha": (lambda: ops.moments(W, factors, "hadamard"), eager_moments),
        "loha backward": (kernel_backward, eager_backward),
    }
    found: dict[str, dict[str, float | bool]] = {}
    for name, (kernel, eager) in own.items():
        exact = eager(*(t.double() for t in (W, *factors)))
        compiled = torch.compile(eager)
        ways: dict[str, Callable[[], object]] = {
            "kernel": kernel,
            "eager": lambda eager=eager: eager(W, *factors),
            "compiled": lambda compiled=compiled: compiled(W, *factors),
        }
        with torch.no_grad(), kernels.use("triton" if device != "cpu" else "torch"):
            seconds = contest(ways, rounds=15)
            errors = {
                way: float((call().double() - exact).norm() / exact.norm())  # type: ignore[attr-defined]
                for way, call in ways.items()
            }
            repeats = torch.equal(kernel(), kernel())
        found[name] = {f"{way} µs": round(1e6 * Spread.of(values).median, 1) for way, values in seconds.items()}
        found[name] |= {f"{way} error": float(f"{error:.2e}") for way, error in errors.items()}
        found[name]["repeats"] = repeats
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--measure", action="store_true", help="time the kernels on the GPU of this machine")
    arguments = parser.parse_args()
    console = Console()
    console.print(modelled(arguments.size, arguments.rank))
    if not arguments.measure:
        return
    if not torch.cuda.is_available():
        raise SystemExit("--measure: torch finds no GPU here")
    found = measured(arguments.size, arguments.rank, "cuda")
    console.print_json(json.dumps(found))
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    (RESULTS / f"{name}.json").write_text(json.dumps({**environment("cuda"), "operations": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
