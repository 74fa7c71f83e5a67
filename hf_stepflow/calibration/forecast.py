"""The forecast: how long each stage of a calibration will take, and how much time is left."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The share of a stage's units that the cost known before it counts for, beside the units that the stage has done.
_WEIGHT = 0.05


@dataclass(frozen=True)
class Stage:
    """A stage to come.

    Attributes:
        name: The name.
        kind: The kind of its units, which cost about the same in every stage: "answers" (a batch under some
            settings) or "scores" (a pass over the scored responses).
        units: The number of units.
        end: The second of the run from which no unit is begun; None for no limit.
    """

    name: str
    kind: str
    units: float
    end: float | None = None


class Forecast:
    """Forecasts stages from the cost of a unit of each kind, which it learns while they run.

    Args:
        clock: Returns the seconds of the run so far.

    Attributes:
        kept: {stage: (seconds forecast before it, or None; seconds that it took)}.

    Example:
        >>> from hf_stepflow.calibration.forecast import Forecast, Stage
        >>> now = [0.0]
        >>> forecast = Forecast(lambda: now[0])
        >>> forecast.plan([Stage("traces", "answers", 10), Stage("verdict", "answers", 20)])
        >>> forecast.learn("answers", 2.0)
        >>> forecast.begin("traces", "answers", 10)
        20.0
        >>> now[0] = 3.0
        >>> forecast.advance()
        >>> round(forecast.left())
        75
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._waiting: list[Stage] = []
        self._costs: dict[str, tuple[float, float]] = {}
        self._now: Stage | None = None
        self._done = self._spent = self._began = self._marked = 0.0
        self._before: float | None = None
        self.kept: dict[str, tuple[float | None, float]] = {}

    def plan(self, stages: Sequence[Stage]) -> None:
        """Takes the stages to come, in order, in place of those planned before."""
        self._waiting = list(stages)

    def learn(self, kind: str, seconds: float, units: float = 1.0) -> None:
        """Takes the time that some units of a kind took."""
        known, number = self._costs.get(kind, (0.0, 0.0))
        self._costs[kind] = (known + seconds, number + units)

    def begin(self, name: str, kind: str, units: float) -> float | None:
        """Begins a stage and returns the seconds that it will take; None while no unit of its kind is known.

        Stages planned before it are left out; one that was not planned is put in front of the others.
        """
        self.finish()
        end = None
        names = [one.name for one in self._waiting]
        if name in names:
            end = self._waiting[names.index(name)].end
            del self._waiting[: names.index(name) + 1]
        self._now = Stage(name, kind, units, end)
        self._done = self._spent = 0.0
        self._began = self._marked = self._clock()
        self._before = self._seconds(self._now, self._marked)
        return self._before

    def advance(self, units: float = 1.0) -> None:
        """Takes note that units of the stage are done."""
        if self._now is None:
            return
        now = self._clock()
        self.learn(self._now.kind, now - self._marked, units)
        self._done, self._spent, self._marked = self._done + units, self._spent + now - self._marked, now

    def finish(self) -> None:
        """Ends the stage."""
        if self._now is None:
            return
        took = self._clock() - self._began
        known = self.kept.get(self._now.name)
        before = self._before if known is None else known[0]
        self.kept[self._now.name] = (before, took + (0.0 if known is None else known[1]))
        self._now = None

    def elapsed(self) -> float:
        """Returns the seconds of the run so far."""
        return self._clock()

    def left(self) -> float | None:
        """Returns the seconds left for the stage and all to come; None while the cost of a unit is not known."""
        now = at = self._clock()
        if self._now is not None:
            cost = self._cost(self._now.kind)
            weight = max(1.0, _WEIGHT * self._now.units)
            if cost is None:
                return None
            rate = (self._spent + weight * cost) / (self._done + weight)
            # A unit that runs has used some of its time already.
            running = min(now - self._marked, rate)
            at += self._until(self._now, max(self._now.units - self._done, 0.0) * rate - running, at)
        for stage in self._waiting:
            seconds = self._seconds(stage, at)
            if seconds is None:
                return None
            at += seconds
        return at - now

    def describe(self) -> str:
        """Returns the time of every stage to come whose cost is known, and of all together."""
        parts, at = [], self._clock()
        for stage in self._waiting:
            seconds = self._seconds(stage, at)
            if seconds is not None:
                parts.append(f"{stage.name} {in_clock(seconds)}")
                at += seconds
        return f"{', '.join(parts)}; {in_clock(at - self._clock())} in all"

    def _cost(self, kind: str) -> float | None:
        seconds, units = self._costs.get(kind, (0.0, 0.0))
        return seconds / units if units else None

    def _seconds(self, stage: Stage, at: float) -> float | None:
        cost = self._cost(stage.kind)
        return None if cost is None else self._until(stage, stage.units * cost, at)

    @staticmethod
    def _until(stage: Stage, seconds: float, at: float) -> float:
        """The seconds that a stage takes from `at` on, if it may not go on beyond its end."""
        return max(0.0, seconds if stage.end is None else min(seconds, stage.end - at))


def in_clock(seconds: float) -> str:
    """Returns a time such as 0:42, 12:05 or 3:00:10.

    Example:
        >>> from hf_stepflow.calibration.forecast import in_clock
        >>> in_clock(725.4)
        '12:05'
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
