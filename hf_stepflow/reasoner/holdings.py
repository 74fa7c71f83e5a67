"""Holdings: sums of what is looked up by two keys, for the first stage of the training.

A plan in the question mixes things to look up among similar ones (the same owner with another colour, the same colour
with another owner) with counting that has nothing to do with them. The model does not learn these lookups;
it learns to follow a plan and to count.
"""

import random

from .counting import count, split
from .problems import LARGEST, NAMES, Drawn, add

COLOURS = ("red", "blue", "green", "black")


def make(generator: random.Random, premises: int, terms: int, sentences: int, counts: int) -> Drawn:
    """One problem.

    Args:
        generator: the source of chance.
        premises: how many holdings the question states.
        terms: how many of them the plan adds up.
        sentences: about how many sentences of counting stand in the plan altogether.
        counts: on how many counts they are spread.
    """
    owners = generator.sample(NAMES, max(2, -(-premises // 3)))
    keys = generator.sample([(owner, colour) for owner in owners for colour in COLOURS], premises)
    chosen = generator.sample(range(premises), terms)
    values = _values(generator, premises, chosen)
    stated = [
        f" The {colour} coins of {owner} are {value}." for (owner, colour), value in zip(keys, values, strict=True)
    ]
    errands = [("add", one) for one in chosen]
    counters = generator.sample(NAMES, counts)
    for one in range(counts):
        errands.insert(generator.randint(0, len(errands) - 1), ("count", one))
    shares = split(generator, sentences, counts)

    plan, thinking, total = "", "", None
    for kind, one in errands:
        if kind == "count":
            said, worked = count(generator, counters[one], shares[one])
        else:
            owner, colour = keys[one]
            said, worked = f" Add the {colour} coins of {owner}.", stated[one]
            if total is None:
                total = values[one]
            else:
                worked += add(total, values[one])
                total += values[one]
            worked += f" The sum is {total} coins."
        plan += said
        thinking += said + worked
    assert total is not None
    question = "".join(stated).strip() + plan + " How many coins are there in the sum?"
    return Drawn(question, thinking, total)


def _values(generator: random.Random, premises: int, chosen: list[int]) -> list[int]:
    """Numbers of coins; those to be added up stay within two digits."""
    values = [generator.randint(1, LARGEST) for _ in range(premises)]
    while sum(values[one] for one in chosen) > LARGEST:
        for one in chosen:
            values[one] = generator.randint(1, LARGEST)
    return values
