"""The search: optuna draws candidates and the proxy scores them; the best then answer problems until one is left."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_stepflow.evaluation.statistics import CONFIDENCE, Estimate
from hf_stepflow.evaluation.store import digest

from .candidates import Settings, Space
from .proxy import ProxyScore

# Trials that are drawn at random before optuna models the proxy.
_STARTUP = 10

# Candidates that answer problems. The last of them come from further down the ranking: they show whether the proxy
# ranks as generation does.
RUN = 8
WITNESSES = 2

# Parameters that say what a candidate does, and where. Candidates that agree in all of them differ by amounts only,
# which generation can hardly distinguish.
_KIND = ("bridge", "bridge_scope", "injection", "temperature", "temperature_heads")

# A candidate stops where a one-sided sign test at this level finds that a stratum loses.
HARM_LEVEL = 0.05

# {problem: whether each response to it was right}.
Results = dict[str, list[float]]


@dataclass(frozen=True)
class Trial:
    """A candidate and its score.

    Attributes:
        number: The number of the trial, from 0 in the order of drawing.
        parameters: The parameters that optuna drew.
        settings: The settings that they stand for.
        score: The proxy, relative to the base.
    """

    number: int
    parameters: dict[str, Any]
    settings: Settings
    score: ProxyScore

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        return asdict(self) | {"objective": self.score.objective}


class Proposer:
    """Draws parameters with optuna, in a study that is kept in a journal file.

    The number of a trial seeds its draw, so an interrupted run draws what it would have drawn.

    Args:
        space: The space to draw from.
        seed: The seed of all draws.
        journal: The journal file, or None for a study in memory.
    """

    def __init__(self, space: Space, seed: int, journal: Path | None):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = space
        self._seed = seed
        storage = None
        if journal is not None:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            storage = JournalStorage(JournalFileBackend(str(journal)))
        name = digest([seed, space.__dict__])
        self._study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True, sampler=self._sampler(0)
        )
        for parameters in space.firsts()[len(self._study.get_trials(deepcopy=False)) :]:
            self._study.enqueue_trial(parameters)

    def draw(self, number: int) -> dict[str, Any]:
        """Returns the parameters of a trial, whether it was drawn before or is drawn now."""
        self._study.sampler = self._sampler(number)
        known = self._study.get_trials(deepcopy=False)
        waiting = self._optuna.trial.TrialState.WAITING
        if number < len(known) and known[number].state != waiting:
            trial = self._optuna.trial.Trial(self._study, known[number]._trial_id)
        else:
            trial = self._study.ask()
        assert trial.number == number
        return self._space.suggest(trial)

    def tell(self, number: int, value: float) -> None:
        """Records the objective of a trial."""
        self._study.tell(number, value, skip_if_finished=True)

    def _sampler(self, number: int) -> Any:
        seed = int(digest([self._seed, number])[:8], 16)
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)


def search(
    space: Space,
    trials: int,
    propose: Callable[[int], dict[str, Any]],
    score: Callable[[Settings], ProxyScore],
    tell: Callable[[int, float], None] | None,
    is_over: Callable[[int], bool],
    report: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Scores candidates until the trials or the time are spent, and returns the distinct ones, the best first.

    Args:
        space: The space of candidates.
        trials: The largest number of trials.
        propose: Returns the parameters of a trial.
        score: Returns the proxy of settings.
        tell: Records the objective of a trial; None in a process that draws none.
        is_over: Returns whether time is up; asked before each trial.
        report: Takes each trial that differs from those before.
    """
    found: dict[str, Trial] = {}
    for number in range(trials):
        if is_over(number):
            break
        parameters = propose(number)
        settings = space.candidate(parameters)
        trial = Trial(number, parameters, settings, score(settings))
        if tell is not None:
            tell(number, trial.score.objective)
        name = digest(settings)
        if name not in found and report is not None:
            report(trial)
        found.setdefault(name, trial)
    return sorted(found.values(), key=lambda one: (-one.score.objective, one.number))


@dataclass(frozen=True)
class Rung:
    """The result of one candidate on the problems up to one rung.

    Attributes:
        trial: The number of the candidate.
        problems: The number of problems.
        delta: The candidate's accuracy minus the base's.
        gained: The number of problems on which it is better than the base.
        lost: The number of those on which it is worse.
        worst: The change in accuracy of the stratum that loses most, plus its standard error; None without strata.
        stratum: The name of this stratum, or None.
        harmed: The strata that measurably lose.
        stays: Whether the candidate goes on.
    """

    trial: int
    problems: int
    delta: float
    gained: int
    lost: int
    worst: float | None
    stratum: str | None
    harmed: list[str]
    stays: bool

    @property
    def objective(self) -> float:
        """The difference in accuracy, less what the worst stratum loses."""
        return self.delta + min(self.worst or 0.0, 0.0)


@dataclass(frozen=True)
class Halving:
    """The results of all candidates that answered problems.

    Attributes:
        rungs: The candidates of each rung, the best first.
        winner: The number of the winning candidate; None if none was better than the base.
        reason: The reason in one sentence.
    """

    rungs: list[list[Rung]] = field(default_factory=list)
    winner: int | None = None
    reason: str = ""


def to_run(ranked: Sequence[Trial], anchor: int | None = None) -> list[Trial]:
    """Chooses candidates to answer problems: the best of each kind by the proxy, and some spread over the rest.

    If there are fewer kinds than places, the next best of any kind follow.

    Args:
        ranked: The candidates, the best first.
        anchor: The number of a candidate that is chosen whatever its proxy.
    """
    firsts: dict[tuple[Any, ...], Trial] = {}
    for one in ranked:
        firsts.setdefault(tuple(one.parameters.get(name) for name in _KIND), one)
    anchored = [one for one in ranked if one.number == anchor]
    ordered = dict.fromkeys(one.number for one in [*anchored, *firsts.values(), *ranked])
    chosen = set(list(ordered)[: RUN - WITNESSES])
    best = [one for one in ranked if one.number in chosen]
    rest = [one for one in ranked if one.number not in chosen]
    places = np.linspace(0, len(rest) - 1, min(WITNESSES, len(rest))).round().astype(int) if rest else []
    return best + [rest[at] for at in dict.fromkeys(map(int, places))]


def halve(
    candidates: Sequence[Trial],
    rungs: int,
    answer: Callable[[Sequence[Trial], int], tuple[Results, dict[int, Results]]],
    strata: Mapping[str, str],
    report: Callable[[Rung], None] | None = None,
) -> Halving:
    """Runs successive halving: each rung has more problems than the last and keeps half of its candidates.

    Args:
        candidates: The candidates, the best by the proxy first; this order decides between equals.
        rungs: The number of rungs.
        answer: Given candidates and a rung, returns the base's results and those of each candidate by its number, on
            all problems up to this rung; empty if there was no time.
        strata: {problem: stratum}.
        report: Takes each result of a rung, the best first.
    """
    alive, found = list(candidates), []
    for rung in range(rungs):
        base, others = answer(alive, rung)
        if not base:
            break
        rows = [_compare(one, base, others[one.number], strata) for one in alive]
        place = {one.number: at for at, one in enumerate(alive)}
        rows.sort(key=lambda one: (len(one.harmed) > 0, -one.objective, place[one.trial]))
        keep = 1 if rung == rungs - 1 else math.ceil(len(alive) / 2)
        stays = {one.trial for one in rows[:keep] if not one.harmed}
        found.append([replace(one, stays=one.trial in stays) for one in rows])
        if report is not None:
            for row in found[-1]:
                report(row)
        alive = [one for one in alive if one.number in stays]
        if not alive:
            return Halving(found, None, "every candidate measurably harmed a stratum")
    if not found:
        return Halving([], None, "there was no time for any candidate to answer problems")
    last = next((row for row in found[-1] if row.stays), None)
    if last is None or last.delta <= 0:
        return Halving(found, None, f"no candidate answered more of {found[-1][0].problems} problems than the base")
    gain = f"trial {last.trial} gained {100 * last.delta:.1f} points on {last.problems} calibration problems"
    return Halving(found, last.trial, gain)


def _compare(one: Trial, base: Results, own: Results, strata: Mapping[str, str]) -> Rung:
    changes = {name: float(np.mean(own[name]) - np.mean(base[name])) for name in base}
    by_stratum: dict[str, list[float]] = {}
    for name, change in changes.items():
        if name in strata:
            by_stratum.setdefault(strata[name], []).append(change)
    ends = [
        (float(np.mean(values)) + float(np.std(values)) / math.sqrt(len(values)), name)
        for name, values in sorted(by_stratum.items())
    ]
    worst, stratum = min(ends, default=(None, None))
    harmed = [name for name, values in sorted(by_stratum.items()) if _loses(values)]
    gained, lost = (sum(sign * change > 0 for change in changes.values()) for sign in (1, -1))
    delta = float(np.mean(list(changes.values())))
    return Rung(one.number, len(base), delta, gained, lost, worst, stratum, harmed, True)


def _loses(changes: Sequence[float]) -> bool:
    """Whether more problems get worse than better than chance explains: a one-sided sign test."""
    lost, gained = sum(one < 0 for one in changes), sum(one > 0 for one in changes)
    return lost > 0 and float(stats.binomtest(lost, lost + gained, alternative="greater").pvalue) <= HARM_LEVEL


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[Estimate | None, int]:
    """Returns Spearman's correlation with its interval (Bonett and Wright, 2000), and the number of pairs.

    The correlation is None if there are fewer than four pairs, or if all values of a side are equal.
    """
    n = len(first)
    if n < 4 or min(np.ptp(first), np.ptp(second)) == 0:
        return None, n
    rho = float(stats.spearmanr(first, second).statistic)
    if abs(rho) >= 1 - 1e-12:
        return Estimate(rho, math.copysign(1.0, rho), math.copysign(1.0, rho)), n
    width = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Estimate(rho, math.tanh(math.atanh(rho) - width), math.tanh(math.atanh(rho) + width)), n
