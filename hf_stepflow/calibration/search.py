"""Stage 3: optuna draws settings, the proxy scores them, and the best few answer problems until one is left."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_stepflow.evaluation.statistics import CONFIDENCE, Estimate
from hf_stepflow.evaluation.store import digest

from .candidates import Settings, Space
from .proxy import ProxyScore

# Trials that are drawn at random before optuna's model of the proxy draws.
_STARTUP = 10


@dataclass(frozen=True)
class Trial:
    """One candidate and its score.

    Attributes:
        number: from 0, in the order in which they were drawn.
        parameters: what optuna drew.
        settings: the settings that they stand for.
        score: the proxy, relative to the base.
    """

    number: int
    parameters: dict[str, Any]
    settings: Settings
    score: ProxyScore

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self) | {"objective": self.score.objective}


class Proposer:
    """Draws parameters with optuna, in a study that is kept in a journal file.

    The generator of each draw is seeded by the trial's number, so that a run that was stopped draws what it would have
    drawn.

    Args:
        space: what to draw from.
        seed: of all draws.
        journal: the file, or None for a study in memory.
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
        """The parameters of a trial, drawn before or now."""
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
        """Takes the objective of a trial that was drawn."""
        self._study.tell(number, value, skip_if_finished=True)

    def _sampler(self, number: int) -> Any:
        seed = int(digest([self._seed, number])[:8], 16)
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)


def search(
    space: Space,
    trials: int,
    propose: Callable[[int], dict[str, Any]],
    score: Callable[[Settings], ProxyScore],
    tell: Callable[[int, float], None],
    is_over: Callable[[int], bool],
) -> list[Trial]:
    """Scores candidates until the budget is spent; the same settings drawn twice count once.

    Args:
        space: what is drawn from.
        trials: how many may be drawn.
        propose: the parameters of a trial by its number.
        score: the proxy of settings.
        tell: takes the objective of a trial.
        is_over: whether time is up, asked before each trial.

    Returns:
        The different candidates, the best first.
    """
    found: dict[str, Trial] = {}
    for number in range(trials):
        if is_over(number):
            break
        parameters = propose(number)
        settings = space.candidate(parameters)
        trial = Trial(number, parameters, settings, score(settings))
        tell(number, trial.score.objective)
        found.setdefault(digest(settings), trial)
    return sorted(found.values(), key=lambda one: (-one.score.objective, one.number))


# Candidates that are run by generation, and how many of these are taken from the rest of the ranking: they show
# whether the proxy ranks as generation does.
RUN = 8
WITNESSES = 2

# Parameters that say what a candidate does and where. Those that agree in them differ by amounts only, and generation
# hardly tells them apart.
_KIND = ("bridge", "bridge_scope", "injection", "temperature", "temperature_heads")

# Net losses that a candidate may have among the short and easy problems, as a share of them; one is always let pass.
HARM = 0.01

Results = dict[str, list[float]]


@dataclass(frozen=True)
class Rung:
    """What one candidate did on the problems up to one rung.

    Attributes:
        trial: number of the candidate.
        problems: how many were answered.
        delta: accuracy, less the base's.
        lost_easy: short and easy problems lost, less those gained.
        stays: whether it goes on.
    """

    trial: int
    problems: int
    delta: float
    lost_easy: float
    stays: bool


@dataclass(frozen=True)
class Halving:
    """How the candidates fared.

    Attributes:
        rungs: for each rung, what its candidates did, the best first.
        winner: number of the winning candidate; None where none was better than the base.
        reason: one sentence.
    """

    rungs: list[list[Rung]] = field(default_factory=list)
    winner: int | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def to_run(
    ranked: Sequence[Trial], run: int = RUN, witnesses: int = WITNESSES, anchor: int | None = None
) -> list[Trial]:
    """The candidates to run: the anchor, the best of each kind by the proxy, and some spread over the rest.

    Where there are fewer kinds than places, the next best of any kind follow.

    Args:
        ranked: the best first.
        run: how many in all.
        witnesses: how many of these from the rest.
        anchor: number of a candidate that is run whatever the proxy says.
    """
    firsts: dict[tuple[Any, ...], Trial] = {}
    for one in ranked:
        firsts.setdefault(tuple(one.parameters.get(name) for name in _KIND), one)
    anchored = [one for one in ranked if one.number == anchor]
    ordered = dict.fromkeys(one.number for one in [*anchored, *firsts.values(), *ranked])
    chosen = set(list(ordered)[: max(1, run - witnesses)])
    best = [one for one in ranked if one.number in chosen]
    rest = [one for one in ranked if one.number not in chosen]
    places = np.linspace(0, len(rest) - 1, min(witnesses, len(rest))).round().astype(int) if rest else []
    return best + [rest[at] for at in dict.fromkeys(map(int, places))]


def halve(
    candidates: Sequence[Trial],
    rungs: int,
    answer: Callable[[Sequence[Trial], int], tuple[Results, dict[int, Results]]],
    easy: set[str],
) -> Halving:
    """Successive halving: on each rung more problems, and half of the candidates stay.

    Args:
        candidates: the best by the proxy first, which decides between equals.
        rungs: how many.
        answer: given candidates and a rung, the base's shares of right responses by problem, and the candidates' by
            their numbers, on all problems up to this rung; empty where there was no time.
        easy: ids of the short and easy problems.
    """
    alive, found = list(candidates), []
    for rung in range(rungs):
        base, others = answer(alive, rung)
        if not base:
            break
        rows = [_measure(one, base, others[one.number], easy) for one in alive]
        allowed = max(1.0, HARM * len(easy & base.keys()))
        place = {one.number: at for at, one in enumerate(alive)}
        rows.sort(key=lambda one: (one.lost_easy > allowed, -one.delta, place[one.trial]))
        keep = 1 if rung == rungs - 1 else math.ceil(len(alive) / 2)
        stays = {one.trial for one in rows[:keep] if one.lost_easy <= allowed}
        found.append([Rung(**{**asdict(one), "stays": one.trial in stays}) for one in rows])
        alive = [one for one in alive if one.number in stays]
        if not alive:
            return Halving(found, None, "every candidate lost short and easy problems")
    if not found:
        return Halving([], None, "there was no time to run any candidate by generation")
    last = next((row for row in found[-1] if row.stays), None)
    if last is None or last.delta <= 0:
        return Halving(found, None, f"no candidate answered more of {found[-1][0].problems} problems than the base")
    told = f"trial {last.trial} answered {100 * last.delta:+.1f} points of {last.problems} calibration problems"
    return Halving(found, last.trial, told)


def _measure(one: Trial, base: Results, own: Results, easy: set[str]) -> Rung:
    changes = {name: float(np.mean(own[name]) - np.mean(base[name])) for name in base}
    lost = sum(-change for name, change in changes.items() if name in easy)
    return Rung(one.number, len(base), float(np.mean(list(changes.values()))), lost, True)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[Estimate | None, int]:
    """Spearman's correlation with its interval (Bonett and Wright, 2000), and the number of pairs.

    Returns:
        None where it has no value: fewer than four pairs, or values that are all equal.
    """
    n = len(first)
    if n < 4 or min(np.ptp(first), np.ptp(second)) == 0:
        return None, n
    rho = float(stats.spearmanr(first, second).statistic)
    if abs(rho) >= 1 - 1e-12:
        z = math.copysign(math.inf, rho)
        width = 0.0
    else:
        z = math.atanh(rho)
        width = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Estimate(rho, math.tanh(z - width), math.tanh(z + width)), n
