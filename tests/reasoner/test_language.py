"""What the reasoner can read: all of its own problems, and nothing that it has never seen."""

import pytest

from hf_stepflow.cli import main
from hf_stepflow.reasoner.language import check_readable
from hf_stepflow.reasoner.levels import LEVELS, problems_of
from hf_stepflow.runtime.errors import StepFlowInputError


@pytest.mark.parametrize("level", LEVELS)
def test_its_own_problems_are_readable(level):
    for problem in problems_of(level, "test", 20):
        check_readable(problem.question)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Bob has 4 points. How many points does Bob have?", "the words 'Bob' are outside"),
        ("What's two plus two?", "the words \"What's\", 'two', 'plus' are outside"),
        ("Ann has 104 points. How many points does Ann have?", "numbers go up to 99, and it holds 104"),
        ("Ann has 4 points. How many points does Ben have?", "it asks for Ben, of whom it tells nothing"),
        ("Ann counts from 2 to 8 by 2. How many points does Ann have?", "of whom it tells nothing"),
        ("Ann has 4 points.", "it asks 0 questions"),
        ("Ann has points. How many points does Ann have?", "'Ann has points.' is no sentence"),
        ("Ann has 4 points, How many points does Ann have?", "is no sentence"),
        ("", "it asks 0 questions"),
    ],
)
def test_other_questions_are_refused(question, words):
    with pytest.raises(StepFlowInputError, match=words) as caught:
        check_readable(question)
    check_readable(caught.value.hint.partition("such as: ")[2])


def test_the_commands_say_it(capsys):
    question = "Bob has 4 points. Ann has 3 more than Bob. How many points does Ann have?"
    for words in (["demo", "--problem", question], ["generate", "--model", "reasoner", "--prompt", question]):
        assert main(words) == 2
        told = capsys.readouterr()
        assert not told.out
        assert "'Bob' are outside its language" in told.err
        assert "hint: it knows the names Ann, " in told.err
