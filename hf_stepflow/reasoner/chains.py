"""Chains: quantities linked by shuffled premises among distractors, worked out digit by digit.

Chains with counting in between are errands: premises are read early and needed late, because the thinking also does
work that is unrelated to them.
"""

import random

from .problems import LARGEST, NAMES, Drawn, add, count, split_randomly, subtract

RELATIONS = ("more than", "fewer than")


def make(generator: random.Random, people: int, distractors: int, counts: int = 0, sentences: int = 0) -> Drawn:
    """Draws one problem.

    Args:
        generator: The random generator.
        people: The number of quantities that must be known, including the first.
        distractors: The number of useless quantities that depend on one of them.
        counts: The number of counts that the question asks for along the way, at most `people`. One follows each
            quantity that becomes known, until all are done.
        sentences: The approximate number of counting sentences in total.
    """
    drawn = generator.sample(NAMES, people + distractors + counts)
    names, counters = drawn[: people + distractors], drawn[people + distractors :]
    values = [generator.randint(1, LARGEST)]
    premises = [f" {names[0]} has {values[0]} points."]
    # The premises that the thinking looks up, on its way from the quantity asked for back to the given one.
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
    for one, share in enumerate(split_randomly(generator, sentences, counts)):
        announcement, counting = count(generator, counters[one], share)
        plan += announcement
        steps[one] += announcement + counting
    thinking = "".join(reversed(found[1:])) + "".join(steps)
    question = "".join(premises).strip() + plan + f" How many points does {names[people - 1]} have?"
    return Drawn(question, thinking, values[people - 1])
