"""Does the monitor know when to stop? Rules against never stopping, against timers, and against the oracle.

    python benchmarks/trajectories.py && python benchmarks/early_stopping.py [--save]

Of every run of benchmarks/trajectories.py a rule sees only what it would have seen while training. It returns the
weights of one step; its regret is the validation loss there over the best of the run, minus 1. A timer returns the same
step of every run: the median of those that the rule returned, on that task ("timer") or on all of them ("one timer").
The difference of rule and timer comes with the interval that holds 90 % of bootstrap samples over runs.

Criteria that are not in the library were searched for on the tasks named in TUNED: every signal below with the one
threshold that is best there. They are judged on OTHERS, which they have not seen.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.monitor import SecondValley

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "out" / "trajectories"

TUNED = ("digit-9", "movies")
OTHERS = ("digit-8", "amazon")
RATES = ("-slow", "", "-fast")
WINDOWS = (5, 10, 20)
#: rules that are held against other learning rates
COMPARED = ("paper, window 10", "robust, window 5", "robust, window 10", "settling", "loss")


@dataclass
class Run:
    """What a rule may see of a run, per step, and the validation loss it is judged by."""

    task: str
    kind: str
    cosines: np.ndarray  # (T, weights)
    norms: np.ndarray  # (T, weights)
    loss: np.ndarray  # of each batch, (T,)
    agreement: np.ndarray  # mean of m̂²/v̂, (T,)
    validation: np.ndarray  # (T,), between evaluations interpolated

    @property
    def steps(self) -> int:
        return len(self.loss)

    @property
    def best(self) -> int:
        """The step the oracle returns."""
        return int(self.validation.argmin()) + 1

    def regret(self, step: float) -> float:
        """The validation loss at a step over the best of the run, minus 1."""
        index = min(max(round(step), 1), self.steps) - 1
        return float(self.validation[index] / self.validation.min() - 1)


Rule = Callable[[Run], int]


def load() -> list[Run]:
    """Return the runs that benchmarks/trajectories.py left in out/trajectories."""
    runs = []
    for path in sorted(FOLDER.glob("*.json")):
        task, kind, _ = path.stem.rsplit("-", 2)
        found = json.loads(path.read_text())
        rows, known = found["rows"], {int(step): loss for step, loss in found["validation"].items()}

        def column(name: str, rows: list[dict[str, Any]] = rows) -> np.ndarray:
            return np.array([row[name] for row in rows], float)

        at = np.arange(1, len(rows) + 1)
        validation = np.interp(at, sorted(known), [known[step] for step in sorted(known)])
        runs.append(Run(task, kind, column("cos"), column("norm"), column("loss"), column("agreement"), validation))
    if not runs:
        raise SystemExit(f"there are no runs in {FOLDER}: make them with `python benchmarks/trajectories.py`")
    return runs


# -- rules ----------------------------------------------------------------------------------------------------------


def second_valley(window: int, mode: str, noise: float = 0.0) -> Rule:
    """The library's rule, measuring every step; noise: white, of so much of the range of CS."""

    def rule(run: Run) -> int:
        seen, random = SecondValley(window, mode=mode), np.random.default_rng(0)
        cs = run.cosines.mean(1)
        for value in cs + noise * np.ptp(cs) * random.normal(size=len(cs)):
            if (found := seen.push(float(value), 1.0)) is not None:
                return found.measurement + 1
        return run.steps

    return rule


def smooth(series: np.ndarray, share: float = 0.15) -> np.ndarray:
    """An exponential moving average without the bias to its start."""
    mean = weight = 0.0
    out = np.empty(len(series))
    for i, value in enumerate(series):
        mean, weight = (1 - share) * mean + share * value, (1 - share) * weight + share
        out[i] = mean / weight
    return out


def _settling(run: Run) -> np.ndarray:
    speed = smooth(np.linalg.norm(np.diff(run.cosines, axis=0, prepend=run.cosines[:1]), axis=1))
    return speed / np.maximum.accumulate(speed + 1e-12)


def _order(run: Run, window: int = 8) -> np.ndarray:
    signal = np.ones(run.steps)
    for t in range(2 * window, run.steps):
        before = run.cosines[t - window] - run.cosines[t - 2 * window]
        after = run.cosines[t] - run.cosines[t - window]
        signal[t] = before @ after / (np.linalg.norm(before) * np.linalg.norm(after) + 1e-30)
    return smooth(signal)


def _growth(run: Run) -> np.ndarray:
    size = run.norms.mean(1)
    return np.array(
        [1.0 if t < 4 else np.log(size[t] / size[t // 2]) / np.log((t + 1) / (t // 2 + 1)) for t in range(run.steps)]
    )


def _speed(run: Run) -> np.ndarray:
    speed = smooth(np.diff(run.norms.mean(1), prepend=0.0))
    return speed / np.maximum.accumulate(speed)


#: what falls as training goes on: a criterion stops when it is below its threshold
SIGNALS: dict[str, tuple[str, Callable[[Run], np.ndarray]]] = {
    "settling": ("speed of the vector of all cosines, of its largest so far", _settling),
    "order": ("cosine between how all cosines moved in one window and in the next", _order),
    "growth": ("exponent of ‖ΔW‖ ∝ stepsᵉ over the last half", _growth),
    "speed": ("growth of ‖ΔW‖ a step, of its largest so far", _speed),
    "agreement": ("mean m̂²/v̂ of Adam's moments: how far gradients agree", lambda run: smooth(run.agreement)),
    "loss": ("training loss, of its first five steps", lambda run: smooth(run.loss) / run.loss[:5].mean()),
    "√agreement × loss": (
        "both, the first as the ratio of a gradient to its noise",
        lambda run: np.sqrt(smooth(run.agreement)) * smooth(run.loss) / run.loss[:5].mean(),
    ),
}


def below(signal: Callable[[Run], np.ndarray], threshold: float) -> Rule:
    """Return the rule that stops at the first step whose signal is below a threshold."""

    def rule(run: Run) -> int:
        under = np.flatnonzero(signal(run)[3:] < threshold)
        return int(under[0]) + 4 if len(under) else run.steps

    return rule


def tuned(signal: Callable[[Run], np.ndarray], runs: Sequence[Run]) -> float:
    """The threshold of the least mean regret, every task counting the same."""
    values = {id(run): signal(run) for run in runs}
    candidates = np.quantile(np.concatenate([value[3:] for value in values.values()]), np.linspace(0.01, 0.99, 99))

    def regret(threshold: float) -> float:
        by_task: dict[str, list[float]] = {}
        for run in runs:
            by_task.setdefault(run.task, []).append(run.regret(below(lambda run: values[id(run)], threshold)(run)))
        return statistics.fmean(map(statistics.fmean, by_task.values()))

    return float(min(candidates, key=regret))


# -- judging --------------------------------------------------------------------------------------------------------


def judge(rule: Rule, runs: Sequence[Run], everywhere: float | None = None) -> dict[str, Any]:
    """Regrets in per cent, on the runs of one task. everywhere: the step of the one timer for all tasks."""
    steps = [rule(run) for run in runs]
    median = statistics.median(steps)
    own, timer = (
        np.array([run.regret(s) for run, s in zip(runs, at, strict=True)]) for at in (steps, [median] * len(runs))
    )
    random = np.random.default_rng(0)
    differences = [float((own - timer)[random.integers(0, len(runs), len(runs))].mean()) for _ in range(2000)]
    result = {
        "steps": median,
        "regret": 100 * own.mean(),
        "timer": 100 * timer.mean(),
        "against the timer": [100 * float(np.quantile(differences, q)) for q in (0.05, 0.95)],
    }
    if everywhere is not None:
        result["one timer"] = 100 * statistics.fmean(run.regret(everywhere) for run in runs)
    return result


def contest(rules: dict[str, Rule], runs: Sequence[Run], champion: str) -> list[Row]:
    """Return by how much the champion's regret exceeds that of each rule, of its timer by task, and of one timer.

    In points of per cent, the mean over tasks, with the interval of 90 % of bootstrap samples of runs within them.
    """
    steps = {name: {id(run): rule(run) for run in runs} for name, rule in rules.items()}
    tasks = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(run.task for run in runs)}
    own = {task: statistics.median(steps[champion][id(run)] for run in here) for task, here in tasks.items()}
    one = statistics.median(steps[champion].values())
    rivals: dict[str, Callable[[Run], float]] = {
        name: lambda run, name=name: run.regret(steps[name][id(run)]) for name in rules if name != champion
    }
    rivals |= {"its timer": lambda run: run.regret(own[run.task]), "one timer": lambda run: run.regret(one)}
    regret = 100 * _mean([[r.regret(steps[champion][id(r)]) for r in here] for here in tasks.values()])
    rows = [Row("contest", champion, "regret", values={"gap": regret})]
    for name, rival in rivals.items():
        random = np.random.default_rng(0)
        gaps = [np.array([r.regret(steps[champion][id(r)]) - rival(r) for r in here]) for here in tasks.values()]
        samples = [_mean([gap[random.integers(0, len(gap), len(gap))] for gap in gaps]) for _ in range(2000)]
        low, high = (float(np.quantile(samples, q)) for q in (0.05, 0.95))
        values = {"gap": 100 * _mean(gaps), "low": 100 * low, "high": 100 * high}
        rows.append(Row("contest", champion, name, values=values))
    return rows


def _mean(groups: Sequence[Sequence[float] | np.ndarray]) -> float:
    """Of the means of groups."""
    return float(np.mean([np.mean(group) for group in groups]))


def null_model(walks: int = 300) -> list[Row]:
    """Return after how many windows a random walk has its second valley: 10 %, 50 % and 90 %, by window and mode."""
    rows = []
    for mode in ("paper", "robust"):
        for window in (5, 20, 100):
            random = np.random.default_rng(window)
            at = []
            for _ in range(walks):
                rule = SecondValley(window, mode=mode)
                for t, value in enumerate(random.normal(size=12 * window).cumsum()):
                    if rule.push(float(value), 1.0) is not None:
                        at.append((t + 1) / window)
                        break
                else:
                    at.append(float("inf"))
            quantiles = (("low", 0.1), ("median", 0.5), ("high", 0.9))
            values = {name: float(np.quantile(at, q, method="nearest")) for name, q in quantiles}
            rows.append(Row("random walk", f"{mode}, window {window}", "windows", values=values))
    return rows


def evaluate(runs: Sequence[Run]) -> list[Row]:
    """Return the rows of every question: runs, rules, contest, learning rates, noise, and the random walk."""
    tasks = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(run.task for run in runs)}
    plain = [task for task in (*TUNED, *OTHERS) if task in tasks]
    for_tuning = [run for task in TUNED for rate in RATES for run in tasks.get(task + rate, [])]
    thresholds = {name: tuned(signal, for_tuning) for name, (_, signal) in SIGNALS.items()}
    rules: dict[str, Rule] = {"never stop": lambda run: run.steps}
    for window in WINDOWS:
        for mode in ("paper", "authors", "robust"):
            rules[f"{mode}, window {window}"] = second_valley(window, mode)
    rules |= {name: below(signal, thresholds[name]) for name, (_, signal) in SIGNALS.items()}
    champion = min(SIGNALS, key=lambda name: _mean([[r.regret(rules[name](r)) for r in tasks[t]] for t in TUNED]))
    unseen = [run for task in OTHERS for rate in RATES for run in tasks.get(task + rate, [])]
    rows = []
    for task, own in tasks.items():
        values = {"runs": len(own), "steps": statistics.median(run.best for run in own)}
        rows.append(Row("runs", "oracle", task, values=values))
    for name, rule in rules.items():
        everywhere = statistics.median(rule(run) for task in plain for run in tasks[task])
        threshold = {"threshold": thresholds[name]} if name in thresholds else {}
        for task in plain:
            rows.append(Row("rules", name, task, values=judge(rule, tasks[task], everywhere) | threshold))
    rows += contest(rules, unseen, champion)
    rows += learning_rates(rules, tasks)
    for mode in ("paper", "robust"):
        for share in (0.0, 0.001, 0.01):
            rule = second_valley(10, mode, share)
            rows += [Row("noise", f"{mode}, noise {share:.1%}", t, values=judge(rule, tasks[t])) for t in plain]
    return [replace(row, values=rounded(row.values)) for row in (*rows, *null_model())]


def learning_rates(rules: dict[str, Rule], tasks: dict[str, list[Run]]) -> list[Row]:
    """Return what rules lose at a third and three times the learning rate, with the timer of the plain rate."""
    rows = []
    for task in ("digit-9", "digit-8"):
        for rate in RATES:
            own = tasks.get(task + rate)
            if not own:
                continue
            for name in COMPARED:
                timer = statistics.median(rules[name](run) for run in tasks[task])
                rows.append(Row("learning rates", name, task + rate, values=judge(rules[name], own, timer)))
            oracle = {"steps": statistics.median(run.best for run in own)}
            rows.append(Row("learning rates", "oracle", task + rate, values=oracle))
    return rows


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with three decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        return round(value, 3) if isinstance(value, float) else value

    return {name: short(value) for name, value in values.items()}


def table(rows: Sequence[Row]) -> Table:
    """Return a table of rules by tasks."""
    counts = {row.case: row.values["runs"] for row in rows if row.question == "runs"}
    judged = [row for row in rows if row.question == "rules"]
    tasks = list(dict.fromkeys(row.case for row in judged))
    title = "regret: rule | timer | one timer, %"
    shown = Table("rule", *(f"{task}, {counts[task]} runs" for task in tasks), title=title)
    for name in dict.fromkeys(row.kind for row in judged):
        cells = [row.values for row in judged if row.kind == name]
        shown.add_row(
            name, *("{regret:.1f} | {timer:.1f} | {one timer:.1f}  @{steps:.0f}".format_map(v) for v in cells)
        )
    return shown


def main() -> None:
    script = Script(__file__, __doc__)
    script.parse()
    rows = script.runner.measure([lambda: evaluate(load())])
    script.print(table(rows))
    script.show([row for row in rows if row.question == "contest"], "the champion's regret above that of others")


if __name__ == "__main__":
    main()
