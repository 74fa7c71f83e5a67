"""Counting: work of any length that has nothing to do with the rest of a problem."""

import random

from .problems import LARGEST

STRIDES = (1, 2, 3, 5)


def split(generator: random.Random, sentences: int, counts: int) -> list[int]:
    """Splits a number of sentences among counts, at random, at least one each."""
    if counts == 0:
        return []
    spare = max(sentences - counts, 0)
    cuts = sorted(generator.randint(0, spare) for _ in range(counts - 1))
    return [1 + right - left for left, right in zip([0, *cuts], [*cuts, spare], strict=True)]


def count(generator: random.Random, name: str, sentences: int) -> tuple[str, str]:
    """A count of so many sentences (as many as fit below 100): what the plan says of it, and the work."""
    stride = generator.choice([one for one in STRIDES if one * sentences < LARGEST] or STRIDES[:1])
    sentences = min(sentences, (LARGEST - 1) // stride)
    start = generator.randint(1, LARGEST - stride * sentences)
    end = start + stride * sentences
    said = f" {name} counts from {start} to {end} by {stride}."
    work = "".join(f" {name} now counts {at}." for at in range(start + stride, end + 1, stride))
    return said, f"{work} {name} is done."
