"""The proxy: how settings change what greedy decoding would write, or how likely responses are; a pass a response.

It scores whole responses, the reasoning and the answer. Where reference traces exist it is their exactness: the share
of their tokens, and of whole traces, that greedy decoding gets right under teacher forcing. Elsewhere the model's own
responses have to serve, which it finds likely in any case: then it is the likelihood of right ones and their margin
over wrong ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.prompts import encode_prompt, encode_response
from hf_stepflow.runtime.step_detector import Field, StepVocabulary

# The most by which one response changes the proxy, in nats: a single impossible response does not outvote all others.
CLIP = 10.0

# The mean loss on right traces of a stratum that is tolerated beyond one standard error: nats per trace, and points.
TOLERANCE = 0.02
_TOLERANCES = {"nats": TOLERANCE, "points": 0.2}

# The fewest scored problems of a stratum that say anything of it.
FEWEST = 3


@dataclass(frozen=True)
class Row:
    """A response to score.

    Attributes:
        problem: The id of its problem.
        prompt: Token ids of the prompt.
        response: Token ids of the response, including the end of the turn.
        is_right: Whether the response is right.
        weight: How many problems of the split this one stands for.
        is_reference: Whether it is the reference trace of its problem.
    """

    problem: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    is_right: bool
    weight: float = 1.0
    is_reference: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of prompt and response."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Solved:
    """The base's answers to one problem.

    Attributes:
        problem: The problem.
        prompt: Token ids of the prompt.
        reference: Token ids of the reference trace; None without one.
        accuracy: The share of right responses.
        tokens: The length of the reference trace, or without one the mean length of the responses.
        steps: The number of thinking steps, by the same rule.
        results: The responses, as `evaluate` records them.
    """

    problem: EvalProblem
    prompt: tuple[int, ...]
    reference: tuple[int, ...] | None
    accuracy: float
    tokens: float
    steps: float
    results: list[dict[str, Any]]


def read_answers(
    problems: Sequence[EvalProblem],
    results: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    vocabulary: StepVocabulary,
    template: Mapping[str, Any],
) -> list[Solved]:
    """Groups the base's answers, as `evaluate` records them with token ids, by problem.

    Problems without an answer are left out.
    """
    answered: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        answered.setdefault(result["problem"], []).append(dict(result))
    solved = []
    for problem in problems:
        if problem.id not in answered:
            continue
        own = answered[problem.id]
        prompt, reference = encode_prompt(tokenizer, problem.prompt, **template), None
        if problem.trace is not None:
            reference = encode_response(tokenizer, problem.trace)
            records = vocabulary.scan(prompt + reference, prompt_length=len(prompt))[len(prompt) :]
            tokens = float(len(reference))
            steps = float(max((record[Field.THINKING_STEPS] for record in records), default=0))
        else:
            tokens = float(np.mean([len(result["ids"]) for result in own]))
            steps = float(np.mean([result["steps"] for result in own]))
        accuracy = float(np.mean([result["right"] for result in own]))
        known = None if reference is None else tuple(reference)
        solved.append(Solved(problem, tuple(prompt), known, accuracy, tokens, steps, own))
    return solved


def rows_to_score(solved: Sequence[Solved], limit: int) -> list[Row]:
    """Chooses responses to score: half of them to problems that the base misses.

    The right response to a problem is its reference trace, or without one each of the model's own right responses; the
    wrong ones are the model's own. Every chosen problem also stands for those of its kind that were left out.

    Args:
        solved: The base's answers, in a random order.
        limit: The largest number of problems to choose.
    """
    missed = [one for one in solved if one.accuracy < 1]
    known = [one for one in solved if one.accuracy == 1]
    chosen = missed[: max(limit // 2, limit - len(known))]
    rows = []
    for part, whole in ((chosen, missed), (known[: limit - len(chosen)], known)):
        for one in part:
            right = [tuple(result["ids"]) for result in one.results if result["right"]]
            wrong = [tuple(result["ids"]) for result in one.results if not result["right"]]
            if one.reference is not None:
                right = [one.reference]
            rows += [
                Row(
                    one.problem.id,
                    one.prompt,
                    response,
                    is_right,
                    len(whole) / len(part),
                    is_right and one.reference is not None,
                )
                for responses, is_right in ((right, True), (wrong, False))
                for response in dict.fromkeys(responses)
            ]
    return rows


@dataclass(frozen=True)
class Scored:
    """One response under some settings.

    Attributes:
        log_likelihood: Its log-likelihood, in nats.
        errors: The number of its tokens that were not the likeliest.
        tokens: The number of its tokens.
    """

    log_likelihood: float
    errors: int
    tokens: int


@dataclass(frozen=True)
class ProxyScore:
    """The change from other settings (the base) to these, per response.

    Attributes:
        value: What the search maximises: the mean of `tokens` and `whole` in points where reference traces exist, else
            the mean of `likelihood` and `margin` in nats.
        error: The standard error of the value over problems.
        likelihood: The change in log-likelihood of right responses, in nats.
        margin: The same minus the change of wrong responses.
        worst: The change on right responses of the stratum that loses most, plus its standard error; None without
            strata of at least `FEWEST` problems.
        stratum: The name of this stratum, or None.
        unit: The unit of `value`, `error` and `worst`: "points" or "nats".
        tokens: The change in the share of reference tokens that greedy decoding gets right, in points; None without
            reference traces.
        whole: The same of whole reference traces.
    """

    value: float
    error: float
    likelihood: float
    margin: float
    worst: float | None
    stratum: str | None = None
    unit: str = "nats"
    tokens: float | None = None
    whole: float | None = None

    @property
    def is_harmless(self) -> bool:
        """Whether no stratum loses more than the tolerance, beyond one standard error."""
        return self.worst is None or self.worst >= -_TOLERANCES[self.unit]

    @property
    def objective(self) -> float:
        """The value; below zero, the base's, if a stratum is harmed."""
        if self.is_harmless or self.worst is None:
            return self.value
        return min(self.value, 0.0) + self.worst


def proxy_score(
    rows: Sequence[Row], before: Sequence[float], after: Sequence[float], strata: Mapping[str, str]
) -> ProxyScore:
    """Compares the likelihoods of the same responses under two settings.

    Args:
        rows: The responses; the right ones of a problem share its weight, and so do the wrong ones.
        before: Log-likelihoods under the settings to compare with, in nats.
        after: Log-likelihoods under the settings to score, in nats.
        strata: {problem: stratum}; problems in none are left out of `worst`.
    """
    changes = _changes(rows, np.asarray(before, float), np.asarray(after, float))
    weights = {row.problem: row.weight for row in rows}
    problems, weight = list(weights), np.array(list(weights.values()))
    places = {name: place for place, name in enumerate(problems)}
    place = np.array([places[row.problem] for row in rows], int)
    is_right = np.array([row.is_right for row in rows], bool)
    right, wrong = (_by_problem(changes[kind], place[kind], len(problems)) for kind in (is_right, ~is_right))
    likelihood, right_parts = _mean(right, weight)
    lost, wrong_parts = _mean(wrong, weight)
    # The right and wrong responses of a problem enter the error of the value together.
    parts = right_parts - 0.5 * wrong_parts
    worst, stratum = _worst([strata.get(name) for name in problems], right, weight)
    return ProxyScore(
        value=likelihood - 0.5 * lost,
        error=float(np.sqrt((parts**2).sum())),
        likelihood=likelihood,
        margin=likelihood - lost,
        worst=worst,
        stratum=stratum,
    )


def exactness_score(
    rows: Sequence[Row], before: Sequence[Scored], after: Sequence[Scored], strata: Mapping[str, str]
) -> ProxyScore:
    """Compares what greedy decoding would write of the reference traces under two settings, in points.

    Args:
        rows: The responses.
        before: Their scores under the settings to compare with.
        after: Their scores under the settings to score.
        strata: {problem: stratum}.

    Returns:
        The score; of the likelihood where no row is a reference trace.
    """
    known = proxy_score(rows, [one.log_likelihood for one in before], [one.log_likelihood for one in after], strata)
    at = [place for place, row in enumerate(rows) if row.is_reference]
    if not at:
        return known
    weight = np.array([rows[place].weight for place in at])
    tokens = np.array([100 * (before[place].errors - after[place].errors) / after[place].tokens for place in at])
    whole = np.array([100.0 * ((after[place].errors == 0) - (before[place].errors == 0)) for place in at])
    value, parts = _mean((tokens + whole) / 2, weight)
    worst, stratum = _worst([strata.get(rows[place].problem) for place in at], (tokens + whole) / 2, weight)
    return replace(
        known,
        value=value,
        error=float(np.sqrt((parts**2).sum())),
        worst=worst,
        stratum=stratum,
        unit="points",
        tokens=_mean(tokens, weight)[0],
        whole=_mean(whole, weight)[0],
    )


def _worst(strata: Sequence[str | None], values: np.ndarray, weights: np.ndarray) -> tuple[float | None, str | None]:
    """The lowest mean of a stratum plus its standard error, and its name; (None, None) if all have too few values."""
    found = []
    for name in sorted({one for one in strata if one is not None}):
        own = np.where([one == name for one in strata], values, np.nan)
        number = int((~np.isnan(own)).sum())
        if number >= FEWEST:
            mean, parts = _mean(own, weights)
            found.append((mean + float(np.sqrt((parts**2).sum() * number / (number - 1))), name))
    return min(found, default=(None, None))


def _changes(rows: Sequence[Row], before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The clipped change of each response.

    A likelihood that overflows counts as the worst that settings can do to the response; a response whose likelihood
    overflowed before counts as unchanged.
    """
    worst = np.where([row.is_right for row in rows], -CLIP, CLIP)
    changes = np.subtract(after, before, where=np.isfinite(after), out=worst)
    return np.where(np.isfinite(before), np.clip(changes, -CLIP, CLIP), 0.0)


def _by_problem(changes: np.ndarray, place: np.ndarray, problems: int) -> np.ndarray:
    """The mean change of each problem's responses; NaN if it has none."""
    counts = np.bincount(place, minlength=problems)
    return np.where(counts > 0, np.bincount(place, changes, problems) / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The weighted mean over problems with a value, and each problem's part in its error."""
    known = ~np.isnan(values)
    if not known.any():
        return 0.0, np.zeros(len(values))
    shares = np.where(known, weights, 0.0) / weights[known].sum()
    mean = float((shares[known] * values[known]).sum())
    return mean, np.where(known, shares * (np.nan_to_num(values) - mean), 0.0)
