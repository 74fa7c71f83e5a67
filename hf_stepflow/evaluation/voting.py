"""Self-consistency: the answer that most responses give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .answers import NO_ANSWER, UNFINISHED, Verdict, is_right
from .problems import EvalProblem


@dataclass(frozen=True)
class Vote:
    """What some responses agree on.

    Attributes:
        verdict: on the answer given most often, among equals the one given first.
        chosen: the first response that gave it.
    """

    verdict: Verdict
    chosen: int


def votes(problem: EvalProblem, verdicts: Sequence[Verdict]) -> list[Vote]:
    """The vote after each response: of the first alone, of the first two, and so on (Wang et al., 2023).

    Responses without an answer have no vote. An answer counts with the first one that it would be right by, were that
    one the right answer; programs count together if they are the same, since their tests are not asked here.

    Args:
        problem: what was asked.
        verdicts: on each response, in the order in which they were drawn.
    """
    groups: list[list[int]] = []
    found = []
    for index, verdict in enumerate(verdicts):
        if verdict.answer is not None:
            _group(problem, verdicts, groups, index, verdict.answer)
        if groups:
            first = max(groups, key=len)[0]
            found.append(Vote(verdicts[first], first))
        elif all(one.outcome == UNFINISHED for one in verdicts[: index + 1]):
            found.append(Vote(verdicts[0], 0))
        else:
            found.append(Vote(Verdict(NO_ANSWER), 0))
    return found


def _group(
    problem: EvalProblem, verdicts: Sequence[Verdict], groups: list[list[int]], index: int, answer: str
) -> None:
    """Adds a response to those whose answer is alike."""
    for group in groups:
        other = verdicts[group[0]].answer
        assert other is not None
        is_alike = problem.kind != "code" and is_right(replace(problem, answer=other), answer)
        if answer == other or is_alike:
            group.append(index)
            return
    groups.append([index])
