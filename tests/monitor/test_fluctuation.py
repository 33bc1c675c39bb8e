"""CS-Fluctuation: streaming equals brute force and the forward-looking form; valleys are where the rules say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import OptionError
from peftkit.monitor import Fluctuation, SecondValley
from peftkit.monitor.random_walk import chance


def trailing(cs: np.ndarray, M: int) -> np.ndarray:
    """F from the definition, NaN where it does not exist."""
    T = len(cs)
    a, x, F = (np.full(T, np.nan) for _ in range(3))
    for t in range(M - 1, T):
        a[t] = cs[t - M + 1 : t + 1].mean()
    d = np.diff(a, prepend=np.nan)
    for t in range(2 * M - 1, T):
        x[t] = d[t - M + 1 : t + 1].mean()
    for t in range(3 * M - 2, T):
        F[t] = x[t - M + 1 : t + 1].var()
    return F


def forward(cs: np.ndarray, M: int) -> np.ndarray:
    """The paper's windows j … j + M − 1; element i belongs to j = i + 1."""

    def means(v: np.ndarray) -> np.ndarray:
        return np.array([v[j : j + M].mean() for j in range(len(v) - M + 1)])

    x = means(np.diff(means(cs)))
    return np.array([x[j : j + M].var() for j in range(len(x) - M + 1)])


def streamed(cs: np.ndarray, M: int, **options: object) -> np.ndarray:
    stream = Fluctuation(M, **options)  # type: ignore[arg-type]
    return np.array([np.nan if (F := stream.push(float(v))) is None else F for v in cs])


@st.composite
def series(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Walks, noise, saturation with noise, ramps, steps and constants, of any size and offset."""
    M = draw(st.integers(2, 25))
    T = draw(st.integers(1, 8 * M))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise, t = random.normal(size=T), np.arange(T)
    shape = draw(
        st.sampled_from(
            [
                noise.cumsum(),
                noise,
                1 - np.exp(-t / (2 * M)) + 1e-3 * noise,
                t + 1e-4 * noise,
                np.sign(np.sin(t / M)),
                np.zeros(T),
            ]
        )
    )
    size = 10.0 ** draw(st.integers(-8, 0))
    return size * (shape + draw(st.sampled_from([0.0, 1.0, -30.0]))), M


@given(series())
@settings(max_examples=200, deadline=None)
def test_streaming_is_brute_force_is_forward_looking(case: tuple[np.ndarray, int]) -> None:
    cs, M = case
    F, ours, ahead = trailing(cs, M), streamed(cs, M), forward(cs, M)
    exists = ~np.isnan(F)
    assert (np.isnan(ours) == ~exists).all()
    assert len(ahead) == exists.sum()
    # x is a difference of means of CS: what cancels there is of the size of CS over M, and F is of its square
    bound = 1e-10 * np.nanmax(F, initial=0) + (64 * 2.0**-52 * np.abs(cs).max() / M) ** 2
    rough = 64 * 2.0**-52 * np.abs(cs).max() / M * math.sqrt(np.nanmax(F, initial=0))
    assert (np.abs(ours - F)[exists] <= bound + rough).all()
    assert (np.abs(ahead - F[exists]) <= bound + rough).all()


def test_nothing_drifts() -> None:
    """After 100 000 values the last F is that of its own 3M − 1 alone."""
    M, T = 50, 100_000
    random = np.random.default_rng(0)
    cs = 0.02 * (1 - np.exp(-np.arange(T) / 5000)) + random.normal(size=T).cumsum() * 1e-7
    stream = Fluctuation(M)
    for value in cs:
        last = stream.push(float(value))
    assert last == pytest.approx(trailing(cs[-3 * M + 1 :], M)[-1], rel=1e-8)


def test_a_learning_rate_divides_once_or_rescales_the_increments() -> None:
    random = np.random.default_rng(1)
    cs, M = random.normal(size=80).cumsum() * 1e-3, 5
    rates = np.linspace(1e-3, 1e-5, 80)
    paper = Fluctuation(M, "lr")
    ours = [paper.push(float(v), float(lr)) for v, lr in zip(cs, rates, strict=True)]
    F = trailing(cs, M)
    np.testing.assert_allclose(np.array(ours[3 * M - 2 :], float), F[3 * M - 2 :] / 1e-3, rtol=1e-9)
    slope = Fluctuation(M, "slope")
    ours = [slope.push(float(v), float(lr)) for v, lr in zip(cs, rates, strict=True)]
    rescaled = cs[0] + np.concatenate([[0], np.diff(cs) * rates[0] / np.maximum(rates[1:], 1e-6)]).cumsum()
    np.testing.assert_allclose(np.array(ours[3 * M - 2 :], float), trailing(rescaled, M)[3 * M - 2 :], rtol=1e-8)


def released_code(cs: np.ndarray, M: int) -> tuple[int, int] | None:
    """What the authors' loop does: at every new F all derivatives again, the last one of before still in hand."""
    F, previous, seen = trailing(cs, M), None, []
    for t in range(3 * M - 2, len(cs)):
        seen.append(F[t])
        count = 0
        for i in range(1, len(seen)):
            current = seen[i] - seen[i - 1]
            if previous is not None and previous < 0 < current:
                count += 1
                if count == 2:
                    return t, t - (3 * M - 2)
            previous = current
    return None


def saturating(seed: int, T: int = 600) -> np.ndarray:
    random = np.random.default_rng(seed)
    rough = random.choice([1e-6, 1e-5, 1e-4])
    return 0.02 * (1 - np.exp(-np.arange(T) / 60)) + random.normal(size=T).cumsum() * rough


@pytest.mark.parametrize("M", [2, 5, 20])
@pytest.mark.parametrize("seed", range(20))
def test_authors_mode_is_their_code(M: int, seed: int) -> None:
    cs = saturating(seed, 300)
    rule = SecondValley(M, mode="authors")
    for value in cs:
        rule.push(float(value))
    found = None if rule.found is None else (rule.found.detected, rule.found.measurement)
    assert found == released_code(cs, M)


@pytest.mark.parametrize("M", [2, 5, 20])
@pytest.mark.parametrize("seed", range(20))
def test_paper_mode_is_the_second_valley_of_the_forward_form(M: int, seed: int) -> None:
    cs = saturating(seed, 300)
    rule = SecondValley(M, mode="paper")
    for value in cs:
        rule.push(float(value), 1e-3)
    F = forward(cs, M)  # F[i] belongs to the forward index i + 1
    valleys = [i + 1 for i in range(1, len(F) - 1) if F[i - 1] > F[i] < F[i + 1]]
    if len(valleys) < 2:
        assert rule.found is None
        return
    assert rule.found is not None
    assert rule.found.measurement == valleys[1]
    assert rule.found.detected == valleys[1] + 3 * M - 2
    assert rule.found.detected - rule.found.valley == 1


def test_attribution_spans_what_the_valley_is_made_of() -> None:
    M, points = 7, {}
    for attribution in ("start", "centre", "end"):
        rule = SecondValley(M, mode="paper", attribution=attribution)
        for value in saturating(3):
            rule.push(float(value), 1e-3)
        assert rule.found is not None
        points[attribution] = rule.found.measurement
    assert points["end"] - points["start"] == 3 * M - 3
    assert points["centre"] - points["start"] == pytest.approx((3 * M - 3) / 2, abs=0.5)


def test_a_smooth_curve_has_no_valley_and_rounding_makes_none() -> None:
    """A run without noise saturates without valleys; what fp32 adds to it is below the floor."""
    T, M = 3000, 20
    smooth = 0.02 / (1 + np.exp(-(np.arange(T) - 300) / 60))
    rounded = smooth.astype(np.float32).astype(np.float64)
    plain, robust = SecondValley(M, mode="paper"), SecondValley(M)
    for value in rounded:
        plain.push(float(value), 1.0)
        robust.push(float(value))
    assert robust.found is None
    assert plain.found is not None, "without a floor rounding noise is taken for valleys"


def test_a_warm_up_from_nothing_is_waited_out() -> None:
    """The reference is the first positive rate."""
    plain, warmed = Fluctuation(3, "lr"), Fluctuation(3, "lr")
    for t, value in enumerate(saturating(0, 40)):
        expected = plain.push(float(value), 1e-3)
        F = warmed.push(float(value), 0.0 if t < 9 else 1e-3)
        assert (expected if t >= 9 else None) == F


def test_hysteresis_withstands_measurement_noise() -> None:
    """Noise of 0.5 % of CS moves the plain rule far more than the robust one."""

    def found(mode: str, noise: float) -> list[int]:
        points = []
        for seed in range(20):
            random = np.random.default_rng(seed)
            cs = 0.02 * (1 - np.exp(-np.arange(800) / 60)) + random.normal(size=800).cumsum() * 1e-5
            rule = SecondValley(20, mode=mode)
            for value in cs + noise * 0.02 * random.normal(size=800):
                rule.push(float(value), 1.0)
            points.append(rule.found.detected if rule.found else 800)
        return points

    moved = {mode: np.abs(np.subtract(found(mode, 0.001), found(mode, 0.0))).mean() for mode in ("paper", "robust")}
    assert moved["robust"] < moved["paper"]


def test_a_random_walk_has_its_second_valley_after_about_five_windows() -> None:
    """The null model: 4.8 M in the median, p10–p90 from 4.0 to 5.7."""
    rule = SecondValley(20, mode="paper")
    assert 0.05 <= chance(rule, 4.0) <= 0.2
    assert 0.4 <= chance(rule, 4.8) <= 0.65
    assert 0.82 <= chance(rule, 5.7) <= 0.95
    assert chance(SecondValley(20), 4.8) < chance(rule, 4.8), "hysteresis waits longer"


@pytest.mark.parametrize("mode", ["robust", "paper", "authors"])
def test_resumes_to_the_bit(mode: str) -> None:
    cs = saturating(5, 200)
    for cut in (1, 13, 14, 40, 77):
        whole, first, second = (SecondValley(5, mode=mode) for _ in range(3))
        for value in cs[:cut]:
            first.push(float(value), 1e-3)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for t, value in enumerate(cs):
            expected = whole.push(float(value), 1e-3)
            if t >= cut:
                assert second.push(float(value), 1e-3) == expected
                assert second.value == whole.value
        assert second.valleys == whole.valleys


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fluctuation(1), "window=1"),
        (lambda: Fluctuation(True), "window=True"),
        (lambda: Fluctuation(5, "rate"), "'none', 'lr' or 'slope'"),
        (lambda: SecondValley(5, mode="papers"), "Did you mean 'paper'"),
        (lambda: SecondValley(5, mode="paper", hysteresis=0.1), "hysteresis=0.1"),
        (lambda: SecondValley(5, hysteresis=0.0), "a positive number"),
        (lambda: SecondValley(5, attribution="middle"), "'start', 'centre' or 'end'"),
        (lambda: SecondValley(5, mode="paper").push(0.1), "lr=None"),
        (lambda: SecondValley(5, mode="paper").push(0.1, -1.0), "lr=-1.0"),
        (lambda: SecondValley(5, hysteresis="a"), "hysteresis='a'"),
        (lambda: SecondValley(5, mode=3), "mode=3"),
        (lambda: SecondValley(5).push(math.nan), "Has the run diverged"),
    ],
)
def test_errors_say_what_was_expected(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()  # type: ignore[operator]
