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

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from peftkit.monitor import SecondValley

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "out" / "trajectories"
RESULTS = Path(__file__).parent / "results" / "early_stopping.json"

TUNED = ("digit-9", "movies")
OTHERS = ("digit-8", "amazon")
RATES = ("-slow", "", "-fast")
WINDOWS = (5, 10, 20)


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
        index = min(max(round(step), 1), self.steps) - 1
        return float(self.validation[index] / self.validation.min() - 1)


Rule = Callable[[Run], int]


def load() -> list[Run]:
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


def contest(rules: dict[str, Rule], runs: Sequence[Run], champion: str) -> dict[str, list[float]]:
    """What the champion's regret is above that of each rule, of its timer on each task, and of one timer for all.

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
    result = {"regret": [100 * _mean([[r.regret(steps[champion][id(r)]) for r in here] for here in tasks.values()])]}
    for name, rival in rivals.items():
        random = np.random.default_rng(0)
        gaps = [np.array([r.regret(steps[champion][id(r)]) - rival(r) for r in here]) for here in tasks.values()]
        samples = [_mean([gap[random.integers(0, len(gap), len(gap))] for gap in gaps]) for _ in range(2000)]
        low, high = (float(np.quantile(samples, q)) for q in (0.05, 0.95))
        result[name] = [100 * _mean(gaps), 100 * low, 100 * high]
    return result


def _mean(groups: Sequence[Sequence[float] | np.ndarray]) -> float:
    """Of the means of groups."""
    return float(np.mean([np.mean(group) for group in groups]))


def null_model(walks: int = 300) -> dict[str, list[float]]:
    """After how many windows a random walk has its second valley: 10 %, 50 % and 90 %, by window and mode."""
    found = {}
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
            found[f"{mode}, window {window}"] = [float(np.quantile(at, q, method="nearest")) for q in (0.1, 0.5, 0.9)]
    return found


def evaluate(runs: Sequence[Run]) -> dict[str, Any]:
    tasks = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(run.task for run in runs)}
    plain = [task for task in (*TUNED, *OTHERS) if task in tasks]
    for_tuning = [run for task in TUNED for rate in RATES for run in tasks.get(task + rate, [])]
    rules: dict[str, Rule] = {"never stop": lambda run: run.steps}
    for window in WINDOWS:
        for mode in ("paper", "authors", "robust"):
            rules[f"{mode}, window {window}"] = second_valley(window, mode)
    thresholds = {name: tuned(signal, for_tuning) for name, (_, signal) in SIGNALS.items()}
    for name, (_, signal) in SIGNALS.items():
        rules[name] = below(signal, thresholds[name])
    champion = min(SIGNALS, key=lambda name: _mean([[r.regret(rules[name](r)) for r in tasks[t]] for t in TUNED]))
    unseen = [run for task in OTHERS for rate in RATES for run in tasks.get(task + rate, [])]
    judged: dict[str, Any] = {}
    for name, rule in rules.items():
        everywhere = statistics.median(rule(run) for task in plain for run in tasks[task])
        judged[name] = {task: judge(rule, tasks[task], everywhere) for task in plain}
    compared = ("paper, window 10", "robust, window 5", "robust, window 10", "settling", "loss")
    rates: dict[str, Any] = {}
    for task in ("digit-9", "digit-8"):
        for rate in RATES:
            own = tasks.get(task + rate)
            if own:
                timers = {name: statistics.median(rules[name](run) for run in tasks[task]) for name in compared}
                rates[task + rate] = {name: judge(rules[name], own, timers[name]) for name in compared}
                rates[task + rate]["oracle"] = {"steps": statistics.median(run.best for run in own)}
    noise = {
        f"{mode}, noise {share:.1%}": {task: judge(second_valley(10, mode, share), tasks[task]) for task in plain}
        for mode in ("paper", "robust")
        for share in (0.0, 0.001, 0.01)
    }
    return {
        "runs": {task: len(own) for task, own in tasks.items()},
        "oracle": {task: statistics.median(run.best for run in own) for task, own in tasks.items()},
        "rules": judged,
        "thresholds": thresholds,
        "champion": champion,
        "contest": contest(rules, unseen, champion),
        "learning rates": rates,
        "noise": noise,
        "random walk": null_model(),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value


def table(found: dict[str, Any]) -> Table:
    tasks = list(found["rules"]["never stop"])
    shown = Table(
        "rule", *(f"{task}, {found['runs'][task]} runs" for task in tasks), title="regret: rule | timer | one timer, %"
    )
    for name, by_task in found["rules"].items():
        cells = [
            f"{j['regret']:.1f} | {j['timer']:.1f} | {j['one timer']:.1f}  @{j['steps']:.0f}" for j in by_task.values()
        ]
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    found = rounded(evaluate(load()))
    console = Console(width=150)
    console.print(table(found))
    console.print_json(json.dumps({key: found[key] for key in ("runs", "champion", "contest", "thresholds")}))
    if arguments.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
