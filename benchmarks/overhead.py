"""What one call of a small adapted layer costs beyond the frozen layer: one token through a 64×64 Linear.

    python benchmarks/overhead.py [--rounds 31] [--kinds lora,…] [--save]

Without gradients, in microseconds, each call timed in turns with the frozen layer: the price of the Python and of the
operators around the arithmetic, which is nothing at this size.
"""

from __future__ import annotations

import torch

from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, Host, adapted, ways
from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.bench.timing import Call, Spread, contest

LAYER = LayerShape(64, 64, tokens=1)


def measure(kind: str, rounds: int) -> Row:
    """Return µs beyond the frozen layer of every way to adapt it; "frozen": µs of that layer."""
    torch.manual_seed(0)
    layer, x = LAYER.layer(), LAYER.input()
    models = {"frozen": Host(layer)} | {way: adapted(way, kind, layer) for way in ways(["lycoris", "peft"], kind)}
    calls: dict[str, Call] = {way: lambda model=model: model(x) for way, model in models.items()}
    with torch.no_grad():
        seconds = contest(calls, rounds=rounds, least=0.01)
    frozen = seconds.pop("frozen")
    beyond = {way: [each - base for each, base in zip(taken, frozen, strict=True)] for way, taken in seconds.items()}
    found = {"frozen": frozen, **beyond}
    microseconds = {way: round(1e6 * Spread.of(taken).median, 1) for way, taken in found.items()}
    return Row("overhead", kind, "64×64, 1 tokens", "float32", values={"microseconds": microseconds})


def main() -> None:
    script = Script(__file__, __doc__, rounds=31, kinds=tuple(KINDS))
    arguments = script.parse()
    script.run([lambda kind=kind: measure(kind, arguments.rounds) for kind in arguments.kinds])


if __name__ == "__main__":
    main()
