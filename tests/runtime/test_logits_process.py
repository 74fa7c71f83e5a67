import random
from queue import Empty
from threading import Thread

import pytest
import torch
from transformers import LogitsProcessor

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.logits_process import (
    StepBoundaryLogitsProcessor,
    StepBudgetLogitsProcessor,
    StepFollower,
    StepStreamer,
)
from hf_stepflow.runtime.step_detector import Field, StepVocabulary
from hf_stepflow.runtime.trace import segment_trace
from tests.support.step_tokenizers import byte_level_tokenizer, ids_of
from tests.support.tiny_models import tiny_model

WIDTH = 320
TEXT = "First I add both. Then I look again. 3.14 is near.\n\nThat was the last thought.</think>It is 5.\n\nBye.<eos>"


class Wishes(LogitsProcessor):
    """Makes a model want certain tokens: `wanted(row, text)` gives texts in order of liking, for the text so far."""

    def __init__(self, tokenizer, wanted):
        self.tokenizer = tokenizer
        self.wanted = wanted
        self.length = None

    def __call__(self, input_ids, scores):
        if self.length is None or input_ids.shape[1] < self.length:
            self.length = input_ids.shape[1]
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self.length :].tolist()):
            for rank, text in reversed(list(enumerate(self.wanted(row, self.tokenizer.decode(ids))))):
                token = self.tokenizer.encode(text, add_special_tokens=False)[0]
                scores[row, token] = 1000.0 - 100 * rank
        return scores


def script(*texts):
    """Wishes for one text a row, as far as the text so far agrees; then for the end."""

    def wanted(row, text):
        whole = texts[row % len(texts)]
        return [whole[len(text) :] or "<eos>"] if whole.startswith(text) else ["<eos>"]

    return wanted


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=WIDTH)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(special=["<think>", "</think>", "<pad>"])


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return StepVocabulary.from_tokenizer(tokenizer, {"min_step_chars": 8})


def encode(tokenizer, text):
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


def pad_id(tokenizer):
    return tokenizer.convert_tokens_to_ids("<pad>")


def generate(model, tokenizer, inputs, processors, **arguments):
    arguments = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": tokenizer.eos_token_id} | arguments
    arguments.setdefault("attention_mask", torch.ones_like(inputs))
    pad = tokenizer.eos_token_id if "<pad>" not in tokenizer.get_vocab() else pad_id(tokenizer)
    return model.generate(inputs, logits_processor=processors, pad_token_id=pad, **arguments)


def told_steps(tokenizer, vocabulary, ids, prompt_length=None):
    """The thinking and summary steps of a finished row."""
    steps = segment_trace(tokenizer, ids, vocabulary, prompt_length).steps
    return [(step.label, step.round, step.index, step.text) for step in steps if step.label != "question"]


class Listener:
    def __init__(self):
        self.calls = []

    def __call__(self, row, step):
        self.calls.append((row, step))

    def of(self, row):
        return [(step.label, step.round, step.index, step.text) for told, step in self.calls if told == row]


def test_boundaries_of_a_greedy_generation(model, tokenizer, vocabulary):
    listener = Listener()
    processor = StepBoundaryLogitsProcessor(vocabulary, listener, tokenizer=tokenizer)
    prompt = encode(tokenizer, "Q<think>Old thought of the prompt. Op")
    wishes = Wishes(tokenizer, script("en thought. " + TEXT))
    output = generate(model, tokenizer, prompt, [wishes, processor])
    expected = told_steps(tokenizer, vocabulary, output[0])
    assert tokenizer.decode(output[0]).endswith(TEXT)
    assert [step[3].strip() for step in expected[1:4]] == ["Open thought.", "First I add both.", "Then I look again."]
    assert listener.of(0) == expected[1:-1]  # the end of turn, which ends the last step, is never shown
    processor.finish(output)
    assert listener.of(0) == expected[1:]
    for _, step in listener.calls:
        assert tokenizer.decode(output[0, step.start : step.end]) == step.text


def test_a_step_is_told_of_when_the_next_begins(vocabulary, tokenizer):
    listener = Listener()
    processor = StepBoundaryLogitsProcessor(vocabulary, listener)
    ids = encode(tokenizer, "Q<think>A first thought. Second")
    scores = torch.rand(1, WIDTH)
    counts = []
    for length in range(2, ids.shape[1] + 1):
        assert processor(ids[:, :length], scores) is scores
        counts.append(len(listener.calls))
    assert counts.index(1) + 2 == ids.shape[1] - len("econd")
    (row, step) = listener.calls[0]
    assert (row, step.label, step.index, step.start, step.text) == (0, "thinking", 1, 2, None)


def test_boundaries_of_a_padded_batch(model, tokenizer, vocabulary):
    listener = Listener()
    processor = StepBoundaryLogitsProcessor(vocabulary, listener, tokenizer=tokenizer, pad_token_id=pad_id(tokenizer))
    prompts = ["Q<think>", "A longer question<think>"]
    rows = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    width = max(map(len, rows))
    inputs = torch.tensor([[pad_id(tokenizer)] * (width - len(row)) + row for row in rows])
    mask = (inputs != pad_id(tokenizer)).long()
    texts = TEXT, "Another thought there. And one.\n\nThis is all I have.</think>"
    output = generate(model, tokenizer, inputs, [Wishes(tokenizer, script(*texts)), processor], attention_mask=mask)
    processor.finish(output)
    for row, text in enumerate(texts):
        own = output[row][width - len(rows[row]) :]
        assert tokenizer.decode(own).startswith(prompts[row] + text)
        assert listener.of(row) == told_steps(tokenizer, vocabulary, own)
    assert [record[Field.COUNT] for record in processor.records] == [
        len(output[row]) - (width - len(rows[row])) for row in range(2)
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["samples", "beams", "sampled beams", "prompt lookup"],
)
def test_other_ways_of_generating(model, tokenizer, vocabulary, arguments):
    listener = Listener()
    processor = StepBoundaryLogitsProcessor(vocabulary, listener, tokenizer=tokenizer)
    prompt = encode(tokenizer, "Q<think>A thought. A thought. A")

    def wanted(row, text):  # several next tokens, so that rows part
        options = [". And so on. ", " thought. ", "</think>", "?\n\nWell, "]
        return [option[len(text) % len(option) :][:9] for option in options]

    output = generate(model, tokenizer, prompt, [Wishes(tokenizer, wanted), processor], max_new_tokens=40, **arguments)
    processor.finish(output)
    for row in range(len(output)):
        steps = told_steps(tokenizer, vocabulary, output[row])
        assert processor.records[row] == vocabulary.scan(output[row].tolist())[-1]
        if arguments.get("do_sample") and "num_beams" not in arguments:
            assert listener.of(row) == steps[-len(listener.of(row)) :]
        elif "num_beams" not in arguments:
            assert set(steps[2:]) <= set(listener.of(row))
    assert listener.calls


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_rows_that_trade_places_and_lose_tokens(vocabulary, tokenizer, rows):
    chooser = random.Random(rows)
    prompt = tokenizer.encode("Q<think>", add_special_tokens=False)
    alphabet = [*tokenizer.encode("abc. \n?5", add_special_tokens=False), *prompt[1:]]
    alphabet += tokenizer.encode("</think><eos>", add_special_tokens=False)
    follower = StepFollower(vocabulary, None, None)
    now = [list(prompt) for _ in range(rows)]
    told: list[int] = []
    for step in range(80):
        new = follower.follow(torch.tensor(now))
        told.append(sum(len(row) - 1 for row in new))
        for row, records in zip(now, new, strict=True):
            whole = vocabulary.scan(row)
            assert records[-1] == whole[-1]
            assert records == whole[len(whole) - len(records) :]
        if step % 10 == 9:  # as after a rejected draft
            keep = chooser.randint(len(prompt) + 1, len(now[0]))
            now = [row[:keep] for row in now]
        parents = [chooser.randrange(rows) for _ in range(rows)] if step % 3 else range(rows)
        now = [[*now[parent], chooser.choice(alphabet)] for parent in parents]
    assert told[:3] == [0, rows, rows]


def test_a_processor_serves_one_generation_after_another(model, tokenizer, vocabulary):
    listener = Listener()
    processor = StepBoundaryLogitsProcessor(vocabulary, listener, tokenizer=tokenizer)
    for question in ("Q<think>", "Q<think>", "Another<think>", "Q<think>First I add both. Then<think>"):
        listener.calls.clear()
        prompt = encode(tokenizer, question)
        output = generate(model, tokenizer, prompt, [Wishes(tokenizer, script(TEXT)), processor])
        processor.finish(output)
        expected = told_steps(tokenizer, vocabulary, output[0])
        assert listener.of(0) == expected[-6:]
    # The next turn: the rows go on, but by more than one token.
    listener.calls.clear()
    prompt = torch.cat((output, encode(tokenizer, "Next<think>Hm, well. ")), 1)
    output = generate(model, tokenizer, prompt, [Wishes(tokenizer, script(TEXT)), processor])
    processor.finish(output)
    assert [step[1] for step in listener.of(0)] == [2] * 7  # one was open at the end of the prompt


def test_implicit_thinking_starts_at_the_end_of_the_prompt(model):
    tokenizer = byte_level_tokenizer()
    config = {"implicit_thinking": True, "summary_start": "So it is", "min_step_chars": 8}
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, config)
    listener = Listener()
    processor = StepBoundaryLogitsProcessor(vocabulary, listener, tokenizer=tokenizer)
    prompt = encode(tokenizer, "What is it now? Tell me.")
    text = "Some thought here. Another one there. So it is 5.\n\nBye."
    output = generate(model, tokenizer, prompt, [Wishes(tokenizer, script(text)), processor])
    processor.finish(output)
    expected = told_steps(tokenizer, vocabulary, output[0], prompt.shape[1])
    assert listener.of(0) == expected
    assert [step[0] for step in expected] == ["thinking"] * 3 + ["summary"] * 2
    streamer = StepStreamer(tokenizer, vocabulary, timeout=60)
    generate(model, tokenizer, prompt, [Wishes(tokenizer, script(text))], streamer=streamer)
    assert [(step.label, step.round, step.index, step.text) for step in streamer] == expected


# Budgets.
THOUGHTS = "This is a thought. And so is this one. "


def thinks_on(row, text):
    """Goes on thinking for ever."""
    return [THOUGHTS[len(text) % len(THOUGHTS) :]]


def wants_to_stop(row, text):
    """Wants nothing but to stop; where it must not, it thinks."""
    return ["<eos>"] if "</think>" in text else ["</think>", "<eos>", *thinks_on(row, text)]


def thinking_of(tokenizer, vocabulary, ids, prompt_length=None):
    steps = segment_trace(tokenizer, ids, vocabulary, prompt_length).steps
    return [step.text.strip() for step in steps if step.label == "thinking"]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_max_steps(model, tokenizer, vocabulary, count):
    prompt = encode(tokenizer, "Q<think>\n")
    processors = [Wishes(tokenizer, thinks_on), StepBudgetLogitsProcessor(vocabulary, max_steps=count)]
    output = generate(model, tokenizer, prompt, processors)
    assert tokenizer.decode(output[0]).count("</think>") == 1
    thoughts = thinking_of(tokenizer, vocabulary, output[0])
    assert thoughts == [THOUGHTS[:18], THOUGHTS[19:38]] * (count // 2) + [THOUGHTS[:18]] * (count % 2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_min_steps(model, tokenizer, vocabulary, count):
    prompt = encode(tokenizer, "Q<think>\n")
    processors = [Wishes(tokenizer, wants_to_stop), StepBudgetLogitsProcessor(vocabulary, min_steps=count)]
    output = generate(model, tokenizer, prompt, processors)
    length = len(THOUGHTS) * (count // 2) + (18 if count % 2 else -1)
    assert tokenizer.decode(output[0]) == "Q<think>\n" + (THOUGHTS * 3)[:length] + "</think><eos>"
    assert len(thinking_of(tokenizer, vocabulary, output[0])) == count


def test_no_budget_changes_nothing(model, tokenizer, vocabulary):
    prompt = encode(tokenizer, "Q<think>")
    wishes = Wishes(tokenizer, script(TEXT))
    plain = generate(model, tokenizer, prompt, [wishes])
    for budget in ({}, {"min_steps": 4}, {"max_steps": 4}, {"min_steps": 4, "max_steps": 4}):
        bounded = generate(model, tokenizer, prompt, [wishes, StepBudgetLogitsProcessor(vocabulary, **budget)])
        assert torch.equal(bounded, plain)
    # Outside of thinking there is nothing to bound.
    question = encode(tokenizer, "Q")
    wishes = Wishes(tokenizer, script("No thought.<eos>"))
    budget = StepBudgetLogitsProcessor(vocabulary, min_steps=3)
    assert tokenizer.decode(generate(model, tokenizer, question, [wishes, budget])[0]) == "QNo thought.<eos>"


def test_a_budget_for_each_row(model, tokenizer, vocabulary):
    inputs = encode(tokenizer, "Q<think>\n").repeat(3, 1)

    def wanted(row, text):
        return (thinks_on, wants_to_stop, lambda row, text: ["</think>"])[row](row, text)

    processors = [Wishes(tokenizer, wanted), StepBudgetLogitsProcessor(vocabulary, min_steps=1, max_steps=3)]
    output = generate(model, tokenizer, inputs, processors, max_new_tokens=80)
    counts = [len(thinking_of(tokenizer, vocabulary, row)) for row in output]
    assert counts[:2] == [3, 1]
    assert counts[2] >= 1


@pytest.mark.parametrize("arguments", [{"do_sample": True, "num_return_sequences": 4}, {"num_beams": 3}])
def test_a_budget_holds_for_samples_and_beams(model, tokenizer, vocabulary, arguments):
    def wanted(row, text):
        return [*thinks_on(row, text), ". A", " B", "?\n\n"]

    class Cool(Wishes):
        def __call__(self, input_ids, scores):
            return (super().__call__(input_ids, scores).clamp(min=400) / 40).log_softmax(-1)

    processors = [Cool(tokenizer, wanted), StepBudgetLogitsProcessor(vocabulary, min_steps=2, max_steps=2)]
    output = generate(model, tokenizer, encode(tokenizer, "Q<think>"), processors, max_new_tokens=100, **arguments)
    ended = [row for row in output if vocabulary.scan(row.tolist())[-1][Field.SEGMENT] != 1]
    assert ended
    for row in output:
        assert len(thinking_of(tokenizer, vocabulary, row)) <= 2
    for row in ended:
        assert len(thinking_of(tokenizer, vocabulary, row)) == 2


@pytest.mark.parametrize("special", [["<think>", "</think>"], []], ids=["token", "text"])
def test_a_budget_holds_for_drafts(model, special):
    tokenizer = byte_level_tokenizer(special=special)
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, {"min_step_chars": 8})
    prompt = encode(tokenizer, f"{THOUGHTS}{THOUGHTS}</think><think>")
    outputs = []
    for arguments in ({}, {"prompt_lookup_num_tokens": 5}):
        processors = [Wishes(tokenizer, thinks_on), StepBudgetLogitsProcessor(vocabulary, min_steps=3, max_steps=3)]
        outputs.append(generate(model, tokenizer, prompt, processors, max_new_tokens=90, **arguments))
    plain, drafted = outputs
    assert torch.equal(drafted[:, : plain.shape[1]], plain)  # some releases draft a token past the limit
    assert len(thinking_of(tokenizer, vocabulary, plain[0])) == 3


@pytest.mark.parametrize("pieces", [[], [b"</", b"think"]], ids=["bytes", "pieces"])
def test_budgets_with_a_marker_of_several_tokens(model, pieces):
    tokenizer = byte_level_tokenizer(pieces)
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, {"min_step_chars": 8})
    if pieces:
        vocabulary.marker_ids[2] = [ids_of(tokenizer, [*pieces, b">"])]
    prompt = encode(tokenizer, "Q<think>")
    budget = StepBudgetLogitsProcessor(vocabulary, max_steps=2)
    output = generate(model, tokenizer, prompt, [Wishes(tokenizer, thinks_on), budget], max_new_tokens=80)
    assert thinking_of(tokenizer, vocabulary, output[0]) == [THOUGHTS[:18], THOUGHTS[19:38]]
    assert tokenizer.decode(output[0]).startswith("Q<think>" + THOUGHTS[:39] + "</think>")

    def wants_the_marker(row, text):
        written = max(size for size in range(8) if text.endswith("</think>"[:size]))
        return ["</think>"[written:], *thinks_on(row, text)]

    budget = StepBudgetLogitsProcessor(vocabulary, min_steps=2)
    output = generate(model, tokenizer, prompt, [Wishes(tokenizer, wants_the_marker), budget], max_new_tokens=80)
    records = vocabulary.scan(output[0].tolist())
    ends = [record for record in records if record[Field.SEGMENT] == 2]
    assert not ends or ends[0][Field.THINKING_STEPS] >= 2
    if pieces:
        # The first of its tokens is ruled out too: thinking is not led astray.
        scores = torch.zeros(1, WIDTH)
        budget = StepBudgetLogitsProcessor(vocabulary, min_steps=1)
        banned = (budget(encode(tokenizer, "Q<think>A tho"), scores)[0] == -torch.inf).nonzero().flatten()
        assert banned.tolist() == sorted([tokenizer.eos_token_id, *ids_of(tokenizer, [b"</"])])
        assert budget(encode(tokenizer, "Q<think>A thought."), scores).max() == 0 == budget.records[0][Field.IN_HEADER]


def test_a_budget_with_other_ids_for_the_end(model, tokenizer, vocabulary):
    ids = tokenizer.encode("\n\nEnough.\n</think>\n", add_special_tokens=False)
    with pytest.raises(StepFlowInputError, match="must end in a summary-start marker"):
        StepBudgetLogitsProcessor(vocabulary, max_steps=1, summary_ids=ids)
    budget = StepBudgetLogitsProcessor(vocabulary, max_steps=1, summary_ids=ids[:-1])
    output = generate(model, tokenizer, encode(tokenizer, "Q<think>"), [Wishes(tokenizer, thinks_on), budget])
    assert "This is a thought. \n\nEnough.\n</think>" in tokenizer.decode(output[0])


def test_a_budget_with_message_headers():
    special = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    tokenizer = byte_level_tokenizer(special=special)
    config = {"thinking_start": "<|channel|>analysis<|message|>", "summary_start": "<|channel|>final<|message|>"}
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, config)
    budget = StepBudgetLogitsProcessor(vocabulary, min_steps=2)
    scores = torch.zeros(1, WIDTH)

    def banned(text):
        ids = (budget(encode(tokenizer, text), scores)[0] == -torch.inf).nonzero().flatten()
        return tokenizer.convert_ids_to_tokens(ids.tolist())

    opening = "<|channel|>analysis<|message|>"
    assert banned("Q") == []
    assert banned(opening + "One long thought. Two") == ["<eos>", *special]
    assert banned(opening + "One long thought.<|end|><|start|>assistant") == ["<eos>"]
    assert banned(opening + "One long thought.<|end|><|channel|>final") == ["<eos>", "<|message|>"]
    assert banned(opening + "One long thought.<|end|><|channel|>commentary") == ["<eos>"]
    assert banned(opening + "One long thought. Two long thoughts.") == []


def test_a_budget_without_markers(model):
    tokenizer = byte_level_tokenizer()
    config = {"implicit_thinking": True, "summary_start": "The answer is", "min_step_chars": 8}
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, config)
    budget = StepBudgetLogitsProcessor(vocabulary, max_steps=2)
    prompt = encode(tokenizer, "Question")
    output = generate(model, tokenizer, prompt, [Wishes(tokenizer, thinks_on), budget], max_new_tokens=80)
    assert thinking_of(tokenizer, vocabulary, output[0], 8) == [THOUGHTS[:18], THOUGHTS[19:38], "The answer is"]
    config["summary_start"] = None
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, config)
    with pytest.raises(StepFlowInputError, match="no marker that could end thinking"):
        StepBudgetLogitsProcessor(vocabulary, max_steps=2)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"min_steps": -1}, "min_steps must be an integer of at least 0, got -1"),
        ({"max_steps": -2}, "max_steps must be an integer of at least 0, got -2"),
        ({"min_steps": 1.5}, "min_steps must be an integer"),
        ({"min_steps": 3, "max_steps": 2}, r"min_steps \(3\) must not be greater than max_steps \(2\)"),
    ],
)
def test_a_wrong_budget_is_refused(vocabulary, budget, message):
    with pytest.raises(StepFlowInputError, match=message):
        StepBudgetLogitsProcessor(vocabulary, **budget)


def test_a_vocabulary_is_needed(tokenizer):
    with pytest.raises(StepFlowInputError, match="must be a StepVocabulary") as error:
        StepBoundaryLogitsProcessor(tokenizer)
    assert "from_tokenizer" in error.value.hint


def test_scores_of_another_width(tokenizer, vocabulary):
    budget = StepBudgetLogitsProcessor(vocabulary, min_steps=1, max_steps=1)
    for width in (vocabulary.size - 1, vocabulary.size, WIDTH):
        assert budget(encode(tokenizer, "Q<think>A"), torch.zeros(1, width)).shape == (1, width)


# The streamer.
def test_streamer_in_a_thread(model, tokenizer, vocabulary):
    streamer = StepStreamer(tokenizer, vocabulary, timeout=60)
    prompt = encode(tokenizer, "Q<think>Old thought. Op")
    outputs = []
    for _ in range(2):  # it can be used again

        def run():
            wishes = Wishes(tokenizer, script("en thought. " + TEXT))
            outputs.append(generate(model, tokenizer, prompt, [wishes], streamer=streamer))

        thread = Thread(target=run)
        thread.start()
        steps = list(streamer)
        thread.join(60)
        told = [(step.label, step.round, step.index, step.text) for step in steps]
        assert told == told_steps(tokenizer, vocabulary, outputs[-1][0])[1:]


def test_streamer_gives_the_steps_of_the_prompt(tokenizer):
    streamer = StepStreamer(tokenizer, {"min_step_chars": 8}, skip_prompt=False, timeout=1, skip_special_tokens=True)
    streamer.put(encode(tokenizer, "Q<think>One thought. Two.</think>Three<eos>Again<think>"))
    for token in encode(tokenizer, "Four thoughts. Fi")[0]:
        streamer.put(token[None])
    streamer.put(encode(tokenizer, "ve</think>S"))
    streamer.end()
    assert [(step.round, step.index, step.text.strip()) for step in streamer] == [
        (1, 1, "One thought."),
        (1, 2, "Two."),
        (1, 3, "Three"),
        (2, 1, "Four thoughts."),
        (2, 2, "Five"),
        (2, 3, "S"),
    ]


def test_streamer_waits_no_longer_than_told(tokenizer, vocabulary):
    with pytest.raises(Empty):
        next(StepStreamer(tokenizer, vocabulary, timeout=0.01))


def test_streamer_follows_one_row(tokenizer, vocabulary):
    streamer = StepStreamer(tokenizer, vocabulary)
    with pytest.raises(StepFlowInputError, match="follows one row, got 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))
    streamer.end()
    assert list(streamer) == []
