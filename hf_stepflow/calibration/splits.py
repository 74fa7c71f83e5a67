"""Splits and batches: everything is chosen on the calibration split; the held-out split is for the verdict alone."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.runtime.errors import StepFlowInputError

# The fewest problems with which a split can choose or show anything.
SMALLEST = 8

# Batches filled from one stretch of the order; within it, problems are batched by the length of their prompts.
_STRETCH = 4


@dataclass(frozen=True)
class Batch:
    """Problems that are answered together under any settings.

    Attributes:
        name: The split and the number of the batch.
        problems: The problems.
    """

    name: str
    problems: tuple[EvalProblem, ...]


def split_problems(problems: Sequence[EvalProblem], seed: int) -> tuple[list[EvalProblem], list[EvalProblem]]:
    """Splits problems with distinct ids by a hash of their question and the seed.

    A question is never in both splits, whatever its id, capitals and white space.

    Returns:
        The calibration split and the held-out split. Each has an order drawn by the seed, such that its first n
        problems are a random sample.

    Raises:
        StepFlowInputError: There are too few problems for two splits.
    """
    order = sorted(problems, key=lambda one: (_hash(one, seed), one.id))
    calibration = [one for one in order if _hash(one, seed)[0] % 2 == 0]
    held_out = [one for one in order if _hash(one, seed)[0] % 2 == 1]
    if min(len(calibration), len(held_out)) < SMALLEST:
        raise StepFlowInputError(
            f"{len(problems)} problems make splits of {len(calibration)} and {len(held_out)}; each needs {SMALLEST}",
            hint="give more problems; to show a gain of a few points takes some hundreds",
        )
    return calibration, held_out


def batches_of(problems: Sequence[EvalProblem], size: int, split: str, seed: int) -> list[Batch]:
    """Cuts a split into batches such that stopping early favours no length.

    The prompts of a batch have similar lengths, which saves padding. The batches of one stretch come in an order drawn
    by the seed, so the first batches are a random sample of batches, and whole stretches one of problems. The name of
    the split names the batches.
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
