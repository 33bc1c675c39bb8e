"""The training step of LoRA and DoRA on a 4-bit layer of bitsandbytes, ours and PEFT's in turns.

    python benchmarks/quantised.py [--rounds 25] [--kinds lora,dora] [--save]

Forward and backward on the CPU, over the step of the frozen 4-bit layer. "ours over peft" is the ratio of the fastest
steps, which other work on the machine disturbs least: 1.1 for LoRA is the most that is allowed, and the script fails
above it.
"""

from __future__ import annotations

import sys

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import Host, adapted
from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.bench.step import step
from peftkit.bench.timing import Spread, contest, ratios

LAYERS = (LayerShape(1024, 1024, tokens=128), LayerShape(2048, 512, tokens=32))
MOST = {"lora": 1.1}


def four_bit(layer: nn.Linear) -> nn.Module:
    """Return the layer in NF4 with double quantisation, as QLoRA has it."""
    quantised = Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")


def measure(kind: str, shape: LayerShape, rounds: int) -> Row:
    """Time a step of ours and of PEFT's on copies of one 4-bit layer."""
    torch.manual_seed(0)
    layer = shape.layer()
    assert isinstance(layer, nn.Linear)
    frozen = four_bit(layer)
    x = shape.input().requires_grad_()
    models = {way: adapted(way, kind, frozen) for way in ("ours", "peft")}
    with torch.no_grad():
        g = torch.randn_like(frozen(x))
    steps = {"frozen": step(Host(frozen), x, g), **{way: step(model, x, g) for way, model in models.items()}}
    seconds = contest(steps, rounds=rounds, least=0.01)
    fastest = min(seconds["ours"]) / min(seconds["peft"])
    base = seconds.pop("frozen")
    return Row(
        "quantised",
        kind,
        f"{shape} NF4",
        "float32",
        reference="frozen 4-bit layer",
        reference_ms=1e3 * Spread.of(base).median,
        ratio=ratios(seconds, base),
        values={"ours over peft": round(fastest, 3)},
    )


def main() -> None:
    script = Script(__file__, __doc__, rounds=25, kinds=("lora", "dora"))
    arguments = script.parse()
    cells = [
        lambda kind=kind, shape=shape: measure(kind, shape, arguments.rounds)
        for kind in arguments.kinds
        for shape in LAYERS
    ]
    slow = [row for row in script.run(cells) if row.values["ours over peft"] > MOST.get(row.kind, float("inf"))]
    if slow:
        sys.exit(f"{slow[0].kind} on {slow[0].case} takes {slow[0].values['ours over peft']} of PEFT's step")


if __name__ == "__main__":
    main()
