"""Damage: what an arm breaks, draws out and leaves unfinished, beside what it gains."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .answers import UNFINISHED
from .statistics import Estimate, clustered_share

# By problem and sample.
Results = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class NextTokenKL:
    """The divergence of one arm, over the tokens of all texts.

    Attributes:
        median: Nats a token.
        high: The 95th percentile.
        mean: The mean.
        tokens: The number of tokens.
        is_thinking: Whether the text stands in thinking: not if the model marks it by nothing that is known.
    """

    median: float
    high: float
    mean: float
    tokens: int
    is_thinking: bool


@dataclass(frozen=True)
class ArmDamage:
    """One arm and its damage, compared with the first arm. All intervals keep the samples of a problem together.

    Attributes:
        name: The name of the arm.
        accuracy: The share of right responses.
        harm_rate: Of what the first arm has right, the share that this one has wrong; None if the first has nothing
            right. For sampled responses, some break by chance: every right response is compared with all responses
            of this arm to the same problem, and the first arm's own row has the share that chance alone breaks. Of
            single responses, the first arm has none.
        length: The tokens, relative to those of the first arm; None for the first arm itself.
        loop_rate: The share of responses that end in a loop; None where results of an earlier release do not say.
        unfinished: The share of responses that were cut off. Each sample of a vote counts.
        tokens: The mean tokens of an answer, all samples of a vote together.
        seconds: The time of all batches.
        kl: The divergence of its next-token predictions from those of the model without an intervention, on text
            without a task (`kl_to_base`); None if it was not measured.
    """

    name: str
    accuracy: Estimate
    harm_rate: Estimate | None
    length: Estimate | None
    loop_rate: Estimate | None
    unfinished: Estimate
    tokens: float
    seconds: float
    kl: NextTokenKL | None = None


def damage_of(
    name: str,
    accuracy: Estimate,
    length: Estimate | None,
    own: Results,
    first: Results,
    seed: int,
    kl: NextTokenKL | None = None,
) -> ArmDamage:
    """Measures the damage of one arm.

    Args:
        name: The name of the arm.
        accuracy: Its accuracy.
        length: Its tokens, relative to those of the first arm; None for the first arm itself.
        own: Its results.
        first: The results of the first arm on the same problems and samples; `own` itself for the first arm.
        seed: The seed of the resampling.
        kl: The divergence of its predictions, if it was measured.
    """
    by_problem, right_first = _by_problem(own), _right(first)
    answers = [[one.get("votes", [one]) for one in rows] for rows in by_problem.values()]
    samples = [sum(map(len, rows)) for rows in answers]
    cut = [sum(one["outcome"] == UNFINISHED for row in rows for one in row) for rows in answers]
    loops = None
    if all("loops" in one for one in own.values()):
        found = [sum(one["loops"] for one in rows) for rows in by_problem.values()]
        loops = clustered_share(found, samples, seed)
    return ArmDamage(
        name,
        accuracy,
        _by_chance(right_first, seed) if own is first else _harm(right_first, _right(own), seed),
        length,
        loops,
        clustered_share(cut, samples, seed),
        sum(one["tokens"] for one in own.values()) / len(own),
        sum(one["seconds"] for one in own.values()),
        kl,
    )


def _harm(first: dict[str, list[bool]], own: dict[str, list[bool]], seed: int) -> Estimate | None:
    """Of the right responses of the first arm, the share of wrong ones to the same problems in another arm."""
    solved = [name for name, right in first.items() if any(right)]
    if not solved:
        return None
    counts = [sum(first[name]) for name in solved]
    lost = [n * own[name].count(False) / len(own[name]) for n, name in zip(counts, solved, strict=True)]
    return clustered_share(lost, counts, seed)


def _by_chance(first: dict[str, list[bool]], seed: int) -> Estimate | None:
    """The same for a second draw of the first arm: each right sample is compared with the other samples."""
    solved = [right for right in first.values() if len(right) > 1 and any(right)]
    if not solved:
        return None
    counts = list(map(sum, solved))
    lost = [n * (len(right) - n) / (len(right) - 1) for n, right in zip(counts, solved, strict=True)]
    return clustered_share(lost, counts, seed)


def _right(own: Results) -> dict[str, list[bool]]:
    return {name: [one["right"] for one in rows] for name, rows in _by_problem(own).items()}


def _by_problem(own: Results) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for (problem, _), result in sorted(own.items(), key=lambda item: item[0]):
        groups[problem].append(result)
    return groups
