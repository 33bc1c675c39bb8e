"""What watching costs: measuring every 20 steps, over the training step, for every kind of adapter.

    python benchmarks/monitor.py [--rounds 15] [--save]

On the U-Net of digits8.py (40 layers, batches of 20) and on all 36 linear layers of MiniLM (batches of 16 sentences):
training steps, measurements and naive measurements, which materialise ΔW and take its cosine, alternate in one process,
and the figures are ratios of medians. Memory is the largest single allocation of a measurement over the largest weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import peftkit as pk
from peftkit.monitor import CSMonitor
from peftkit.wrapping.layer import installed_adapters

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "digits"), str(ROOT / "examples")]
RESULTS = Path(__file__).parent / "results" / "monitor.json"
INTERVAL = 20

#: options that fit every layer of the U-Net, or rules where one set does not
KINDS: dict[str, dict[str, Any]] = {
    "locon": {"rank": 4},
    "loha": {"rank": 4},
    "lokr": {"factor": 8},
    "loldu": {"rank": 32},
    "dora": {"rank": 4},
    "oft": {"block_size": 8},
    "boft": {"block_size": 8},
    "ia3": {},
    "glora": {"rank": 4},
    "full": {},
}


@dataclass
class Case:
    """A model to wrap, where, and the loss of a batch."""

    model: nn.Module
    rules: Callable[[str], list[pk.Rule]]
    loss: Callable[[nn.Module], Tensor]


def digits() -> Case:
    import digits8
    from handwriting.diffusion import loss

    images, _ = digits8.few_and_others(9, seed=5)

    def rules(kind: str) -> list[pk.Rule]:
        if kind in digits8.RULES:
            return digits8.RULES[kind]
        if kind == "glora":  # takes no kernel above 1
            return [pk.Rule("*.to_*", "glora", **KINDS[kind])]
        own = [pk.Rule("conv_out", "ia3")] if kind == "boft" else []  # one row cannot rotate
        return [*own, pk.Rule("full", kind, **KINDS[kind])]

    batch = digits8.BATCH
    return Case(digits8.base_model(), rules, lambda model: loss(model, images[torch.randint(0, len(images), (batch,))]))


def minilm() -> Case:
    import text_minilm
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    few, _ = text_minilm.sentences(48, 0)
    head = nn.Linear(384, 2)

    def loss(model: nn.Module) -> Tensor:
        batch = few[torch.randint(0, 48, (16,))]
        return F.cross_entropy(head(text_minilm.embed(model, batch)), batch.labels)

    def rules(kind: str) -> list[pk.Rule]:
        return [pk.Rule("encoder.*.dense", kind, **KINDS[kind]), pk.Rule("*.attention.self.*", kind, **KINDS[kind])]

    return Case(text_minilm.load_encoder(), rules, loss)


@torch.no_grad()
def naive(model: nn.Module) -> float:
    """The mean cosine as anyone would write it."""
    cosines = []
    for where in installed_adapters(model, ["default"]):
        dense = where.adapter.delta(where.base).dense()
        cosines.append(F.cosine_similarity(dense.flatten(), where.base.flatten(), 0).item())
    return statistics.fmean(cosines)


def largest(function: Callable[[], object]) -> int:
    """Bytes of the largest allocation that a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.cpu_memory_usage for event in profile.events() or [])


def measure(case: Case, kind: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = case.model
    pk.wrap(model, rules=case.rules(kind))
    parameters = pk.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()

    def step() -> None:
        loss = case.loss(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    monitor = CSMonitor(model)
    for _ in range(3):
        step()
    assert abs(monitor.measure().cs - naive(model)) < 1e-5
    seconds: dict[str, list[float]] = {"step": [], "measure": [], "naive": []}
    for _ in range(rounds):
        for name, function in (("step", step), ("measure", monitor.measure), ("naive", lambda: naive(model))):
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    weight = max(where.base.nbytes for where in installed_adapters(model, ["default"]))
    result = {
        "weights": len(list(installed_adapters(model, ["default"]))),
        "step ms": round(1e3 * median["step"], 1),
        "added": round(median["measure"] / median["step"] / INTERVAL, 5),
        "naive": round(median["naive"] / median["step"] / INTERVAL, 5),
        "memory": round(largest(monitor.measure) / weight, 3),
        "naive memory": round(largest(lambda: naive(model)) / weight, 3),
    }
    pk.unwrap(model)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, make in (("digits U-Net", digits), ("MiniLM", minilm)):
        case = make()
        case.model.requires_grad_(False)
        results[name] = {kind: measure(case, kind, arguments.rounds) for kind in track(KINDS, description=name)}
    print(json.dumps(results, indent=2))
    if arguments.save:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    dear = [f"{n} {k}" for n, rows in results.items() for k, row in rows.items() if row["added"] > 0.01]
    if dear:
        sys.exit(f"measuring adds more than 1 % to the step of {', '.join(dear)}")


if __name__ == "__main__":
    main()
