"""The operators of `peftkit.kernels`: the kernel, its reference, eager and compiled PyTorch, and lycoris.

An `Operator` also states what moves through memory and what is multiplied, for the model in benchmarks/roofline.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit import kernels
from peftkit.bench.rows import Row
from peftkit.bench.timing import Call, Spread, contest, gpu_contest, peak_bytes, ratios
from peftkit.errors import BenchError
from peftkit.kernels import operators

Tensors = Sequence[Tensor]

#: relative errors against float64 that only a mistake exceeds
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Operator:
    """An operator on a matrix (m, n) and four factors of rank r.

    Attributes:
        name: shown.
        passes: matrices of m·n numbers that the kernel and eager move.
        products: flops of the kernel and of eager, over 2·m·n·r.
        kernel: the operator of the library, which runs its kernel on a GPU.
        eager: the same in plain PyTorch.
        lycoris: the same as lycoris-lora computes it, where it has a kernel for it.
    """

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
    """What lycoris' LoHa calls for its ΔW, which picks the backend."""
    loha = importlib.import_module("lycoris.functional.loha")
    scale = 1.0 if f[0].is_cuda else torch.ones(())  # without a kernel, lycoris' backward takes no number
    return loha.diff_weight(f[1], f[0], f[3], f[2], None, None, gamma=scale)


def _lycoris_backward(G: Tensor, f: Tensors) -> list[Tensor]:
    """The gradients of `_lycoris_hadamard`, whose forward is run once for all calls with the same factors."""
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
    """Return a matrix (m, n) and the factors B1 (m, r), A1 (r, n), B2 (m, r), A2 (r, n), all normal."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(m, n), (m, r), (r, n), (m, r), (r, n)]
    W, *factors = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    return W, factors


def measure(operator: Operator, size: tuple[int, int, int], dtype: torch.dtype, *, device: str, rounds: int) -> Row:
    """Time every way to run an operator, over eager PyTorch.

    On a GPU the cache is emptied before every call, the kernel must run ("ours" never falls back to its reference),
    and torch.compile takes part. On the CPU "ours" is the reference.

    Args:
        operator: one of `OPERATORS`.
        size: m, n, r.
        dtype: of matrix and factors.
        device: "cpu" or "cuda".
        rounds: turns of every way.

    Returns:
        A row whose values are the error of every way, whether two runs of ours gave the same bits, and the messages of
        torch.compile or lycoris where they fail.

    Raises:
        BenchError: ours errs by more than rounding does, or does not repeat.
    """
    W, factors = inputs(*size, device, dtype)
    calls, refused = _ways(operator, W, factors, device)
    exact = _flat(operator.eager(W.double(), [factor.double() for factor in factors]))
    errors = {way: _relative(_flat(call()), exact) for way, call in calls.items()}
    repeats = torch.equal(_flat(calls["ours"]()), _flat(calls["ours"]()))
    case = "{}×{}, r {}".format(*size)
    if not errors["ours"] < TOLERANCE[dtype] or not repeats:
        raise BenchError(
            f"{operator.name} at {case} in {dtype}: a relative error of {errors['ours']:.1e} was found, below "
            f"{TOLERANCE[dtype]:.0e} was expected; a second run gives {'the same' if repeats else 'other'} bits; "
            "nothing was timed"
        )
    seconds = (contest if device == "cpu" else gpu_contest)(calls, rounds=rounds)
    eager = seconds.pop("eager")
    return Row(
        question="operators",
        kind=operator.name,
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        reference="eager",
        reference_ms=1e3 * Spread.of(eager).median,
        ratio=ratios(seconds, eager),
        memory={way: peak_bytes(calls[way], device) / 1e6 for way in seconds},
        error=errors["ours"],
        values={
            "errors": {way: float(f"{error:.2g}") for way, error in errors.items()},
            "repeats": repeats,
            **({"left out": refused} if refused else {}),
        },
    )


def _ways(operator: Operator, W: Tensor, factors: list[Tensor], device: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Every way to run an operator on its inputs; and what ways of others say that fail on them."""

    def pinned(choice: str) -> object:
        with kernels.use(choice):
            return operator.kernel(W, factors)

    calls: dict[str, Call] = {
        "ours": lambda: pinned("auto" if device == "cpu" else "triton"),
        "eager": lambda: operator.eager(W, factors),
    }
    if device != "cpu":
        torch.compiler.reset()  # it compiles one function for so many sizes and dtypes, and no more
        compiled = torch.compile(operator.eager, fullgraph=True, dynamic=False)
        calls |= {"reference": lambda: pinned("torch"), "compiled": lambda: compiled(W, factors)}
    peer = operator.lycoris
    if peer is not None and importlib.util.find_spec("lycoris"):
        calls["lycoris"] = lambda: peer(W, factors)
    refused: dict[str, str] = {}
    for way in {"compiled", "lycoris"} & set(calls):
        try:
            calls[way]()
        except (RuntimeError, TypeError, ValueError) as error:
            refused[way] = str(error).partition("\n")[0]
            del calls[way]
    return calls, refused


def _flat(result: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in (result if isinstance(result, list) else [result])])


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())
