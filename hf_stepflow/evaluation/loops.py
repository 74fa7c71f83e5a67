"""Loops: responses that repeat one piece of text until they are cut off."""

from collections.abc import Sequence

# The fewest repetitions, and the fewest tokens of all of them.
_TIMES, _TOKENS = 3, 32


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether a response ends in a piece that is there at least three times in a row, 32 tokens or more in all.

    The piece may be of any length, a word or a step; the last repetition may be cut off.

    Args:
        ids: The token ids.

    Example:
        >>> ends_in_loop([7, 1, 2, 3] * 12), ends_in_loop(range(48))
        (True, False)
    """
    # For every end of the text at once: the longest of its ends that is also its start, from the last token back. The
    # rest of it is its shortest period (Knuth, Morris and Pratt, 1977).
    back = list(ids)[::-1]
    border = [0] * len(back)
    for place in range(1, len(back)):
        length = border[place - 1]
        while length and back[place] != back[length]:
            length = border[length - 1]
        border[place] = length + (back[place] == back[length])
        period = place + 1 - border[place]
        if place + 1 >= max(_TIMES * period, _TOKENS):
            return True
    return False
