"""Teach a diffusion model a digit it has never seen, from ten real images, once with every adapter.

    python examples/digits/demo.py

The base is a U-Net trained on the handwritten digits 0 to 7 (train_base.py). For each adapter: wrap all 40 layers,
train on ten real nines, save. A fresh process then loads each file, checks that merged equals wrapped and that
restoring gives the base back bit for bit, merges the same file into a different base, and draws samples, which a
classifier trained on real digits judges. All the while a monitor watches the weights, and says where overfitting starts
without seeing the held-out loss. Writes out/digits/: the files, table.json, samples.png, a log of every run and
monitor.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from diffusion import digits, evaluate, loss
from recipes import RECIPES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_base import BASE, split, train
from unet import UNet

import peftkit as pk
from peftkit.monitor import EarlyStopping, read_run
from peftkit.monitor.plot import panel

mpl.use("Agg")
import matplotlib.pyplot as plt

OUT = Path("out/digits")
DIGIT, IMAGES, STEPS, BATCH = 9, 10, 60, 20
WINDOW = 5  # measurements, one a step
SHOWN = 16


def base_model(path: Path = BASE) -> UNet:
    """The U-Net with the weights of a file, in fp32."""
    model = UNet()
    model.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    return model.eval()


def new_digit() -> tuple[Tensor, Tensor]:
    """Ten images of the digit to train on, and the others of it, held out."""
    images, labels = digits()
    own = images[torch.from_numpy(labels == DIGIT)]
    own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(5))]
    return own[:IMAGES], own[IMAGES:]


def another_base(path: Path) -> None:
    """The same U-Net trained further on 0-7: what a user finds when the base model gets an update."""
    model = train(base_model().train(), split()[0], steps=100, lr=1e-3, seed=1)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)


def fit(model: nn.Module, images: Tensor, held_out: Tensor, lr: float, log: Path, advance: Any) -> EarlyStopping:
    """AdamW on the adapters alone, watched. images, held_out: (n, 1, 8, 8); the latter only go into the log."""
    torch.manual_seed(0)
    parameters = pk.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    optimizer.register_step_post_hook(lambda *_: pk.project_(model))
    log.unlink(missing_ok=True)
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=WINDOW, log=log)
    model.train()
    for step in range(STEPS):
        if step % 6 == 0:
            stopper.note(held_out=evaluate(model, held_out, repeats=1))
        value = loss(model, images[torch.randint(0, len(images), (BATCH,))])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        advance()
    model.eval()
    stopper.note(held_out=evaluate(model, held_out, repeats=1))
    return stopper


def train_all() -> dict[str, dict[str, Any]]:
    """One adapter file per recipe; what was measured while training."""
    images, held_out = new_digit()
    probe = held_out[:8], torch.arange(8) * 25
    rows: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for kind, recipe in RECIPES.items():
            task = progress.add_task(kind, total=STEPS)
            model = base_model()
            torch.manual_seed(0)
            plan = pk.wrap(model, rules=recipe.rules, name="nine")
            layers = [type(entry.site.module).__name__ for entry in plan.entries]
            assert layers.count("AdaptedConv2d") == layers.count("AdaptedLinear") == 20
            report = pk.check(model, probe)
            assert report.ok, report
            log = OUT / f"{kind}.jsonl"
            stopper = fit(model, images, held_out, recipe.lr, log, lambda task=task: progress.advance(task))
            # LoLDU is made of its base's own factors; portable=True stores them, so that it fits another base too
            path = pk.save(model, OUT / f"{kind}.safetensors", portable=kind == "loldu", training={"images": IMAGES})
            with torch.no_grad():
                save_file({"output": model(*probe)}, OUT / f"{kind}.expected")
            rows[kind] = {
                "parameters": plan.parameters,
                "kB": path.stat().st_size / 1000,
                "held-out after": evaluate(model, held_out),
                "turning point": stopper.advice.step,
            }
    return rows


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console(width=110)
    console.print(f"teaching a model of the digits 0-7 the digit {DIGIT} from {IMAGES} real images")
    another_base(OUT / "other.safetensors")
    rows = train_all()
    console.print("a fresh process loads, merges, restores and samples each file")
    here = Path(__file__).parent
    subprocess.run([sys.executable, here / "reload.py", OUT, *RECIPES], check=True)
    measured = json.loads((OUT / "reload.json").read_text())
    before = evaluate(base_model(), new_digit()[1])
    table = Table(title=f"a {DIGIT} from {IMAGES} images, {STEPS} steps", title_justify="left")
    headings = (
        "adapter",
        "parameters",
        "file kB",
        "turning point",
        "held-out loss",
        f"share of {DIGIT}s",
        "other base",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    share = measured["base"]
    table.add_row(
        "(base)", "", "", "", f"{before:.4f}", f"{share['share']:.0%}", f"{share['share on the other base']:.0%}"
    )
    for kind, row in rows.items():
        row |= measured[kind] | {"held-out before": before}
        table.add_row(
            kind,
            f"{row['parameters']:,}",
            f"{row['kB']:.0f}",
            f"step {row['turning point']}" if row["turning point"] else "not yet",
            f"{row['held-out after']:.4f}",
            f"{row['share']:.0%}",
            f"{row['share on the other base']:.0%}",
        )
    console.print(table)
    worst = max(row["merged against wrapped"] for row in rows.values())
    console.print(f"reloaded == trained bit for bit; merged == wrapped to {worst:.1e}; restored == base bit for bit")
    draw(load_file(OUT / "samples.safetensors"), OUT / "samples.png")
    (OUT / "table.json").write_text(json.dumps({"base": measured["base"] | {"held-out": before}, **rows}, indent=1))
    console.print(f"wrote {OUT / 'samples.png'}: the same noise in every column, the training images last")
    watch(OUT / "monitor.png")
    console.print(f"wrote {OUT / 'monitor.png'}: what the monitor saw, with the held-out loss it did not see")


def draw(samples: dict[str, Tensor], path: Path) -> None:
    """A row of images for the base, for each adapter, and of the training images."""
    rows = {"base": samples["base"], **{kind: samples[kind] for kind in RECIPES}, "trained on": new_digit()[0]}
    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(SHOWN * 0.55 + 1, len(rows) * 0.55))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1)
        line[0].text(-2, 3.5, name, ha="right", va="center", fontsize=11)
    figure.subplots_adjust(left=0.11, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    figure.savefig(path, dpi=110)


def watch(path: Path) -> None:
    """Every run as the monitor saw it: CS above, with the held-out loss beside it; its fluctuation below."""
    figure, axes = plt.subplots(2, len(RECIPES), figsize=(17, 4.6), sharex=True, height_ratios=(3, 2))
    for i, kind in enumerate(RECIPES):
        panel(axes[0][i], axes[1][i], read_run(OUT / f"{kind}.jsonl").rows, names=False)
        axes[0][i].set_title(kind, fontsize=11)
        axes[1][i].set_xlabel("steps", fontsize=9)
        for axis in figure.axes:
            axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("CS (blue), held-out loss (orange)", fontsize=9)
    axes[1][0].set_ylabel("fluctuation", fontsize=9)
    figure.text(
        0.5, 0.005, "red: turning point; dotted: when it was known; triangles: valleys", ha="center", fontsize=9
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
