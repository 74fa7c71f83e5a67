"""What is known of one token: the record, its fields, and the features of a token that it is computed from.

A *record* is the row of integers (`Field`) that describes one token and is also the whole state of the detector after
it. Keeping the records of all cached tokens makes rollback, beams and batches plain tensor operations.
"""

QUESTION, THINKING, SUMMARY, ASIDE = range(4)
SEGMENT_NAMES = ("question", "thinking", "summary")


class Field:
    """Columns of a record, as plain integers, which compiled code takes as constants.

    Slots are positions in the KV cache (padding included); -1 means none.

    The first block is what attention reads, the second is the detector's own state.
    """

    LABEL = 0  # 3 * round + segment; -1 for padding. Rounds count from 1, 0 is before any thinking
    STEP = 1  # step inside the round, 0 for question, -1 for control tokens, padding and text in no step
    TRIGGER = 2  # 1 where SMI injects
    ACTIVE = 3  # 1 where OEB applies
    THINKING_SLOT = 4  # first slot of this round's thinking
    SUMMARY_SLOT = 5  # first slot of this round's summary
    STEP_SLOT = 6  # first slot of the current or last step of this round
    PREVIOUS_START = 7  # slots of the step before it: [start, end), and how many of them belong to it
    PREVIOUS_END = 8
    PREVIOUS_COUNT = 9
    FIRST_SLOT = 10  # first slot that is not padding
    HAS_ASIDE = 11  # 1 if the round's thinking holds tool results, so that its keys are not one range
    COUNT = 12  # tokens up to and including this one, padding left out
    TOKEN = 13  # the token id, -1 for padding

    RULE_STATE = 14
    MARKER_STATE = 15
    SEGMENT = 16
    RETURN_SEGMENT = 17
    IN_HEADER = 18
    LENGTH = 19
    BLANKS = 20
    FLAGS = 21
    STEP_OPEN = 22
    STEPS = 23
    THINKING_STEPS = 24
    STEP_END = 25
    STEP_COUNT = 26
    ROUND = 27


FIELDS = Field.ROUND + 1

# What a new round starts with: -1 and 0.
UNSET_BY_ROUND = (Field.SUMMARY_SLOT, Field.STEP_SLOT, Field.PREVIOUS_START, Field.PREVIOUS_END)
CLEARED_BY_ROUND = (
    Field.STEPS, Field.THINKING_STEPS, Field.HAS_ASIDE, Field.STEP_END, Field.STEP_COUNT, Field.PREVIOUS_COUNT,
    Field.IN_HEADER,
)  # fmt: skip


def empty_record() -> list[int]:
    """The detector before the first token."""
    record = [0] * FIELDS
    for name in (Field.LABEL, Field.STEP, Field.THINKING_SLOT, Field.SUMMARY_SLOT, Field.STEP_SLOT, Field.FIRST_SLOT):
        record[name] = -1
    record[Field.PREVIOUS_START] = record[Field.PREVIOUS_END] = record[Field.TOKEN] = -1
    return record


class Feature:
    """Columns of the per-token features."""

    RULE_ROW = 0
    MARKER_ROW = 1
    BEFORE = 2
    LENGTH = 3
    AFTER = 4
    FLAGS = 5
    SPLIT_ROW = 6
    BYTES = 7
    CONTROL = 8
    SPECIAL = 9
    END_OF_TURN = 10
    OPENS_MESSAGE = 11


FEATURES = Feature.OPENS_MESSAGE + 1
