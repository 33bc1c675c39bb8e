"""Early stopping as a user meets it: loops, snapshots, going back, going on after a stop, logs, pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import peftkit as pk
from peftkit.errors import FileError, MergeStateError, MismatchError, OptionError
from peftkit.monitor import EarlyStopping, JsonLines, LiveLine, Row, SecondValley, TurningPoint, read_run
from peftkit.monitor.plot import draw


def make(kind: str = "lora", seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    pk.wrap(model, kind, **({"rank": 2} if kind == "lora" else {}))
    return model, torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2, weight_decay=0)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int = 1,
    until: Callable[[], bool] = lambda: False,
) -> int:
    """Steps that were made: a few noisy pairs, learned by heart."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 8, generator=generator), torch.randn(12, 8, generator=generator)
    for step in range(steps):
        index = torch.randint(0, 12, (4,), generator=generator)
        optimizer.zero_grad()
        (model(x[index]) - y[index]).square().mean().backward()
        optimizer.step()
        if until():
            return step + 1
    return steps


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("mode", ["robust", "paper", "authors"])
@pytest.mark.parametrize("folder", [False, True])
def test_goes_back_to_the_turning_point(mode: str, folder: bool, tmp_path: Path) -> None:
    """Snapshots are copies: going back gives the very parameters of that step, not those of now."""
    model, optimizer = make()
    where = tmp_path / "snapshots" if folder else None
    stopper = EarlyStopping(model, optimizer=optimizer, interval=2, window=4, criterion=mode, stop=True, folder=where)
    history: dict[int, dict[str, torch.Tensor]] = {}
    optimizer.register_step_post_hook(lambda *_: history.update({stopper.monitor.steps: state(model)}))
    made = fit(model, optimizer, 400, until=lambda: stopper.should_stop)
    advice = stopper.advice
    assert made < 400
    assert advice.detected == made
    assert advice.step is not None
    assert advice.snapshot is not None
    assert abs(advice.step - advice.snapshot) <= 2 * 2  # half the distance of snapshots, two measurements of two steps
    assert stopper.restore() == advice.snapshot
    assert equal(state(model), history[advice.snapshot])
    assert not equal(state(model), history[made])
    assert f"turning point at step {advice.step}" in str(advice)
    if where is not None:
        (path,) = where.iterdir()
        assert path.name.endswith(f"-{advice.snapshot}.safetensors")


def test_advises_by_default_and_changes_nothing() -> None:
    watched, optimizer = make()
    stopper = EarlyStopping(watched, optimizer=optimizer, interval=1, window=3)
    fit(watched, optimizer, 100)
    alone, optimizer = make()
    fit(alone, optimizer, 100)
    assert equal(state(watched), state(alone)), "watching changed the run"
    assert stopper.advice.step is not None
    assert not stopper.should_stop


def test_without_a_turning_point_nothing_is_touched() -> None:
    model, optimizer = make()
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=50, stop=True)
    fit(model, optimizer, 30)
    last = state(model)
    assert stopper.restore() is None
    assert equal(state(model), last)
    assert stopper.advice.step is None
    assert "no turning point yet" in str(stopper.advice)


@pytest.mark.parametrize("attribution", ["start", "centre", "end"])
@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_the_nearest_snapshot_is_always_kept(attribution: str, window: int) -> None:
    """Whenever a valley shows, the snapshot within half their distance is still there, and never more than eight."""
    model, optimizer = make()
    for seed in range(6):
        rule = SecondValley(window, attribution=attribution)
        stopper = EarlyStopping(model, interval=1, window=window, criterion=rule)
        generator = torch.Generator().manual_seed(seed)
        walk = torch.randn(40 * window, generator=generator).cumsum(0)
        for t, cs in enumerate(walk.tolist()):
            rule.push(cs)
            stopper._keep(t, t)
            assert len(stopper.backups) <= 8
            if rule.found is not None:
                break
        assert rule.found is not None
        (kept,) = stopper.backups
        assert abs(kept.measurement - rule.found.measurement) <= stopper.every / 2
    del optimizer


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("cut", [1, 7, 20, 33, 60])
def test_resumes_to_the_bit(cut: int, folder: bool, tmp_path: Path) -> None:
    """A run cut in two, in the middle of a window, is the run that was not: same rows, same snapshots, same advice."""

    def new(model: nn.Module, name: str) -> EarlyStopping:
        return EarlyStopping(model, interval=1, window=4, folder=tmp_path / name if folder else None)

    model, _ = make()
    whole, first = new(model, "whole"), new(model, "parts")
    moves = torch.Generator().manual_seed(3)
    saved: dict[str, Any] = {}
    resumed: EarlyStopping | None = None
    for step in range(80):
        with torch.no_grad():
            for parameter in pk.adapter_parameters(model):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=moves))
        if step == cut:
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
            resumed = new(model, "parts")
            resumed.load_state_dict(saved)
        whole.step(lr=1e-3)
        (first if resumed is None else resumed).step(lr=1e-3)
    assert resumed is not None
    assert resumed.rows == whole.rows
    assert resumed.advice == whole.advice
    assert [s.step for s in resumed.backups] == [s.step for s in whole.backups]
    assert all(equal(a.read(), b.read()) for a, b in zip(resumed.backups, whole.backups, strict=True))


def test_a_head_beside_the_model_goes_back_with_it() -> None:
    model, _ = make()
    head = nn.Linear(8, 2)
    stopper = EarlyStopping(model, interval=1, window=2, also=[head], criterion=Told(5, 9))
    kept: dict[int, torch.Tensor] = {}
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in (*pk.adapter_parameters(model), *head.parameters()):
                parameter.add_(0.1)
        kept[step] = head.weight.detach().clone()
        stopper.step()
    went_to = stopper.restore()
    assert went_to is not None
    assert abs(went_to - 6) <= 1
    assert torch.equal(head.weight, kept[went_to])


class Told:
    """A criterion of one's own: says what it was told to, when it was told to."""

    def __init__(self, measurement: int, detected: int) -> None:
        self.point = TurningPoint(measurement, measurement, detected)
        self.found: TurningPoint | None = None
        self.valleys: list[int] = []
        self.count = 0

    def see(self, record: pk.monitor.Record) -> float | None:
        if self.count == self.point.detected:
            self.found = self.point
            self.valleys.append(self.point.valley)
        self.count += 1
        return record.ratio

    @property
    def wanted(self) -> tuple[int | None, int]:
        return self.point.measurement, self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


def test_one_epoch_as_the_window() -> None:
    model, _ = make()
    assert EarlyStopping(model, interval=10, steps_per_epoch=97).window == 10
    with pytest.raises(OptionError, match="give one of them"):
        EarlyStopping(model, window=5, steps_per_epoch=97)
    with pytest.raises(OptionError, match="measure more often"):
        EarlyStopping(model, interval=20, steps_per_epoch=30)


def test_uneven_epochs_and_rates_change_nothing() -> None:
    """Only optimiser steps count: epochs of any length and a schedule leave the measured steps where they are."""
    model, optimizer = make()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    stopper = EarlyStopping(model, optimizer=optimizer, interval=4, window=3, criterion="paper")
    for length in (7, 3, 11, 19, 20):
        for _ in range(length):
            fit(model, optimizer, 1)
            schedule.step()
    rows = [row for row in stopper.rows if row.cs is not None]
    assert [row.step for row in rows] == list(range(4, 61, 4))
    assert all(row.lr is not None for row in rows)
    assert len({row.lr for row in rows}) == len(rows)


def test_a_run_that_diverges_goes_on_and_is_told(tmp_path: Path) -> None:
    """Measurements that are not finite count for nothing: what comes after them is as if they had not been."""
    model, _ = make()
    log = tmp_path / "run.jsonl"
    stopper, calm = (EarlyStopping(model, interval=1, window=3, log=log if i == 0 else ()) for i in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        parameters = pk.adapter_parameters(model)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        calm.step()
        if step == 20:
            kept = parameters[0].detach().clone()
            parameters[0].data.fill_(float("nan"))
            assert math.isnan(stopper.monitor.measure().cs)
            stopper.step()
            parameters[0].data.copy_(kept)
        stopper.step()
    assert [r.fluctuation for r in stopper.rows if r.cs is not None] == [r.fluctuation for r in calm.rows]
    assert stopper.advice.diverged == 1
    assert [row.step for row in read_run(log).rows if "diverged" in row.noted] == [21]


def test_merged_adapters_are_not_put_back() -> None:
    model, optimizer = make()
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=3)
    fit(model, optimizer, 60)
    pk.merge(model)
    with pytest.raises(MergeStateError, match="restore"):
        stopper.restore()


def test_a_lost_snapshot_is_named(tmp_path: Path) -> None:
    model, optimizer = make()
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=3, folder=tmp_path / "s")
    fit(model, optimizer, 60)
    for path in (tmp_path / "s").iterdir():
        path.unlink()
    with pytest.raises(FileError, match="snapshot-"):
        stopper.restore()


def test_a_state_is_whole_after_the_run_went_on(tmp_path: Path) -> None:
    """A run that is resumed from an earlier state has lost the files of then: the state holds what was in them."""
    model, optimizer = make()
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=5, folder=tmp_path / "s")
    fit(model, optimizer, 12)
    saved, steps = stopper.state_dict(), [s.step for s in stopper.backups]
    tensors = [s.read() for s in stopper.backups]
    fit(model, optimizer, 100)
    again = EarlyStopping(model, interval=1, window=5, folder=tmp_path / "s")
    again.load_state_dict(saved)
    assert [s.step for s in again.backups] == steps
    assert all(equal(a.read(), b) for a, b in zip(again.backups, tensors, strict=True))


def test_runs_may_share_a_folder(tmp_path: Path) -> None:
    runs = []
    for seed in range(2):
        model, optimizer = make(seed=seed)
        runs.append(
            (model, optimizer, EarlyStopping(model, optimizer=optimizer, interval=1, window=3, folder=tmp_path))
        )
    history: list[dict[int, dict[str, torch.Tensor]]] = [{}, {}]
    for step in range(1, 61):
        for (model, optimizer, _), seen in zip(runs, history, strict=True):
            fit(model, optimizer, 1, seed=step)
            seen[step] = state(model)
    for (model, _, stopper), seen in zip(runs, history, strict=True):
        went_to = stopper.restore()
        assert went_to is not None
        assert equal(state(model), seen[went_to])


@pytest.mark.parametrize("options", [{"window": 4}, {"interval": 2}, {"criterion": "paper"}, {"criterion": "authors"}])
def test_a_state_of_other_settings_is_refused(options: dict[str, Any]) -> None:
    model, _ = make()
    saved = EarlyStopping(model, interval=1, window=3).state_dict()
    with pytest.raises(OptionError, match="same options"):
        EarlyStopping(model, **{"interval": 1, "window": 3, **options}).load_state_dict(saved)


def test_nothing_is_put_into_another_model() -> None:
    """A rank-1 snapshot does not spread over a rank-4 adapter, and no parameter is written before all fit."""
    narrow, optimizer = make()
    stopper = EarlyStopping(narrow, optimizer=optimizer, interval=1, window=3)
    fit(narrow, optimizer, 60)
    wide = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    pk.wrap(wide, "lora", rank=4)
    other = EarlyStopping(wide, interval=1, window=3)
    other.load_state_dict(stopper.state_dict())
    before = state(wide)
    with pytest.raises(MismatchError, match=r"(?s)default.*nothing was put back"):
        other.restore()
    assert equal(state(wide), before)


def test_frozen_after_training_it_still_goes_back() -> None:
    model, optimizer = make()
    stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=3)
    fit(model, optimizer, 60)
    model.requires_grad_(False)
    assert stopper.restore() == stopper.advice.snapshot


def test_a_criterion_brings_its_window() -> None:
    model, _ = make()
    assert EarlyStopping(model, criterion=SecondValley(20)).window == 20
    with pytest.raises(OptionError, match="windows of 5 and a criterion with windows of 20"):
        EarlyStopping(model, window=5, criterion=SecondValley(20))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"also": [3]},
        {"criterion": None},
        {"criterion": SecondValley},
        {"steps_per_epoch": "100"},
        {"spectra": -1},
    ],
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    model, _ = make()
    with pytest.raises(OptionError, match=next(iter(options))):
        EarlyStopping(model, **options)


@pytest.mark.parametrize("name", ["step", "cs", "fluctuation", "record", "gradient", "modules"])
def test_names_of_the_monitor_cannot_be_noted(name: str) -> None:
    model, _ = make()
    with pytest.raises(OptionError, match=name):
        EarlyStopping(model).note(**{name: 1.0})


# -- logs ---------------------------------------------------------------------------------------------------------


class Writer:
    """Stands for a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


def watched(tmp_path: Path, steps: int = 60) -> tuple[EarlyStopping, list[Row], Writer]:
    model, optimizer = make()
    seen: list[Row] = []
    writer = Writer()
    log = [tmp_path / "run.jsonl", str(tmp_path / "run.csv"), writer, seen.append]
    stopper = EarlyStopping(model, optimizer=optimizer, interval=2, window=3, log=log, gradients=True)
    for epoch in range(steps // 20):
        fit(model, optimizer, 20)
        stopper.note(validation=1.0 / (1 + epoch))
    return stopper, seen, writer


def test_every_log_holds_the_run(tmp_path: Path) -> None:
    stopper, seen, writer = watched(tmp_path)
    measured = [row for row in stopper.rows if row.cs is not None]
    run = read_run(tmp_path / "run.jsonl")
    assert run.settings["window"] == 3
    assert run.settings["interval"] == 2
    assert [row.cs for row in run.rows if row.cs is not None] == [row.cs for row in measured]
    assert [row.noted for row in run.rows if row.cs is None] == [{"validation": v} for v in (1.0, 0.5, 1 / 3)]
    (point,) = [row.turning_point for row in run.rows if row.turning_point is not None]
    assert point == stopper.advice.step
    with (tmp_path / "run.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(line["cs"]) for line in table] == [row.cs for row in measured]
    assert [int(line["step"]) for line in table] == [row.step for row in measured]
    assert [v for n, v, _ in writer.scalars if n == "monitor/cs"] == [row.cs for row in measured]
    assert [(v, s) for n, v, s in writer.scalars if n == "monitor/validation"] == [(1.0, 20), (0.5, 40), (1 / 3, 60)]
    assert [row.cs for row in seen if row.cs is not None] == [row.cs for row in measured]
    assert all(row.record is not None and row.record.gradients for row in seen if row.cs is not None)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert all(line["gradient"] > 0 for line in lines if "cs" in line)


def test_what_is_noted_may_be_infinite(tmp_path: Path) -> None:
    """The log stays JSON that everyone reads."""
    model, _ = make()
    stopper = EarlyStopping(model, log=tmp_path / "run.jsonl")
    stopper.note(validation=float("nan"), other=2.0)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(lines[-1], parse_constant=refuse) == {"step": 0, "validation": None, "other": 2.0}
    assert read_run(tmp_path / "run.jsonl").rows[0].noted == {"other": 2.0}


def test_modules_are_logged_where_asked_for(tmp_path: Path) -> None:
    model, optimizer = make()
    EarlyStopping(model, optimizer=optimizer, interval=5, log=JsonLines(tmp_path / "all.jsonl", modules=True))
    fit(model, optimizer, 5)
    line = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[-1])
    assert line["modules"].keys() == {"0", "2"}
    cosine, norm, ratio = line["modules"]["0"]
    assert norm > 0
    assert ratio == pytest.approx(norm / model[0].weight.norm().item(), rel=1e-6)  # type: ignore[index]
    assert -1 < cosine < 1


def test_a_resumed_log_counts_once_what_was_measured_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    log = JsonLines(path)
    for step in (1, 2, 3, 2, 3, 4):
        log(Row(step=step, cs=step / 10))
    with path.open("a") as file:
        file.write('{"step": 5, "cs": 0.')  # cut off while it was written
    assert [row.step for row in read_run(path).rows] == [1, 2, 3, 4]


def test_a_crash_in_the_middle_of_a_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    log = JsonLines(path)
    for step in (1, 2, 3):
        log(Row(step=step, cs=step / 10))
    path.write_bytes(path.read_bytes()[:-9])
    log = JsonLines(path)
    for step in (3, 4):
        log(Row(step=step, cs=step / 10))
    assert [row.cs for row in read_run(path).rows] == [0.1, 0.2, 0.3, 0.4]


def test_a_log_of_two_runs_holds_the_last(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for steps in (40, 6):
        model, optimizer = make()
        EarlyStopping(model, optimizer=optimizer, interval=1, window=3, log=path)
        fit(model, optimizer, steps)
    assert [row.step for row in read_run(path).rows] == list(range(1, 7))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no measurement"),
        ("[1]\n{}", "line 1 has no step"),
        ('{"step": 1, "cs": "x"}', "cs='x'"),
        ("what\nis this", "line 1 is not JSON"),
        ('{"cs": 1}', "no step"),
    ],
)
def test_what_is_not_a_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(FileError, match=message) as raised:
        read_run(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("log", ["run.txt", 3])
def test_a_bad_log(log: Any) -> None:
    model, _ = make()
    with pytest.raises(OptionError, match="log="):
        EarlyStopping(model, log=log)


def test_the_picture(tmp_path: Path) -> None:
    stopper, _, _ = watched(tmp_path)
    for suffix in ("png", "svg"):
        figure = stopper.plot(tmp_path / f"run.{suffix}")
        assert (tmp_path / f"run.{suffix}").stat().st_size > 10_000
    above, below, beside = figure.axes
    curves = {line.get_label(): line for line in (*above.lines, *below.lines, *beside.lines)}
    assert list(beside.lines[0].get_ydata()) == [1.0, 0.5, 1 / 3]
    assert f"turning point, step {stopper.advice.step}" in curves
    assert len(curves["valleys"].get_xdata()) == len(stopper.advice.valleys)
    assert list(above.lines[0].get_ydata()) == [row.cs for row in stopper.rows if row.cs is not None]
    with pytest.raises(OptionError, match="no measurement"):
        draw([])


def test_the_live_line() -> None:
    model, optimizer = make()
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with LiveLine(console) as line:
        stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=3, log=line)
        fit(model, optimizer, 60)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 60" in shown
    assert f"turning point at step {stopper.advice.step}" in shown
