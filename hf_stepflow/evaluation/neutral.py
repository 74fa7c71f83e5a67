"""Text without a task: plain prose on which the next-token predictions of two arms are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .problem import EvalProblem

# What the user asks for; methods that emphasise the question emphasise this.
REQUEST = "Please write down some thoughts about everyday things."

# Of several sentences each, so that there are steps; no numbers to work out, no question to answer, no phrase that
# starts a summary.
PROSE = (
    "The kitchen faces east, and on clear mornings the light reaches the table before the kettle has boiled. "
    "Bread is cut while it is still a little warm. Somebody opens the window, and the noise of the street comes "
    "in with the cold air.\n\n"
    "Later the same room is quiet. The cups are dry on the shelf, and a cat sleeps on the chair that nobody "
    "else likes. In the afternoon the shadows of the plants move slowly over the wall.",
    "A river does not keep to one bed for long. It takes earth from the outer bank of every bend and leaves it "
    "on the inner one, so the bends grow wider from year to year. At some point the water finds a shorter way. "
    "The old bend is then a lake, which fills with reeds and in the end becomes a meadow.\n\n"
    "People who live beside such a river build their houses on higher ground. They know the marks on the "
    "bridge, and their grandparents told them about the great flood. Most of them fish in the evening, "
    "once the wind has dropped.",
    "Good tools ask for little care, but they ask for it regularly. A plane should be clean and dry, and its "
    "iron sharp. My uncle kept an oiled cloth in every drawer of his workshop. He never lent his chisels to "
    "anyone, and he never had to explain why.\n\n"
    "Learning a craft takes time, because the hands learn more slowly than the head. First the work is crooked. "
    "Then it is straight but slow. One day you notice that you have been thinking of something else, and the "
    "joint fits.",
)

_TEXTS = 4  # traces, where those are taken
# Tokens a character from which on a tokenizer spells a text instead of reading it in words.
_SPELLED = 0.5


@dataclass(frozen=True)
class NeutralText:
    """One text.

    Attributes:
        prompt: The user's message before it.
        text: The text, which is written as thinking.
    """

    prompt: str
    text: str


def neutral_texts(tokenizer: Any, problems: Iterable[EvalProblem] = ()) -> tuple[str, list[NeutralText]]:
    """Chooses texts that a model can read.

    Args:
        tokenizer: The model's tokenizer.
        problems: The problems of the run.

    Returns:
        "prose" and the texts of this module. If the tokenizer has no words for them, so that it spells them letter by
        letter, and problems have right traces, "traces" and a few of those: the language of that model.

    Example:
        >>> from hf_stepflow import load_problems, load_reasoner
        >>> from hf_stepflow.evaluation.neutral import neutral_texts
        >>> neutral_texts(load_reasoner()[1], load_problems("reasoner:chains-2", 9))[0]
        'traces'
    """
    characters = sum(map(len, PROSE))
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in PROSE)
    traces = [NeutralText(one.prompt, one.trace) for one in problems if one.trace is not None]
    if traces and tokens > _SPELLED * characters:
        return "traces", traces[:_TEXTS]
    return "prose", [NeutralText(REQUEST, text) for text in PROSE]
