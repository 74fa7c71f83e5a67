"""Stage 3, first part: optuna draws settings, the proxy scores them, always on the same responses."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_stepflow.evaluation.runner import digest

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
