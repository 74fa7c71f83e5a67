"""Generates word problems with one to three additions; SmolLM2-135M-Instruct solves about three in ten of them.

In each problem somebody has some things and gets more, up to three times. A problem comes with a worked response, so
that whole right responses can be scored. The seed determines everything.
"""

import json
import random
from pathlib import Path

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack",
    "Kate", "Leo", "Mia", "Noah", "Olivia", "Peter", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs",
    "flowers", "marbles", "pencils", "stamps", "stickers", "toys",
)  # fmt: skip
EVENTS = ("finds {} more", "buys {} more", "gets {} more")
MOST = 9

# The numbers of additions in the problems, in turn, and in the two examples that the model sees.
STEPS = (1, 2, 1, 2, 3)
EXAMPLES = (1, 2)


def problem(additions: int, rng: random.Random) -> dict[str, str]:
    """Draws a problem, without an id."""
    name, thing, amount = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, MOST)
    question, worked = [f"{name} has {amount} {thing}."], [f"{name} has {amount} {thing}."]
    for _ in range(additions):
        more = rng.randint(1, MOST)
        event = rng.choice(EVENTS).format(more)
        question.append(f"{name} {event}.")
        worked.append(f"{name} {event}, so {amount} + {more} = {amount + more}.")
        amount += more
    return {
        "question": " ".join([*question, f"How many {thing} does {name} have now?"]),
        "answer": str(amount),
        "trace": " ".join([*worked, f"The answer is {amount}."]),
    }


def different_problems(number: int, seed: int) -> list[dict[str, str]]:
    """Draws `number` different problems, whose numbers of additions take turns."""
    rng = random.Random(seed)
    made: dict[str, dict[str, str]] = {}
    while len(made) < number:
        one = problem(STEPS[len(made) % len(STEPS)], rng)
        made.setdefault(one["question"], one)
    return [{"id": str(at)} | one for at, one in enumerate(made.values())]


def write_problems(path: Path, number: int, seed: int) -> None:
    """Writes problems in the form that `hf-stepflow calibrate --problems` reads."""
    lines = [json.dumps(one) + "\n" for one in different_problems(number, seed)]
    path.write_text("".join(lines), encoding="utf-8")


def template_with_examples(seed: int) -> str:
    """Makes a chat template that shows two solved problems as earlier turns and adds no other text."""
    rng = random.Random(f"{seed}/examples")
    turns = ""
    for additions in EXAMPLES:
        one = problem(additions, rng)
        for role, text in (("user", one["question"]), ("assistant", one["trace"])):
            turns += f"<|im_start|>{role}\n{text}<|im_end|>\n"
    return (
        turns + "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
