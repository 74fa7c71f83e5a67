"""The language of the reasoner's questions: which texts it can read, and what is outside of it.

The model has seen one kind of question. On anything else it writes nonsense for as long as it may, so texts are
checked before they reach it.
"""

import re

from hf_stepflow.runtime.errors import StepFlowInputError

from .levels import LARGEST, NAMES, RELATIONS, problems_of

_WORDS = {*NAMES, *"has points counts from to by How many does have".split(), *" ".join(RELATIONS).split()}
_NAME, _NUMBER = f"(?:{'|'.join(NAMES)})", r"[0-9]{1,2}"
_SENTENCES = (
    rf"(?P<who>{_NAME}) has {_NUMBER} points\.",
    rf"(?P<who>{_NAME}) has {_NUMBER} (?:{'|'.join(RELATIONS)}) (?P<other>{_NAME})\.",
    rf"(?P<who>{_NAME}) counts from {_NUMBER} to {_NUMBER} by {_NUMBER}\.",
    rf"How many points does (?P<asked>{_NAME}) have\?",
)


def check_readable(question: str) -> None:
    """Refuses a question that the reasoner cannot read.

    Args:
        question: The text of the user's message.

    Raises:
        StepFlowInputError: It holds words, numbers or sentences that no problem of the reasoner holds, or it does not
            ask for the points of somebody that it tells of; the message names them, the hint shows a problem.

    Example:
        >>> from hf_stepflow.reasoner.language import check_readable
        >>> check_readable("Ben has 4 points. Ann has 3 more than Ben. How many points does Ann have?")
    """
    problem = _problem_of(question)
    if problem is not None:
        example = problems_of("chains-2", "test", 1)[0].question
        raise StepFlowInputError(
            f"the reasoner that comes with this package cannot read this question: {problem}",
            hint=f"it knows the names {', '.join(NAMES)} and questions such as: {example}",
        )


def _problem_of(question: str) -> str | None:
    """Describes what in a question is outside the language; None if nothing is."""
    words = re.findall(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", question)
    unknown = [word for word in dict.fromkeys(words) if word not in _WORDS]
    if unknown:
        return f"the words {', '.join(map(repr, unknown[:8]))} are outside its language"
    numbers = re.findall(r"[0-9]+", question)
    too_large = [number for number in numbers if len(number) > 2]
    if too_large:
        return f"numbers go up to {LARGEST}, and it holds {', '.join(too_large[:8])}"
    told: set[str] = set()
    asked: list[str] = []
    for sentence in re.findall(r"[^.?]+[.?]?", question.strip()):
        plain = " ".join(sentence.split())
        found = next(filter(None, (re.fullmatch(form, plain) for form in _SENTENCES)), None)
        if found is None:
            return f"{plain[:60]!r} is no sentence of its language"
        named = found.groupdict()
        if " has " in plain:
            told.add(named["who"])
        if "asked" in named:
            asked.append(named["asked"])
    if len(asked) != 1:
        return f"it asks {len(asked)} questions, expected one"
    return None if asked[0] in told else f"it asks for {asked[0]}, of whom it tells nothing"
