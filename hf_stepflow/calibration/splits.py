"""The two splits: on one everything is chosen, the other is kept for the verdict and is never looked at before."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.runtime.errors import StepFlowInputError

# Problems that each split needs at least for anything to be chosen, or to be shown.
SMALLEST = 8

# Batches that are filled from the same stretch of the order, so that prompts of like length stand together.
_STRETCH = 4


@dataclass(frozen=True)
class Splits:
    """Problems of both splits, each in an order that the seed draws: the first n are a random sample of them.

    Attributes:
        calibration: everything is chosen on these.
        held_out: the verdict is given on these.
    """

    calibration: list[EvalProblem]
    held_out: list[EvalProblem]


@dataclass(frozen=True)
class Batch:
    """Problems that are answered together, under any settings.

    Attributes:
        name: its split and its number.
        problems: its problems.
    """

    name: str
    problems: tuple[EvalProblem, ...]


def split_problems(problems: Sequence[EvalProblem], seed: int) -> Splits:
    """Splits problems by a hash of their question and the seed.

    The same question, whatever its id, capitals and white space, is never in both.

    Args:
        problems: each id once.
        seed: another one gives other splits.

    Raises:
        StepFlowInputError: too few problems for two splits.
    """
    order = sorted(problems, key=lambda one: (_hash(one, seed), one.id))
    calibration = [one for one in order if _hash(one, seed)[0] % 2 == 0]
    held_out = [one for one in order if _hash(one, seed)[0] % 2 == 1]
    if min(len(calibration), len(held_out)) < SMALLEST:
        raise StepFlowInputError(
            f"{len(problems)} problems make splits of {len(calibration)} and {len(held_out)}, and each needs "
            f"{SMALLEST} at least",
            hint="give more problems: some hundreds, to show a gain of a few points",
        )
    return Splits(calibration, held_out)


def batches_of(problems: Sequence[EvalProblem], size: int, split: str, seed: int) -> list[Batch]:
    """Cuts a split into batches, so that where time ends none of its lengths was favoured.

    Prompts of a batch are of like length, which saves padding; the batches of a stretch come in an order that the seed
    draws. So any first batches are a random sample of batches, and whole stretches are random samples of problems.

    Args:
        problems: in the order of the split.
        size: problems of a batch.
        split: names the batches.
        seed: draws the order of batches.
    """
    batches: list[Batch] = []
    drawn = random.Random(f"{seed}/batches/{split}")
    for start in range(0, len(problems), size * _STRETCH):
        stretch = sorted(problems[start : start + size * _STRETCH], key=lambda one: len(one.prompt))
        parts = [tuple(stretch[at : at + size]) for at in range(0, len(stretch), size)]
        drawn.shuffle(parts)
        batches += [Batch(f"{split}/{len(batches) + number}", part) for number, part in enumerate(parts)]
    return batches


def _hash(problem: EvalProblem, seed: int) -> bytes:
    question = " ".join(problem.question.casefold().split())
    return hashlib.sha256(f"hf-stepflow calibration/{seed}/{question}".encode()).digest()
