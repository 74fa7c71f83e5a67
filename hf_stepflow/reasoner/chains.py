"""Chains: quantities linked by shuffled premises among distractors, worked out digit by digit.

With counting in between they are errands: premises are read early and needed late, and the thinking grows with work
that has nothing to do with them.
"""

import random

from .counting import count, split
from .problems import LARGEST, NAMES, Drawn, add, subtract

# Of one who has more, and of one who has fewer, points than somebody else.
RELATIONS = ("more than", "fewer than")


def make(generator: random.Random, people: int, distractors: int, counts: int = 0, sentences: int = 0) -> Drawn:
    """One problem.

    Args:
        generator: the source of chance.
        people: how many quantities must be known, the first included.
        distractors: how many others depend on one of them and are of no use.
        counts: how many counts the question asks for in passing, at most `people`; one follows each quantity that
            becomes known, as long as there are any.
        sentences: about how many sentences of counting these are altogether.
    """
    drawn = generator.sample(NAMES, people + distractors + counts)
    names, counters = drawn[: people + distractors], drawn[people + distractors :]
    values = [generator.randint(1, LARGEST)]
    premises = [f" {names[0]} has {values[0]} points."]
    # What the thinking finds on its way from the quantity asked for back to the one that is given.
    found = list(premises)
    steps = list(premises)
    for one in range(1, people + distractors):
        source = one - 1 if one < people else generator.randrange(people)
        value = generator.choice([other for other in range(1, LARGEST + 1) if other != values[source]])
        gap = abs(value - values[source])
        relation = RELATIONS[value < values[source]]
        premise = f" {names[one]} has {gap} {relation} {names[source]}."
        premises.append(premise)
        values.append(value)
        if one < people:
            work = subtract if value < values[source] else add
            found.append(premise)
            steps.append(f"{premise}{work(values[source], gap)} {names[one]} has {value} points.")
    generator.shuffle(premises)
    plan = ""
    for one, share in enumerate(split(generator, sentences, counts)):
        said, worked = count(generator, counters[one], share)
        plan += said
        steps[one] += said + worked
    thinking = "".join(reversed(found[1:])) + "".join(steps)
    question = "".join(premises).strip() + plan + f" How many points does {names[people - 1]} have?"
    return Drawn(question, thinking, values[people - 1])
