"""The two pictures of the demo: samples of every model, and every run as the monitor saw it."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from peftkit.monitor import read_run
from peftkit.monitor.plot import panel
from peftkit.monitor.style import WIDTH, legend_below, save, styled

GAP = 3  # pixels between images
MARGIN = 0.9  # inches for the names of the lines


@styled()
def draw_samples(rows: dict[str, Tensor], path: Path) -> None:
    """Draw a line of images for every entry. rows: (n, 1, h, w) in [-1, 1], n may differ."""
    columns = max(len(images) for images in rows.values())
    height, width = next(iter(rows.values())).shape[-2:]
    sheet = torch.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP), -1.0)
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images):
            top, left = i * (height + GAP), j * (width + GAP)
            sheet[top : top + height, left : left + width] = image[0]
    figure = Figure(figsize=(WIDTH, (WIDTH - MARGIN) * sheet.shape[0] / sheet.shape[1]))
    axes = figure.add_axes((MARGIN / WIDTH, 0, 1 - MARGIN / WIDTH, 1))
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=-0.9, vmax=1, interpolation="bicubic")
    axes.grid(visible=False)
    axes.set_yticks([i * (height + GAP) + height / 2 for i in range(len(rows))], [*rows])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)
    save(figure, path)


@styled()
def draw_runs(logs: dict[str, Path], path: Path) -> None:
    """Draw CS with the held-out loss above, the fluctuation below, for every log, three beside each other."""
    columns = 3
    lines = -(-len(logs) // columns)
    figure = Figure(figsize=(WIDTH, 3.3 * lines + 0.4), layout="constrained")
    grid = figure.subplots(2 * lines, columns, sharex=True, height_ratios=(3, 2) * lines, squeeze=False)
    for unused in grid.reshape(lines, 2, columns).transpose(0, 2, 1).reshape(-1, 2)[len(logs) :].flat:
        unused.set_visible(False)
    losses = []
    for i, (name, log) in enumerate(logs.items()):
        line, column = divmod(i, columns)
        above, below = grid[2 * line][column], grid[2 * line + 1][column]
        loss = panel(above, below, read_run(log).rows, names=False)
        above.set_title(name)
        above.yaxis.set_major_locator(MaxNLocator(4))
        if column == 0:
            above.set_ylabel("CS")
            below.set_ylabel("fluctuation")
        if i + columns >= len(logs):  # the last of its column
            below.set_xlabel("steps")
            below.tick_params(labelbottom=True)
        if loss is not None:
            losses.append(loss)
            loss.yaxis.set_major_locator(MaxNLocator(4))
            last = column == columns - 1
            loss.tick_params(right=last, labelright=last)
            loss.spines["right"].set_visible(last)
            loss.set_ylabel("held-out loss" if last else "")
    limits = [limit for axes in losses for limit in axes.get_ylim()]
    for axes in losses:  # one scale, so that the losses compare
        axes.set_ylim(min(limits), max(limits))
    figure.align_ylabels()
    legend_below(figure, columns=3)
    save(figure, path)
