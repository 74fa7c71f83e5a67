"""The stages of a calibration that score candidates by the proxy: slopes of heads, heads one by one, the search."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hf_stepflow.evaluation.store import digest

from .candidates import Settings, Space, in_words
from .heads import Head, Heads, find_heads, floor_on, temperature_on
from .order import bridge_slopes, by_slope
from .proxy import ProxyScore, Row, Scored, exactness_score
from .run import SCORES, CalibrationRun
from .search import Proposer, Trial, search

# The most right traces whose slopes order the heads.
SLOPED = 16


@dataclass(frozen=True)
class Scoring:
    """The proxy of settings on a fixed set of responses.

    Attributes:
        run: The run.
        rows: The responses.
        strata: {problem: stratum}.
        base: The score of each response under the base.
    """

    run: CalibrationRun
    rows: list[Row]
    strata: Mapping[str, str]
    base: list[Scored]

    def scores(self, advance: Callable[[], Any], settings: Settings | None) -> list[Scored]:
        """Scores the responses under settings and advances a progress bar."""
        values = self.run.scores(settings, self.rows)
        advance()
        return values

    def compare(self, before: list[Scored], after: list[Scored]) -> ProxyScore:
        """Returns the proxy of one set of scores relative to another."""
        return exactness_score(self.rows, before, after, self.strata)


def slopes_of(scoring: Scoring) -> dict[Head, float]:
    """How the loss of right traces would change if a little mass moved to the bridge in each head."""
    run, traces = scoring.run, [([*row.ids], len(row.prompt)) for row in scoring.rows if row.is_right][:SLOPED]
    if not traces or run.is_over("bands", "slopes"):
        return {}

    def measured() -> list[list[float]]:
        vocabulary = run.model.stepflow_runtime.rules.vocabulary
        with run.model.disable_stepflow():
            slopes = bridge_slopes(run.model, traces, run.tokenizer, vocabulary)
        return [[layer, head, value] for (layer, head), value in slopes.items()]

    return {(int(layer), int(head)): value for layer, head, value in run.decide("slopes", measured)}


def try_all_heads(scoring: Scoring, base_length: int, slopes: dict[Head, float]) -> dict[str, Heads]:
    """The heads that profit: from the bridge the half with the steepest slopes, from the length temperature of all."""
    heads: dict[int, int] = scoring.run.model.stepflow_runtime.heads
    layers = sorted(heads)
    everywhere = [(layer, head) for layer in layers for head in range(heads[layer])]
    number = numbers_of_heads(scoring.run)[0]
    first = by_slope(everywhere, slopes)[:number]
    # In random order, so that the heads reached in a short time are of all layers.
    random.Random(f"{scoring.run.sampling.seed}/temperature").shuffle(everywhere)
    warm = partial(temperature_on, base=base_length)
    bridge = replace(_try_heads(scoring, "bridge heads", first, floor_on), slopes=slopes)
    return {"OEB": bridge, "length temperature": _try_heads(scoring, "temperature heads", everywhere, warm)}


def _try_heads(
    scoring: Scoring, stage: str, heads: list[Head], acting_on: Callable[[Sequence[Head]], Settings]
) -> Heads:
    def is_over(head: Head, together: bool) -> bool:
        return scoring.run.is_over(f"{stage} together" if together else stage, stage, list(head), together)

    with scoring.run.bar(stage, len(heads), SCORES) as bar:
        return find_heads(heads, acting_on, partial(scoring.scores, bar.update), scoring.compare, is_over)


def search_candidates(scoring: Scoring, space: Space) -> list[Trial]:
    """The search: candidates ranked by the proxy."""
    run = scoring.run
    journal = None if run.work.path is None else run.work.path / "optuna.journal"
    proposer = Proposer(space, run.sampling.seed, journal) if run.workers.is_first else None

    def propose(number: int) -> dict[str, Any]:
        return run.decide("trial", lambda: proposer.draw(number) if proposer else None, number, digest(vars(space)))

    def report(trial: Trial) -> None:
        score = trial.score
        harm = "" if score.is_harmless else f", harms {score.stratum}"
        seconds = run.work.spent() - started[0]
        started[0] = run.work.spent()
        line = f"proxy {score.value:+.3f} ± {score.error:.3f} {score.unit}{harm}; {seconds:.1f} s"
        run.say(f"#{trial.number:<3} {in_words(trial.settings)}; {line}")

    trials, started = run.budget.candidates, [run.work.spent()]
    with run.bar("search", trials, SCORES) as bar:
        return search(
            space,
            trials,
            propose,
            lambda settings: scoring.compare(scoring.base, scoring.scores(bar.update, settings)),
            proposer.tell if proposer else None,
            lambda number: run.is_over("search", "search", number),
            report,
        )


def numbers_of_heads(run: CalibrationRun) -> tuple[int, int]:
    """The numbers of heads that are tried under the bridge and under the length temperature."""
    heads: dict[int, int] = run.model.stepflow_runtime.heads
    layers = sorted(heads)
    return sum(heads[layer] for layer in layers[: -(-len(layers) // 2)]), sum(heads.values())
