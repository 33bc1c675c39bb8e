"""Train adapters past the point of overfitting and record what a monitor sees beside the validation loss.

    python benchmarks/trajectories.py [TASK …] [--seeds N] [--kinds locon,loha,…]

Real tasks: a U-Net learns a handwritten digit of 8×8 pixels it has never seen from ten images (digit-9, digit-8; see
digits8.py), and MiniLM the sentiment of reviews from 48 sentences (movies, amazon); the digits also at a third and
three times the learning rate (-slow, -fast). Adapter and data are drawn anew from every seed: 156 runs, about two hours
of two cores. One file a run goes to out/trajectories/; a run whose file is there is not made again.
benchmarks/early_stopping.py judges by them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import peftkit as pk
from peftkit.monitor import CSMonitor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "digits"), str(ROOT / "examples")]  # the tasks are those of the examples
FOLDER = ROOT / "out" / "trajectories"
KINDS = ("locon", "loha", "lokr", "loldu", "dora", "oft")


@dataclass
class Run:
    """A wrapped model with its data: the loss of a batch, and the validation loss."""

    model: nn.Module
    groups: list[dict[str, Any]]
    loss: Callable[[], Tensor]
    validate: Callable[[], float]


@dataclass(frozen=True)
class Task:
    """How to set up a run, its steps, how often it is validated, what rates are multiplied by, and how many draws."""

    make: Callable[[str, int], Run]
    steps: int
    every: int
    rate: float = 1.0
    seeds: int = 5


def digit(which: int) -> Callable[[str, int], Run]:
    """Ten images of a digit that the base has not seen; the validation loss is that of all others of it."""

    def make(kind: str, seed: int) -> Run:
        import digits8
        from handwriting.diffusion import evaluate, loss

        few, held_out = digits8.few_and_others(which, 100 + seed)
        model = digits8.base_model()
        pk.wrap(model, rules=digits8.RULES[kind])
        model.train()
        return Run(
            model,
            [{"params": pk.adapter_parameters(model), "lr": digits8.LR[kind]}],
            lambda: loss(model, few[torch.randint(0, len(few), (digits8.BATCH,))]),
            lambda: evaluate(model, held_out),
        )

    return make


#: options and learning rate on the query and value projections of MiniLM, chosen once by hand
TEXT: dict[str, tuple[dict[str, Any], float]] = {
    "locon": ({"rank": 8, "alpha": 16}, 1e-3),
    "loha": ({"rank": 4}, 3e-3),
    "lokr": ({"factor": 8}, 1e-3),
    "loldu": ({"rank": 64}, 1e-2),
    "dora": ({"rank": 8, "alpha": 16}, 1e-3),
    "oft": ({"block_size": 16}, 1e-3),
}


def sentiment(reviews: str) -> Callable[[str, int], Run]:
    """48 sentences, half of them good; the validation loss is that of 150 others."""

    def make(kind: str, seed: int) -> Run:
        import text_minilm
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        few, test = text_minilm.sentences(48, seed, ROOT / ".assets" / f"{reviews}.tsv")
        test = test[torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(seed))[:150]]
        encoder, head = text_minilm.load_encoder(), nn.Linear(384, 2)
        options, lr = TEXT[kind]
        pk.wrap(encoder, kind, targets=["*.query", "*.value"], **options)

        def batches() -> Iterator[Tensor]:
            while True:
                yield from torch.randperm(len(few.labels)).split(8)

        order = batches()

        def loss() -> Tensor:
            batch = few[next(order)]
            return F.cross_entropy(head(text_minilm.embed(encoder, batch)), batch.labels)

        def validate() -> float:
            return F.cross_entropy(text_minilm.predict(encoder, head, test), test.labels).item()

        groups = [
            {"params": pk.adapter_parameters(encoder), "lr": lr},
            {"params": list(head.parameters()), "lr": 1e-3},
        ]
        return Run(encoder, groups, loss, validate)

    return make


TASKS: dict[str, Task] = {
    "digit-9": Task(digit(9), 300, 6),
    "movies": Task(sentiment("movie_reviews"), 120, 8),
    "digit-8": Task(digit(8), 300, 6),
    "amazon": Task(sentiment("amazon_reviews"), 120, 8),
    "digit-9-slow": Task(digit(9), 300, 6, 1 / 3, seeds=2),
    "digit-9-fast": Task(digit(9), 300, 6, 3.0, seeds=2),
    "digit-8-slow": Task(digit(8), 300, 6, 1 / 3, seeds=1),
    "digit-8-fast": Task(digit(8), 300, 6, 3.0, seeds=1),
}


def record(task: Task, kind: str, seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """Train once. Every step: the loss, the learning rate, cos, ‖ΔW‖ and ‖ΔW‖/‖W‖ of every weight, and what the
    optimiser knows: how far the gradients agree (mean of m̂²/v̂), and how far an update does with the one before."""
    torch.manual_seed(1000 + seed)
    run = task.make(kind, seed)
    groups = [{**group, "lr": task.rate * group["lr"]} for group in run.groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: pk.project_(run.model))
    parameters = pk.adapter_parameters(run.model)
    monitor = CSMonitor(run.model, interval=1, gradients=False, optimizer=optimizer)
    rows: list[dict[str, Any]] = []
    monitor.listeners.append(
        lambda r: rows.append(
            {"cos": [*r.per_module.values()], "norm": [*r.norms.values()], "lr": r.lr, "step": r.step}
            | {"ratio": [*r.ratios.values()]}
        )
    )
    validation = {0: run.validate()}
    before = torch.cat([p.detach().reshape(-1) for p in parameters])
    update = torch.zeros_like(before)
    for step in range(1, task.steps + 1):
        loss = run.loss()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        now = torch.cat([p.detach().reshape(-1) for p in parameters])
        moved, update, before = update, now - before, now
        signal = [optimizer.state[p] for p in parameters]
        agree = torch.cat([(s["exp_avg"] ** 2 / (1 - 0.9**step) ** 2).reshape(-1) for s in signal])
        spread = torch.cat([(s["exp_avg_sq"] / (1 - 0.999**step)).reshape(-1) for s in signal])
        rows[-1] |= {
            "loss": loss.item(),
            "gradient": norm.item(),
            "agreement": (agree / spread.clamp(min=1e-20)).mean().item(),
            "turn": F.cosine_similarity(moved, update, 0).item(),
        }
        if step % task.every == 0:
            validation[step] = run.validate()
        advance()
    return {"rows": rows, "validation": validation, "modules": list(monitor.measure().per_module)}


def runs(tasks: list[str], kinds: list[str], seeds: int | None) -> Iterator[tuple[str, str, int, Path]]:
    """seeds: how many of every task, in place of its own number."""
    for seed in range(seeds or max(TASKS[name].seeds for name in tasks)):
        for name in tasks:
            for kind in kinds:
                if seed < (seeds or TASKS[name].seeds):
                    yield name, kind, seed, FOLDER / f"{name}-{kind}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--seeds", type=int, help="draws of every task, in place of its own number of them")
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    if unknown := set(arguments.tasks) - set(TASKS):
        parser.error(f"unknown: {', '.join(unknown)}; there is {', '.join(TASKS)}")
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        for name, kind, seed, path in runs(arguments.tasks or list(TASKS), arguments.kinds.split(","), arguments.seeds):
            if path.is_file():
                continue
            bar = progress.add_task(f"{name} {kind} seed {seed}", total=TASKS[name].steps)
            result = record(TASKS[name], kind, seed, lambda bar=bar: progress.advance(bar))
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result))
            part.replace(path)


if __name__ == "__main__":
    main()
