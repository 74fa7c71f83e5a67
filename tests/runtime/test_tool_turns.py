"""Tool calls and results between thoughts: their segments in one pass, token by token, and in rounds of generate."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

from hf_stepflow.runtime.flow_state import state_of
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.step_detector import Feature, Field, StepVocabulary, empty_record
from hf_stepflow.runtime.trace import segment_trace
from tests.support.flow import error, logits_of, oracle_settings
from tests.support.oracles import OracleStepFlow, OracleTrace
from tests.support.step_tokenizers import byte_level_tokenizer
from tests.support.tiny_models import tiny_model

STRONG = StepFlowSettings(min_step_chars=5, tau_max=0.4, alpha=0.5, oeb_layers="bottom:0.5", smi_layers="top:0.5")


@dataclass
class Transcript:
    """A conversation with tools.

    Attributes:
        special: added tokens that are special.
        added: added tokens that are not.
        eos: the tokenizer's end-of-sequence token.
        ends: further tokens that end what the model generates.
        turns: what it is given and what it writes, in turns.
        told: label, round, index and text of every step of thinking and summary.
        context: round and text of what has to be labelled question.
        config: step settings.
    """

    special: tuple[str, ...]
    added: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    turns: list[str]
    told: list[tuple[str, int, int, str]]
    context: list[tuple[int, str]]
    config: dict = field(default_factory=dict)

    @property
    def tokenizer(self):
        return byte_level_tokenizer(special=self.special, added=self.added, eos=self.eos)

    def ids(self) -> list[list[int]]:
        tokenizer = self.tokenizer
        return [tokenizer.encode(turn, add_special_tokens=False) for turn in self.turns]

    def end_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids([self.eos, *self.ends])


CHATML = ("<|im_start|>",)
QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CALL = '\n<tool_call>\n{"name": "sky"}\n</tool_call>'
RESPONSE = "\n<|im_start|>user\n<tool_response>\nIt is clear. No rain.\n</tool_response><|im_end|>\n"
OPENING = "<|im_start|>user\nWill it rain?<|im_end|>\n<|im_start|>assistant\n"
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>")
HARMONY = {
    "thinking_start": "<|channel|>analysis<|message|>",
    "summary_start": "<|channel|>final<|message|>",
}
ASKED = "<|start|>user<|message|>Will it rain?<|end|><|start|>assistant"

TRANSCRIPTS = {
    # Each turn of the assistant thinks: the result comes in a user's turn, and the next thinking is another round.
    "qwen3": Transcript(
        CHATML,
        QWEN,
        "<|im_end|>",
        (),
        [
            OPENING,
            "<think>\nI must look it up. The sky tool.\n</think>\n" + CALL + "<|im_end|>",
            RESPONSE + "<|im_start|>assistant\n",
            "<think>\nIt says clear. So it is dry.\n</think>\n\nNo rain.<|im_end|>",
        ],
        [
            ("thinking", 1, 1, "I must look it up."),
            ("thinking", 1, 2, "The sky tool."),
            ("summary", 1, 3, CALL.strip()),
            ("thinking", 2, 1, "It says clear."),
            ("thinking", 2, 2, "So it is dry."),
            ("summary", 2, 3, "No rain."),
        ],
        [
            (1, "<tool_response>\nIt is clear. No rain.\n</tool_response>"),
        ],
    ),
    # Calls and results inside one thinking, whose markers the settings name: the round goes on, and so do its steps.
    "inside the thinking": Transcript(
        CHATML,
        QWEN,
        "<|im_end|>",
        ("</tool_call>",),
        [
            OPENING,
            "<think>\nI must look it up. The sky tool.\n<tool_call>\nsky. It is new. Ok\n</tool_call>",
            "\n<tool_response>\nNo rain. They say </think> and <think>.\n</tool_response>\n",
            "So it is dry. I am sure.\n</think>\n\nNo rain.<|im_end|>",
        ],
        [
            ("thinking", 1, 1, "I must look it up."),
            ("thinking", 1, 2, "The sky tool."),
            ("thinking", 1, 3, "So it is dry."),
            ("thinking", 1, 4, "I am sure."),
            ("summary", 1, 5, "No rain."),
        ],
        [
            (1, "sky. It is new. Ok"),
            (1, "No rain. They say </think> and <think>."),
        ],
        {
            "tool_start": ["<tool_call>", "<tool_response>"],
            "tool_end": ["</tool_call>", "</tool_response>"],
        },
    ),
    # A call ends what is generated, but not the round: its result is a message between two of the same thinking.
    "gpt-oss": Transcript(
        HARMONY_TOKENS,
        (),
        "<|return|>",
        ("<|call|>",),
        [
            ASKED,
            "<|channel|>analysis<|message|>I must look it up. The sky tool.<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.sky <|constrain|>json<|message|>{}<|call|>",
            "<|start|>functions.sky to=assistant<|channel|>commentary<|message|>It is clear. No rain.<|end|>"
            "<|start|>assistant",
            "<|channel|>analysis<|message|>So it is dry.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>No.<|return|>",
        ],
        [
            ("thinking", 1, 1, "I must look it up."),
            ("thinking", 1, 2, "The sky tool."),
            ("thinking", 1, 3, "So it is dry."),
            ("summary", 1, 4, "No."),
        ],
        [
            (1, "{}"),
            (1, "It is clear. No rain."),
        ],
        HARMONY,
    ),
    # The answer right after the result: its bridge is the thinking before the call.
    "gpt-oss, answered at once": Transcript(
        HARMONY_TOKENS,
        (),
        "<|return|>",
        ("<|call|>",),
        [
            ASKED,
            "<|channel|>analysis<|message|>I must look it up.<|end|><|start|>assistant to=functions.sky<|channel|>"
            "commentary json<|message|>{}<|call|>",
            "<|start|>functions.sky to=assistant<|channel|>commentary<|message|>No rain.<|end|><|start|>assistant",
            "<|channel|>final<|message|>No.<|return|>",
        ],
        [
            ("thinking", 1, 1, "I must look it up."),
            ("summary", 1, 2, "No."),
        ],
        [
            (1, "{}"),
            (1, "No rain."),
        ],
        HARMONY,
    ),
    # Tools whose calls and results come in the channel of the thinking: the whole header tells who speaks.
    "gpt-oss, tools of the analysis channel": Transcript(
        HARMONY_TOKENS,
        (),
        "<|return|>",
        ("<|call|>",),
        [
            ASKED,
            "<|channel|>analysis<|message|>I must count it.<|end|><|start|>assistant to=python<|channel|>analysis"
            "<|message|>print(7)<|call|>",
            "<|start|>python to=assistant<|channel|>analysis<|message|>7<|end|><|start|>assistant",
            "<|channel|>analysis<|message|>It is seven.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>7.<|return|>",
        ],
        [
            ("thinking", 1, 1, "I must count it."),
            ("thinking", 1, 2, "It is seven."),
            ("summary", 1, 3, "7."),
        ],
        [
            (1, "print(7)"),
            (1, "7"),
        ],
        {
            "thinking_start": "<|start|>assistant<|channel|>analysis<|message|>",
            "summary_start": HARMONY["summary_start"],
        },
    ),
}


@pytest.fixture(params=TRANSCRIPTS)
def transcript(request) -> Transcript:
    return TRANSCRIPTS[request.param]


def settings_of(transcript: Transcript) -> StepFlowSettings:
    return STRONG.replace(**transcript.config)


def vocabulary_of(transcript: Transcript) -> StepVocabulary:
    return StepVocabulary.from_tokenizer(
        transcript.tokenizer, settings_of(transcript), end_of_turn_ids=transcript.end_ids()
    )


def test_tool_results_are_context(transcript: Transcript) -> None:
    ids = [token for turn in transcript.ids() for token in turn]
    trace = segment_trace(transcript.tokenizer, ids, vocabulary_of(transcript))
    told = [(step.label, step.round, step.index, step.text.strip()) for step in trace.steps]
    assert [one for one in told if one[0] != "question"] == transcript.told
    questions = [(one[1], one[3]) for one in told if one[0] == "question"]
    assert questions[0][0] == 0
    for number, text in [(0, "Will it rain?"), *transcript.context]:
        assert any(number == known and text in whole for known, whole in questions)


def test_turns_and_tokens_one_by_one_agree(transcript: Transcript) -> None:
    vocabulary, turns = vocabulary_of(transcript), transcript.ids()
    whole = vocabulary.scan([token for turn in turns for token in turn])
    records: list[list[int]] = []
    for turn in turns:
        records += vocabulary.scan(turn, records[-1] if records else None, start=len(records))
    assert records == whole
    record = torch.tensor([empty_record()])
    for slot, token in enumerate([token for turn in turns for token in turn]):
        record = vocabulary.advance(record, torch.tensor([token]), slot)
        assert record[0].tolist() == whole[slot]


class Says(LogitsProcessor):
    """Makes a model write given ids."""

    def __init__(self, ids: list[int]):
        self.ids = ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.ids[input_ids.shape[1]]] = 0.0
        return allowed


@pytest.fixture(scope="module")
def models():
    """One model a family: float64, since experts change with rounding."""
    return {
        "qwen3": tiny_model("qwen3", dtype=torch.float64),
        "gpt_oss": tiny_model("gpt_oss", dtype=torch.float64, attn_implementation="eager"),
    }


def test_rounds_of_generate_agree_with_one_pass(transcript: Transcript, models) -> None:
    """Prompt, thoughts, call; the result is appended to the cache; thoughts, answer: labels and logits of one pass."""
    model = models["gpt_oss" if transcript.eos == "<|return|>" else "qwen3"]
    model.generation_config.eos_token_id = transcript.end_ids()
    turns, tokenizer = transcript.ids(), transcript.tokenizer
    whole = [token for turn in turns for token in turn]
    StepFlowModelForCausalLM.attach(model, settings_of(transcript), tokenizer=tokenizer)
    try:
        cache, logits = DynamicCache(config=model.config), []
        ids = torch.empty(1, 0, dtype=torch.long)
        for given, written in zip(turns[::2], turns[1::2], strict=True):
            ids = torch.cat((ids, torch.tensor([given])), 1)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                logits_processor=[Says(whole)],
                max_new_tokens=100,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            assert output.sequences[0, ids.shape[1] :].tolist() == written  # an end of turn stopped it
            ids = output.sequences
            logits += output.logits
        vocabulary = model.stepflow_runtime.rules.vocabulary
        expected = vocabulary.scan(whole)
        state = state_of(cache)
        assert state.count == len(whole) - 1  # the last token has not been read yet
        assert state.records[0, : state.count].tolist() == expected[:-1]
        assert [record[Field.LABEL] for record in expected] == [
            record[Field.LABEL] for record in vocabulary_of(transcript).scan(whole)
        ]
        with torch.no_grad():
            at_once = model(torch.tensor([whole]), use_cache=False).logits[0]
    finally:
        model.detach_stepflow()
    written = [
        place - 1
        for start, turn in zip([sum(map(len, turns[:i])) for i in range(1, len(turns), 2)], turns[1::2], strict=True)
        for place in range(start, start + len(turn))
    ]
    assert error(torch.cat(logits), at_once[written]) < 1e-6  # generate gives them out in float32


@pytest.mark.parametrize("scope", ["segment", "step"])
def test_attention_takes_results_for_the_bridge(scope: str, models) -> None:
    """Against the naive oracle, which reads nothing but the labels."""
    model = models["qwen3"]
    tokenizer = byte_level_tokenizer(special=("<think>", "</think>"), added=("<tool>", "</tool>"))
    settings = STRONG.replace(tool_start="<tool>", tool_end="</tool>", bridge_scope=scope)
    text = "Q<think>Look up. Now.<tool>No. Dry</tool>So dry. Yes</think>No."
    ids = tokenizer.encode(text, add_special_tokens=False)
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, settings)
    trace = segment_trace(tokenizer, ids, vocabulary)
    control = [bool(vocabulary.features[token, Feature.CONTROL]) for token in ids]
    told = OracleTrace(trace.segment_ids.tolist(), trace.round_ids.tolist(), trace.step_ids.tolist(), control)
    expected = OracleStepFlow(model, oracle_settings(model, settings))(torch.tensor([ids]), told)
    StepFlowModelForCausalLM.attach(model, settings, tokenizer=tokenizer)
    try:
        got = logits_of(model, torch.tensor([ids]))
        assert error(got, torch.cat((expected, expected))) <= 1e-6  # the model's norms are in float32
    finally:
        model.detach_stepflow()


def test_what_a_result_quotes_opens_and_ends_nothing() -> None:
    """Markers inside a tool's result, or the pattern that starts the answer where there are no markers."""
    tokenizer = byte_level_tokenizer(special=("<think>", "</think>"), added=("<tool>", "</tool>"))
    tools = {"tool_start": "<tool>", "tool_end": "</tool>", "min_step_chars": 0}
    text = "Q<think>Look.<tool>a</think>b<think>c</tool>Seen.</think>A"
    trace = segment_trace(tokenizer, tokenizer.encode(text, add_special_tokens=False), tools)
    assert [(step.label, step.index, step.text) for step in trace.steps] == [
        ("question", 0, "Q"),
        ("thinking", 1, "Look."),
        ("question", 0, "a</think>b<think>c"),
        ("thinking", 2, "Seen."),
        ("summary", 3, "A"),
    ]
    implicit = tools | {"implicit_thinking": True, "summary_start": "The answer is"}
    ids = tokenizer.encode("Q. Look.<tool>The answer is 3.</tool>No. The answer is 4.", add_special_tokens=False)
    trace = segment_trace(tokenizer, ids, implicit, prompt_length=2)
    assert [(step.label, step.index, step.text.strip()) for step in trace.steps if step.text.strip()] == [
        ("question", 0, "Q."),
        ("thinking", 1, "Look."),
        ("question", 0, "The answer is 3."),
        ("thinking", 2, "No."),
        ("thinking", 3, "The answer is"),
        ("summary", 4, "4."),
    ]


def test_a_result_that_is_never_closed_ends_with_the_turn() -> None:
    tokenizer = byte_level_tokenizer(special=("<think>", "</think>"))
    tools = {"tool_start": "<tool>", "tool_end": "</tool>"}
    ids = tokenizer.encode("Q<think>T<tool>a</think>b<eos>R<think>U</think>A", add_special_tokens=False)
    trace = segment_trace(tokenizer, ids, tools)
    assert trace.segment_ids.tolist() == [0, 0, 1] + [1] * 6 + [0] * 4 + [0, 0, 1, 1, 2]
    assert trace.round_ids.tolist()[-3:] == [2, 2, 2]
