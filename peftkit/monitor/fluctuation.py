"""CS-Fluctuation: how much the slope of a run's mean cosine varies, and the valley where overfitting starts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peftkit.errors import require_choice, require_integer, require_option
from peftkit.monitor.record import Record

NORMS = ("none", "lr", "slope")
ATTRIBUTIONS = ("start", "centre", "end")


class _Defaults(NamedTuple):
    """What a mode of SecondValley takes where nothing is given."""

    attribution: str
    norm: str


_DEFAULTS = {
    "robust": _Defaults("centre", "none"),
    "paper": _Defaults("start", "lr"),
    "authors": _Defaults("start", "none"),
}
MODES = tuple(_DEFAULTS)

#: rounding of a cosine summed in fp32: two of its own last places, and at least this much, whatever its size
_NOISE, _LEAST_NOISE = 4 * 2.0**-24, 2.0**-25


class Fluctuation:
    r"""Computes CS-Fluctuation F_t of a series CS_t, one value at a time, in constant time.

    With M = `window`: a_t is the mean of the last M values; x_t = (a_t − a_{t−M})/M, the mean of M of its increments;
    F_t the population variance of the last M x. It exists from t = 3M − 2 on and depends on CS_{t−3M+2} … CS_t.
    The forward-looking form of the paper is the same series, shifted: F_j^fwd = F_{j+3M−3}.

    Args:
        window: M, from 2.
        norm: "none", as the authors' code has it; "lr", F divided by the first positive learning rate, as the paper
            writes (the rate of the moment would make every decay to 0 a rise to infinity); or "slope", with increments
            of CS counted per learning rate, relative to that first rate and at least a thousandth of it.

    Raises:
        OptionError: `window` or `norm` is none of these.

    Example:
        >>> fluctuation = pk.monitor.Fluctuation(2)
        >>> [fluctuation.push(cs) for cs in (0.0, 1.0, 2.0, 3.0, 5.0)]
        [None, None, None, None, 0.015625]
    """

    def __init__(self, window: int, norm: str = "none") -> None:
        require_integer("window", window, 2, "a number of measurements")
        require_choice("norm", norm, NORMS)
        self.window, self.norm = window, norm
        self.count = 0
        self._lr: float | None = None
        self._last: float | None = None  # CS before this one, and the series with its increments rescaled
        self._series = 0.0
        self._values: deque[float] = deque(maxlen=window)
        self._means: deque[float] = deque(maxlen=window)
        self._slopes: deque[float] = deque(maxlen=window)
        self._sum = 0.0  # of the values
        self._centre = self._first = self._second = 0.0  # Σ(x − centre) and Σ(x − centre)²

    def push(self, cs: float, lr: float | None = None) -> float | None:
        """Take one more value of the series, and return F_t.

        Args:
            cs: CS_t.
            lr: The learning rate, which norm="lr" and norm="slope" need.

        Returns:
            F_t, None before t = 3M − 2.

        Raises:
            OptionError: `cs` is not finite, or a learning rate is missing.
        """
        finite = isinstance(cs, (int, float)) and math.isfinite(cs)
        require_option(finite, "cs", cs, "a finite number", " Has the run diverged?")
        if self.norm != "none":
            rate = lr is not None and math.isfinite(lr) and lr >= 0
            require_option(rate, "lr", lr, f"a learning rate for norm={self.norm!r}")
            self._lr = self._lr or lr or None
        F = self._push(self._scaled(cs, lr))
        if F is None or self.norm != "lr":
            return F
        return None if self._lr is None else F / self._lr

    def _scaled(self, cs: float, lr: float | None) -> float:
        """The value as it enters the windows."""
        if self.norm != "slope" or self._last is None:
            self._series = cs
        elif lr is not None and self._lr is not None:
            self._series += (cs - self._last) * self._lr / max(lr, 1e-3 * self._lr)
        self._last = cs
        return self._series

    def _push(self, value: float) -> float | None:
        M, t = self.window, self.count
        self.count += 1
        if len(self._values) == M:
            self._sum -= self._values[0]
        self._values.append(value)
        self._sum += value
        if t % M == M - 1:  # once a window, sums start afresh, so that rounding does not pile up
            self._sum = math.fsum(self._values)
        if len(self._values) < M:
            return None
        mean = self._sum / M
        if len(self._means) < M:
            self._means.append(mean)
            return None
        slope = (mean - self._means[0]) / M
        self._means.append(mean)
        if len(self._slopes) == M:
            old = self._slopes[0] - self._centre
            self._first -= old
            self._second -= old * old
        self._slopes.append(slope)
        new = slope - self._centre
        self._first += new
        self._second += new * new
        if t % M == 0 or len(self._slopes) == 1:
            self._centre = math.fsum(self._slopes) / len(self._slopes)
            self._first = math.fsum(x - self._centre for x in self._slopes)
            self._second = math.fsum((x - self._centre) ** 2 for x in self._slopes)
        if len(self._slopes) < M:
            return None
        return max(self._second / M - (self._first / M) ** 2, 0.0)

    def floor(self, size: float) -> float:
        """Return the F that rounding alone makes of |CS| up to `size`: variations below it mean nothing.

        A single step s of CS moves x by s/M: a flat curve that is rounded up once has an F of almost (s/M)².
        """
        floor = (max(_NOISE * size, _LEAST_NOISE) / self.window) ** 2
        return floor / self._lr if self.norm == "lr" and self._lr else floor

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to go on with the series."""
        return {name: [*value] if isinstance(value, deque) else value for name, value in self.__dict__.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, own in self.__dict__.items():
            setattr(self, name, deque(state[name], maxlen=self.window) if isinstance(own, deque) else state[name])


@dataclass(frozen=True)
class TurningPoint:
    """Says where a rule sees overfitting start, in measurements counted from 0.

    Attributes:
        measurement: Where overfitting starts.
        valley: The valley that it was concluded from.
        detected: The measurement with which it was known.
    """

    measurement: int
    valley: int
    detected: int


class SecondValley:
    r"""Finds where overfitting starts, at the second valley of CS-Fluctuation F (Algorithm 1 of its paper).

    A random walk has a second valley too, after 4.8 windows in the median: what a valley tells beyond a timer depends
    on the run. See `Advice.chance`.

    Args:
        window: M, the measurements in a window, from 2.
        mode: "paper": F over the first learning rate; a valley is where F stops falling and rises, however little.
            "authors": as in the authors' released code, without the learning rate, both steps strict, and where the
            very first change of F is a rise, the first valley counts as the second. "robust" (default): a valley counts
            once F has fallen by a factor 1 + `hysteresis` and has risen by it again, and nothing below the noise of
            rounding counts.
        hysteresis: For "robust", 0.2 by default.
        attribution: The measurement that a valley at t stands for, among the 3M − 1 that F_t is made of: "start" (the
            paper's turning point, t − 3M + 3; default of "paper" and "authors"), "centre" (default of "robust") or
            "end" (t). The first is early with short windows, the last late with long ones.
        norm: As in Fluctuation, "lr" by default for "paper", else "none".

    Attributes:
        found: The turning point, None until it is found.
        valleys: The measurements of all valleys so far.
        value: The last F.

    Raises:
        OptionError: An argument is out of range or does not go with the mode.

    Example:
        >>> rule = pk.monitor.SecondValley(2)
        >>> for cs in (0.0, 1.0, 3.0, 3.0, 4.0, 5.0, 7.0, 7.0, 8.0):
        ...     point = rule.push(cs)
        >>> rule.valleys, point
        ([5, 7], TurningPoint(measurement=6, valley=7, detected=8))
    """

    def __init__(
        self,
        window: int,
        *,
        mode: str = "robust",
        hysteresis: float | None = None,
        attribution: str | None = None,
        norm: str | None = None,
    ) -> None:
        require_choice("mode", mode, MODES)
        defaults = _DEFAULTS[mode]
        attribution = defaults.attribution if attribution is None else attribution
        require_choice("attribution", attribution, ATTRIBUTIONS)
        number = isinstance(hysteresis, (int, float)) and not isinstance(hysteresis, bool)
        fits = hysteresis is None or (mode == "robust" and number and 0 < hysteresis < math.inf)
        require_option(fits, "hysteresis", hysteresis, "a positive number with mode='robust', else None")
        self.fluctuation = Fluctuation(window, defaults.norm if norm is None else norm)
        self.mode, self.attribution = mode, attribution
        self.factor = 1 + (0.2 if hysteresis is None else hysteresis)
        span = 3 * window - 3
        self.offset = {"start": span, "centre": span // 2, "end": 0}[attribution]
        self.value: float | None = None  # the last F
        self.valleys: list[int] = []
        self.found: TurningPoint | None = None
        self._previous: float | None = None
        self._size = 0.0  # the largest |CS| so far
        self._sign = 0  # of the last derivative; of the last leg, for "robust"
        self._began_rising = False
        self._top = self._bottom = 0.0
        self._bottom_at = 0

    def push(self, cs: float, lr: float | None = None) -> TurningPoint | None:
        """Take one more measurement, and return the turning point if it is found with this one, else None.

        Args:
            cs: The mean cosine.
            lr: The learning rate, which some norms need.

        Raises:
            OptionError: `cs` is not finite, or a learning rate is missing.
        """
        t = self.fluctuation.count
        F = self.fluctuation.push(cs, lr)
        self._size = max(self._size, abs(cs))
        self.value = F
        if F is None:
            return None
        valley = self._zigzag(t, F) if self.mode == "robust" else self._turned(t, F)
        self._previous = F
        if valley is None:
            return None
        self.valleys.append(valley)
        first = self.mode == "authors" and self._began_rising
        if self.found is not None or len(self.valleys) < (1 if first else 2):
            return None
        self.found = TurningPoint(max(0, valley - self.offset), valley, t)
        return self.found

    def see(self, record: Record) -> float | None:
        """Take one more measurement, and return F, None while there are too few."""
        self.push(record.cs, record.lr)
        return self.value

    @property
    def wanted(self) -> tuple[int | None, int]:
        """The measurement that the valley F may be in would name, and the earliest that a later valley would name."""
        ahead = self.fluctuation.count - 1 - self.offset
        pending = self._bottom_at - self.offset if self.mode == "robust" and self._sign < 0 else None
        return pending, max(0, ahead)

    def _turned(self, t: int, F: float) -> int | None:
        """The valley at t − 1, if F rose after it fell."""
        if self._previous is None:
            return None
        change = F - self._previous
        if t == 3 * self.fluctuation.window - 1:
            self._began_rising = change > 0
        sign = (change > 0) - (change < 0)
        if sign == 0 and self.mode == "paper":
            sign = self._sign  # a flat stretch goes on as it came
        before, self._sign = self._sign, sign
        return t - 1 if before < 0 < sign else None

    def _zigzag(self, t: int, F: float) -> int | None:
        """The lowest point since the last top, once F has risen from it by the factor."""
        F = max(F, self.fluctuation.floor(self._size))
        if self._previous is None:
            self._top = self._bottom = F
        if self._sign < 0:
            if self._bottom > F:
                self._bottom, self._bottom_at = F, t
            elif self._bottom * self.factor <= F and F > 0:
                self._sign, self._top = 1, F
                return self._bottom_at
            return None
        self._top = max(self._top, F)
        if self._top >= F * self.factor and self._top > 0:
            self._sign, self._bottom, self._bottom_at = -1, F, t
        return None

    def settings(self) -> dict[str, Any]:
        """Return the rule's options, in words and numbers that a log holds."""
        hysteresis = round(self.factor - 1, 12) if self.mode == "robust" else None
        norm = self.fluctuation.norm
        return {"rule": self.mode, "hysteresis": hysteresis, "attribution": self.attribution, "norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to go on."""
        own = {n: v for n, v in self.__dict__.items() if n not in ("fluctuation", "found")}
        found = None if self.found is None else [self.found.measurement, self.found.valley, self.found.detected]
        return own | {"fluctuation": self.fluctuation.state_dict(), "found": found, "valleys": [*self.valleys]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name in self.__dict__:
            value = state[name]
            if name == "fluctuation":
                self.fluctuation.load_state_dict(value)
            elif name == "found":
                self.found = None if value is None else TurningPoint(*value)
            else:
                setattr(self, name, [*value] if name == "valleys" else value)
