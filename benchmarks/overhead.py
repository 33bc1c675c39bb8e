"""What one call of a small adapted layer costs beyond the frozen layer: one token through a 64×64 Linear.

    python benchmarks/overhead.py [--rounds 31] [--save]

Without gradients, in microseconds, each call timed in turns with the frozen layer: the price of the Python and of the
operators around the arithmetic, which is nothing at this size.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
from rich.progress import track

from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, Host, adapted, ways
from peftkit.bench.rows import environment
from peftkit.bench.timing import Call, Spread, contest

RESULTS = Path(__file__).parent / "results" / "overhead.json"
LAYER = LayerShape(64, 64, tokens=1)


def measure(kind: str, rounds: int) -> dict[str, float]:
    """µs beyond the frozen layer of every way to adapt it; "frozen": µs of that layer."""
    torch.manual_seed(0)
    layer, x = LAYER.layer(), LAYER.input()
    models = {"frozen": Host(layer)} | {way: adapted(way, kind, layer) for way in ways(["lycoris", "peft"], kind)}
    calls: dict[str, Call] = {way: lambda model=model: model(x) for way, model in models.items()}
    with torch.no_grad():
        seconds = contest(calls, rounds=rounds, least=0.01)
    frozen = seconds.pop("frozen")
    beyond = {way: [each - base for each, base in zip(taken, frozen, strict=True)] for way, taken in seconds.items()}
    found = {"frozen": frozen, **beyond}
    return {way: round(1e6 * Spread.of(taken).median, 1) for way, taken in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="turns of each way")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of peers, about how they are used
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    found = {kind: measure(kind, arguments.rounds) for kind in track(KINDS, description="measuring")}
    print(json.dumps(found, indent=1))
    if arguments.save:
        RESULTS.write_text(json.dumps({**environment("cpu"), "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
