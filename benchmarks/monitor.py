"""What watching costs: measuring every 20 steps, over the training step, for every kind of adapter.

    python benchmarks/monitor.py [--rounds 15] [--save]

On the U-Net of digits8.py (40 layers, batches of 20) and on all 36 linear layers of MiniLM (batches of 16 sentences):
training steps, measurements and naive measurements, which materialise ΔW and take its cosine, alternate in one process,
and the figures are ratios of medians. Memory is the largest single allocation of a measurement over the largest weight.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.monitor import CSMonitor
from peftkit.wrapping.installed import installed_adapters

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "digits"), str(ROOT / "examples")]
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
    """The U-Net of the digits example."""
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
    """The 36 linear layers of MiniLM on sentences."""
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
    """The mean cosine of W and ΔW by materialising ΔW."""
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


def measure(name: str, case: Case, kind: str, rounds: int) -> Row:
    """Time training steps, measurements and naive measurements in turns."""
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
        for what, function in (("step", step), ("measure", monitor.measure), ("naive", lambda: naive(model))):
            start = time.perf_counter()
            function()
            seconds[what].append(time.perf_counter() - start)
    median = {what: statistics.median(values) for what, values in seconds.items()}
    weight = max(where.base.nbytes for where in installed_adapters(model, ["default"]))
    values = {
        "weights": len(list(installed_adapters(model, ["default"]))),
        "step ms": round(1e3 * median["step"], 1),
        "added": round(median["measure"] / median["step"] / INTERVAL, 5),
        "naive": round(median["naive"] / median["step"] / INTERVAL, 5),
        "memory": round(largest(monitor.measure) / weight, 3),
        "naive memory": round(largest(lambda: naive(model)) / weight, 3),
    }
    pk.unwrap(model)
    return Row("monitor", kind, name, "float32", values=values)


def main() -> None:
    script = Script(__file__, __doc__, rounds=15, kinds=tuple(KINDS))
    arguments = script.parse()
    cases = {"digits U-Net": digits(), "MiniLM": minilm()}
    for case in cases.values():
        case.model.requires_grad_(False)
    rows = script.run(
        [
            lambda name=name, case=case, kind=kind: measure(name, case, kind, arguments.rounds)
            for name, case in cases.items()
            for kind in arguments.kinds
        ]
    )
    dear = [f"{row.case} {row.kind}" for row in rows if row.values["added"] > 0.01]
    if dear:
        sys.exit(f"measuring adds more than 1 % to the step of {', '.join(dear)}")


if __name__ == "__main__":
    main()
