"""stepflow-suite: candidate tasks whose responses grow in length, each at three lengths.

The suite is data only. NOT YET MEASURED: no model has answered it, so nothing is known of how hard the tasks are, nor
of whether StepFlow helps or harms on any of them. Knobs may change until a measurement fixes them.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

LENGTHS = ("short", "medium", "long")


@dataclass(frozen=True)
class SuiteTask:
    """One task of the suite: a generator of reasoning-gym at three lengths.

    Attributes:
        generator: The generator.
        strains: What grows with the length: `arithmetic` (the chain of calculations), `premises` (what has to be kept
            in view) or `state` (the number of updates to a state).
        meaning: What is asked, in a sentence.
        knobs: The knobs of each length, a key of `LENGTHS`.
    """

    generator: str
    strains: str
    meaning: str
    knobs: dict[str, dict[str, Any]]


def _between(stem: str, *numbers: int, **fixed: Any) -> dict[str, dict[str, Any]]:
    """Knobs that hold `min_STEM` and `max_STEM` at one number for each length."""
    knobs = ({f"min_{stem}": number, f"max_{stem}": number, **fixed} for number in numbers)
    return dict(zip(LENGTHS, knobs, strict=True))


def _knob(name: str, *values: Any, **fixed: Any) -> dict[str, dict[str, Any]]:
    return {length: {name: value, **fixed} for length, value in zip(LENGTHS, values, strict=True)}


SUITE: dict[str, SuiteTask] = {
    "sums": SuiteTask(
        "chain_sum",
        "arithmetic",
        "Adds and subtracts numbers of two or three digits.",
        _between("terms", 6, 16, 40, min_digits=2, max_digits=3),
    ),
    "decimal-sums": SuiteTask(
        "decimal_chain_sum",
        "arithmetic",
        "Adds and subtracts decimals of two places.",
        _between("terms", 4, 10, 24, min_digits=1, max_digits=3, min_decimal_places=2, max_decimal_places=2),
    ),
    "expressions": SuiteTask(
        "basic_arithmetic",
        "arithmetic",
        "Evaluates an expression with parentheses.",
        _between("terms", 4, 8, 16, min_digits=1, max_digits=2),
    ),
    "legs": SuiteTask(
        "leg_counting", "arithmetic", "Sums the legs of many kinds of animals.", _between("animals", 5, 12, 25)
    ),
    "needle": SuiteTask(
        "needle_haystack",
        "premises",
        "Finds the one person with a given taste among many statements.",
        _between("num_statements", 20, 100, 400),
    ),
    "knights": SuiteTask(
        "knights_knaves",
        "premises",
        "Finds out who lies from what each says of the others.",
        _knob("n_people", 3, 4, 6),
    ),
    "schedule": SuiteTask(
        "course_schedule",
        "premises",
        "Decides whether all courses can be taken, given what each requires.",
        _between("num_courses", 6, 14, 30),
    ),
    "cube": SuiteTask(
        "color_cube_rotation",
        "state",
        "Follows the colours of a cube through rotations.",
        _between("rotations", 2, 6, 16),
    ),
    "rewriting": SuiteTask(
        "ab", "state", "Rewrites a row of symbols until no rule applies.", _knob("length", 5, 10, 20)
    ),
    "string-rules": SuiteTask(
        "string_manipulation",
        "state",
        "Applies rules to a string until none applies.",
        _between("num_rules", 3, 6, 10, min_string_length=12, max_string_length=12),
    ),
    "sorting": SuiteTask("number_sorting", "state", "Sorts numbers.", _between("numbers", 6, 16, 40)),
}


def suite_task(text: str) -> tuple[SuiteTask, dict[str, Any]]:
    """Reads `TASK@LENGTH` and returns the task with its knobs.

    Raises:
        StepFlowInputError: There is no such task or length.

    Example:
        >>> from hf_stepflow.evaluation.suite import suite_task
        >>> suite_task("legs@short")[1]
        {'min_animals': 5, 'max_animals': 5}
    """
    name, _, length = text.partition("@")
    if name not in SUITE:
        close = difflib.get_close_matches(name, SUITE, 1)
        raise StepFlowInputError(
            f"stepflow-suite has no task {name!r}",
            hint=f"did you mean {close[0]!r}?" if close else f"tasks: {', '.join(SUITE)}",
        )
    if length not in LENGTHS:
        raise StepFlowInputError(
            f"stepflow-suite:{name} needs a length, got {length!r}",
            hint=f"write stepflow-suite:{name}@{LENGTHS[0]}; lengths: {', '.join(LENGTHS)}",
        )
    task = SUITE[name]
    return task, task.knobs[length]
