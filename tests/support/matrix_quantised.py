"""Every adapter kind on every quantised base: layers to try, and what comes of it, to print and to test.

python -m tests.support.matrix_quantised
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import PeftkitError
from peftkit.wrapping.bases.fp8 import FineGrainedFP8
from peftkit.wrapping.bases.matrix import QuantisedMatrix
from peftkit.wrapping.installed import adapted_modules
from peftkit.wrapping.sites import sites
from tests.support.zoo import train

ROWS, COLUMNS = 128, 64
WIDE = (2048, 1024)  # a weight of several row blocks

#: options that the kinds need on a weight of that size
OPTIONS: dict[str, dict[str, Any]] = {
    "loldu": {"rank": 4},
    "lokr": {"factor": 4},
    "glora": {"rank": 2},
    "dylora": {"rank": 4, "block": 4},  # of one block: what it draws is always all of it
}


def _four_bit(quant_type: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        import bitsandbytes

        bias = linear.bias is not None
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias, quant_type=quant_type, **options
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")  # which quantises it

    return make


def _eight_bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    bias = linear.bias is not None
    layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(config: str, *args: Any, group: int | None = None) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        granularity = {} if group is None else {"granularity": quantization.PerGroup(group)}
        quantization.quantize_(linear, getattr(quantization, config)(*args, **granularity))
        return linear

    return make


def fp8_layer(linear: nn.Linear) -> nn.Module:
    """An FP8Linear of transformers with blocks of 32 × 32, which has no forward on a CPU."""
    from transformers.integrations import finegrained_fp8

    bias = linear.bias is not None
    layer = finegrained_fp8.FP8Linear(linear.in_features, linear.out_features, (32, 32), has_bias=bias)
    with torch.no_grad():
        layer.weight_scale_inv.fill_(1.0)
        for name, value in FineGrainedFP8.requantised(layer, linear.weight).items():
            setattr(layer, name, value)
        if bias:
            layer.bias.copy_(linear.bias)
    return layer


#: base -> what makes a quantised layer of a Linear
BASES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes nf4": _four_bit("nf4", compress_statistics=False),
    "bitsandbytes nf4 double": _four_bit("nf4"),
    "bitsandbytes fp4": _four_bit("fp4", compress_statistics=False),
    "bitsandbytes int8": _eight_bit,
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 groups": _torchao("Int8WeightOnlyConfig", group=32),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": _torchao("IntxWeightOnlyConfig", torch.int4, group=32),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
}


def quantised(base: str, rows: int = ROWS, columns: int = COLUMNS, bias: bool = True, seed: int = 0) -> nn.Module:
    """A quantised layer of random weights, the same each time, in training mode."""
    torch.manual_seed(seed)
    return BASES[base](nn.Linear(columns, rows, bias=bias)).train()


def network(base: str) -> nn.Sequential:
    """Two quantised layers with something between them, the same each time, in training mode."""
    first, second = quantised(base), quantised(base, COLUMNS, ROWS, bias=False, seed=1)
    return nn.Sequential(first, nn.GELU(), second).train()


def dequantised(model: nn.Sequential) -> nn.Sequential:
    """The same network of plain layers, with the weights that the quantised ones stand for."""
    found = sites(model)
    layers: list[nn.Module] = []
    for name, module in model.named_children():
        if name not in found:
            layers.append(module)
            continue
        matrix = found[name].matrix.detach().to(torch.float32, copy=True)
        plain = nn.Linear(matrix.shape[1], matrix.shape[0], bias=module.bias is not None)
        with torch.no_grad():
            plain.weight.copy_(matrix)
            if isinstance(module.bias, Tensor):
                plain.bias.copy_(module.bias)
        layers.append(plain)
    return nn.Sequential(*layers)


def pair(kind: str, base: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A quantised network with trained adapters, and the plain one of the same weights and adapters."""
    model = network(base)
    plain = dequantised(model)
    for each in (model, plain):
        pk.wrap(each, kind, **OPTIONS.get(kind, {}))
    train(model)
    give(model, plain)
    return model, plain


def give(model: nn.Module, other: nn.Module) -> None:
    """Give the other model's adapters the tensors of this one's."""
    for own, theirs in zip(adapted_modules(model).values(), adapted_modules(other).values(), strict=True):
        theirs.adapters.load_state_dict(own.adapters.state_dict())


class Cell(NamedTuple):
    """What came of a kind on a base."""

    kind: str
    base: str
    #: why it was refused; "" where it was not
    refusal: str
    #: the largest share of W that a training step dequantised at once, the layer's own forward and backward apart
    at_once: float


def cells(kinds: Sequence[str] | None = None, bases: Sequence[str] | None = None) -> Iterator[Cell]:
    """Train every kind on every base for one step, and yield what came of it."""
    for kind, base in itertools.product(kinds or pk.kinds(), bases or BASES):
        yield _cell(kind, base)


def _cell(kind: str, base: str) -> Cell:
    layer = quantised(base, *WIDE)
    parts = [0.0]

    def watched(self: QuantisedMatrix, start: int, stop: int) -> Tensor:
        parts.append((stop - start) / self.base.shape[0])
        return rows_of_base(self, start, stop)

    rows_of_base = QuantisedMatrix.rows_of_base
    try:
        pk.wrap(layer, kind, **OPTIONS.get(kind, {}))
        train(layer)
        with mock.patch.object(QuantisedMatrix, "rows_of_base", watched):
            layer(torch.randn(3, WIDE[1], requires_grad=True)).square().sum().backward()
    except PeftkitError as error:
        return Cell(kind, base, str(error), 0.0)
    assert all(p.grad is not None for p in pk.adapter_parameters(layer))
    return Cell(kind, base, "", max(parts))


def table() -> str:
    """The matrix in Markdown: + where W is not read, or how much of it at once, or the reason why it was refused."""
    found = {(cell.kind, cell.base): cell for cell in cells()}
    lines = [f"| kind | {' | '.join(BASES)} |", "| --- |" + " --- |" * len(BASES)]
    for kind in pk.kinds():
        shown = [found[kind, base] for base in BASES]
        marks = [c.refusal or (f"{100 * c.at_once:.0f} % of W at once" if c.at_once else "+") for c in shown]
        lines.append(f"| {kind} | {' | '.join(marks)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
