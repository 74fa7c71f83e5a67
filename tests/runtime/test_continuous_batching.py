"""Continuous batching: what `generate_batch` makes of many requests is what `generate` makes of each."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_stepflow import StepFlowModelForCausalLM, load_reasoner
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.runtime import paged
from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.step_detector import Field
from tests.support.flow import TRACES, TWO_ROUNDS, VARIANTS, attached, byte_tokenizer, encode, oracle_logits
from tests.support.tiny_models import tiny_model

IS_FOLLOWED = importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is not None
needs_release = pytest.mark.skipif(not IS_FOLLOWED, reason="StepFlow follows continuous batching of transformers 5.23")
TOLERANCE = 1e-4
LENGTH = 24
# They end in the question, in thinking, in the summary, or have two rounds; some begin alike.
PROMPTS = [
    encode(TRACES[0][:60]),
    encode(TRACES[0]),
    encode(TRACES[1][:30]),
    encode(TRACES[2]),
    encode(TRACES[3]),
    encode(TRACES[0][:44]),
    encode(TWO_ROUNDS[:120]),
    encode(TRACES[0][:75] + " No."),
]
# Blocks that no prompt fills exactly, and passes that hold several requests, or cut one into chunks.
PASSES = {"whole": {"max_batch_tokens": 1024}, "chunks": {"max_batch_tokens": 16}}
CASES = [
    ("qwen3", "paper"),  # grouped queries
    ("qwen3", "step"),
    ("qwen3", "implicit"),
    ("llama", "absolute"),
    ("qwen2", "heads"),
    ("smollm3", "temperature"),
    ("gemma3_text", "paper"),  # layers with a window of 16 tokens, and one without
]


@dataclass
class Made:
    """What was generated for a prompt."""

    tokens: list[int]
    logprobs: list[float]


def one_by_one(model, prompts: list[list[int]], length: int = LENGTH, eos: int | None = None) -> list[Made]:
    """What `generate` makes of each prompt alone."""
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": length, "eos_token_id": eos, "pad_token_id": 0}
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **options
        )
        tokens = output.sequences[0, len(prompt) :].tolist()
        scores = [logits[0].float().log_softmax(-1) for logits in output.logits]
        made.append(Made(tokens, [float(score[token]) for score, token in zip(scores, tokens, strict=True)]))
    return made


def settings_of_batch(**options) -> ContinuousBatchingConfig:
    given = {"num_blocks": 400, "page_size": 8, "max_batch_tokens": 1024, "return_logprobs": True}
    return ContinuousBatchingConfig(**given | options)


def how(length: int = LENGTH, eos: int | None = None, **options) -> GenerationConfig:
    given = {"do_sample": False, "max_new_tokens": length, "eos_token_id": -1 if eos is None else eos}
    return GenerationConfig(**given | {"pad_token_id": 0} | options)


def batched(model, prompts: list[list[int]], config=None, generation=None, **options) -> list[Made]:
    """What `generate_batch` makes of the prompts."""
    results = model.generate_batch(
        prompts,
        generation_config=generation or how(),
        continuous_batching_config=config or settings_of_batch(),
        **options,
    )
    assert all(result.error is None for result in results.values())
    return [Made(result.generated_tokens, result.logprobs) for result in results.values()]


def difference(found: list[Made], expected: list[Made]) -> float:
    """The largest difference of log probabilities; the streams must be equal."""
    assert [made.tokens for made in found] == [made.tokens for made in expected]
    pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a.logprobs, b.logprobs, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def shift(some: list[Made], others: list[Made]) -> float:
    """The largest difference of log probabilities up to where the streams part."""
    found = [0.0]
    for a, b in zip(some, others, strict=True):
        for place, same in enumerate(x == y for x, y in zip(a.tokens, b.tokens, strict=False)):
            found.append(abs(a.logprobs[place] - b.logprobs[place]))
            if not same:
                break
    return max(found)


def teacher_forced(model, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log probabilities of tokens after a prompt, in one pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), use_cache=False, prompt_length=len(prompt)).logits[0]
    scores = logits.log_softmax(-1)
    return [float(scores[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def model():
    return attached("qwen3", "paper", "sdpa")


@pytest.fixture(scope="module")
def expected(model) -> list[Made]:
    return one_by_one(model, PROMPTS)


@needs_release
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_tiny_models(family, variant, passes):
    model = attached(family, variant, "sdpa")
    alone = one_by_one(model, PROMPTS)
    with model.disable_stepflow():
        base = one_by_one(model, PROMPTS)
        assert difference(batched(model, PROMPTS, settings_of_batch(**PASSES[passes])), base) < TOLERANCE
    assert shift(alone, base) > 50 * TOLERANCE
    assert difference(batched(model, PROMPTS, settings_of_batch(**PASSES[passes])), alone) < TOLERANCE


@needs_release
def test_the_oracle_agrees(model):
    prompt = PROMPTS[0]
    (found, _) = batched(model, [prompt, PROMPTS[2]], settings_of_batch(max_batch_tokens=16))
    scores = oracle_logits(tiny_model("qwen3"), prompt + found.tokens, VARIANTS["paper"]).log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + LENGTH - 1)
    for place, token, logprob in zip(places, found.tokens, found.logprobs, strict=True):
        assert abs(float(scores[place, token]) - logprob) < TOLERANCE


@needs_release
def test_the_reasoner():
    strong = {"tau_max": 0.4, "alpha": 0.5, "oeb_layers": "bottom:0.5", "smi_layers": "top:0.5"}
    model, tokenizer = load_reasoner(strong)
    problems = [problem for level in ("chains-4", "chains-7") for problem in problems_of(level, "test", 3)]
    prompts = [encode_prompt(tokenizer, problem.question) for problem in problems]
    length, eos = 70, model.generation_config.eos_token_id
    alone = one_by_one(model, prompts, length, eos)
    for passes in PASSES.values():
        config = settings_of_batch(**passes)
        assert difference(batched(model, prompts, config, how(length, eos)), alone) < TOLERANCE
    with model.disable_stepflow():
        base = one_by_one(model, prompts, length, eos)
        assert difference(batched(model, prompts, config, how(length, eos)), base) < TOLERANCE
    assert [made.tokens for made in alone] != [made.tokens for made in base]


@needs_release
def test_shared_prefixes(model, expected, monkeypatch):
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    shared = []
    search = PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        PagedAttentionCache,
        "search_prefix_match",
        lambda *arguments: shared.append(search(*arguments)) or shared[-1],
    )
    try:
        for _ in range(2):
            assert difference(batched(model, PROMPTS, persistent_manager=True), expected) < TOLERANCE
        # Every full block of every prompt but the last token's.
        assert sum(shared[-len(PROMPTS) :]) > 0.8 * sum(map(len, PROMPTS))
        continued = [prompt + made.tokens for prompt, made in zip(PROMPTS, expected, strict=True)]
        alone = one_by_one(model, continued)
        assert difference(batched(model, continued, persistent_manager=True), alone) < TOLERANCE
        with model.disable_stepflow(), pytest.raises(StepFlowInputError, match="destroy_cached"):
            batched(model, PROMPTS)
        with pytest.raises(StepFlowInputError, match="other settings"), model.use_stepflow({"tau_max": 0.1}):
            batched(model, PROMPTS)
    finally:
        model.destroy_cached_continuous_batching_manager()


@needs_release
def test_implicit_thinking_shares_no_prefix():
    # What one request generates is prompt of the next: the same tokens are thinking there, and question here.
    model = attached("qwen3", "implicit", "sdpa")
    try:
        first = batched(model, PROMPTS, persistent_manager=True)
        continued = [prompt + made.tokens for prompt, made in zip(PROMPTS, first, strict=True)]
        alone = one_by_one(model, continued)
        assert difference(batched(model, continued, persistent_manager=True), alone) < TOLERANCE
    finally:
        model.destroy_cached_continuous_batching_manager()


def forked(model) -> list[Made]:
    """Three samples of each prompt, which share its blocks."""
    generation = how(do_sample=True, num_return_sequences=3)
    return batched(model, PROMPTS, settings_of_batch(seed=0), generation)


@needs_release
def test_forks(model):
    found = forked(model)
    assert len({(number // 3, *made.tokens) for number, made in enumerate(found)}) > 2 * len(PROMPTS)
    for number, made in enumerate(found):
        again = teacher_forced(model, PROMPTS[number // 3], made.tokens)
        assert max(abs(a - b) for a, b in zip(again, made.logprobs, strict=True)) < TOLERANCE


@needs_release
def test_forks_without_their_records_raise_an_error(model, monkeypatch):
    monkeypatch.setattr(paged.PagedRecords, "copy_blocks", lambda records, *blocks: records._copy_keys(*blocks))
    with pytest.raises(StepFlowUnsupportedError, match="filled or moved without StepFlow"):
        forked(model)


@needs_release
@pytest.mark.parametrize("variant", ["paper", "implicit"])
def test_requests_that_are_put_off_begin_again(variant, monkeypatch):
    from transformers.generation.continuous_batching.requests import RequestState

    again = []
    begin = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: again.append(state) or begin(state)
    )
    model = attached("qwen3", variant, "sdpa")
    alone = one_by_one(model, PROMPTS)
    found = batched(model, PROMPTS, settings_of_batch(num_blocks=40, max_batch_tokens=64))
    assert any(state.generated_tokens for state in again)
    assert difference(found, alone) < TOLERANCE


@needs_release
def test_settings_in_force_hold_in_the_thread(model, expected):
    with model.use_stepflow({"tau_max": 0.1, "alpha": -0.5}):
        weaker = one_by_one(model, PROMPTS)
        assert difference(batched(model, PROMPTS), weaker) < TOLERANCE
    assert shift(weaker, expected) > 50 * TOLERANCE
    generation = how()
    generation.stepflow = {"tau_max": 0.1, "alpha": -0.5}
    assert difference(batched(model, PROMPTS, generation=generation), weaker) < TOLERANCE
    generation.stepflow = False
    off = batched(model, PROMPTS, generation=generation)
    with model.disable_stepflow():
        assert difference(off, one_by_one(model, PROMPTS)) < TOLERANCE
    with model.use_stepflow({"tau_max": 0.0, "alpha": 0.0}):
        assert difference(batched(model, PROMPTS), off) < TOLERANCE
    assert difference(batched(model, PROMPTS), expected) < TOLERANCE


@needs_release
def test_there_is_no_report(model):
    batched(model, PROMPTS[:2])
    with pytest.raises(StepFlowInputError, match="continuous batching"):
        model.stepflow_report()


@needs_release
def test_detaching_leaves_no_manager():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), VARIANTS["paper"], tokenizer=byte_tokenizer())
    batched(model, PROMPTS[:2], persistent_manager=True)
    base = model.detach_stepflow()
    alone = one_by_one(base, PROMPTS)
    assert difference(batched(base, PROMPTS, settings_of_batch(auto_switch_to_flash=False)), alone) < TOLERANCE


@needs_release
def test_a_record_out_of_place_is_found(model, monkeypatch):
    label = paged.PagedRecords.label

    def misplaced(records, kwargs):
        records.records[:, Field.COUNT] -= 1
        return label(records, kwargs)

    monkeypatch.setattr(paged.PagedRecords, "label", misplaced)
    with pytest.raises(StepFlowUnsupportedError, match="new manager"):
        batched(model, PROMPTS)


@needs_release
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu_offload_space": 0.1}, "cpu_offload_space"),
        ({"cpu_offload_space": None}, "cpu_offload_space"),
        ({"use_cuda_graph": True}, "use_cuda_graph"),
        ({"use_cuda_graph": (False, True)}, "use_cuda_graph"),
        ({"use_async_batching": True}, "use_async_batching"),
        ({"default_compile_level": 1}, "compilation"),
    ],
)
def test_options_that_are_refused(model, options, words):
    with pytest.raises(StepFlowUnsupportedError, match=words) as refused:
        model.generate_batch(PROMPTS, continuous_batching_config=settings_of_batch(**options))
    assert "disable_stepflow" in refused.value.hint


@needs_release
def test_models_that_are_refused():
    with pytest.raises(StepFlowUnsupportedError, match="'eager'") as refused:
        attached("qwen3", "paper", "eager").generate_batch(PROMPTS)
    assert "sdpa" in refused.value.hint
    with pytest.raises(StepFlowUnsupportedError, match="sliding window"):
        attached("mistral", "paper", "sdpa").generate_batch(PROMPTS)


@needs_release
def test_the_config_of_the_call_is_left_alone(model):
    config = settings_of_batch()
    before = dict(vars(config))
    batched(model, PROMPTS[:1], config)
    assert vars(config) == before


def test_a_manager_that_was_made_around_the_model(model):
    """A packed row whose cache holds no records is refused, not read as one sequence."""
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(StepFlowUnsupportedError, match="packed"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 10, ids.shape[1]]))


@pytest.mark.skipif(IS_FOLLOWED, reason="this release is followed")
def test_other_releases_are_refused(model):
    with pytest.raises(StepFlowError, match="transformers"):
        model.init_continuous_batching()
