"""Suppression against explicit masks in a naive float64 forward, and maps against each other where truth is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from hf_stepflow import step_saliency
from hf_stepflow.reasoner import FOLDER, load_reasoner
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.reasoner.prompts import encode_problem
from hf_stepflow.runtime.configuration_stepflow import StepFlowSettings
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.trace import Trace, segment_trace
from hf_stepflow.saliency.faithfulness import MAPS, _areas, measure_faithfulness, rank_correlation
from hf_stepflow.saliency.suppression import suppressed_likelihoods, suppression_effects
from tests.support.flow import byte_tokenizer, encode
from tests.support.saliency_oracle import SaliencyOracle, oracle_map
from tests.support.tiny_models import tiny_model

SHORT = "<|user|> Ann.<|end|><|assistant|><think> Ann has 3 points."
STEPS = StepFlowSettings(min_step_chars=5)
TEXT = "Two eggs?<think>Add one. Then two.\n\nSo now. It is so. And more.</think>Two.\n\nBye."
IDS = encode(TEXT)
TRACE = segment_trace(byte_tokenizer(), IDS, STEPS)


def tokens_of(trace: Trace, step: int) -> list[int]:
    one = trace.steps[step]
    return [place for place in range(one.start, one.end) if trace.step_ids[place] >= 0]


def hidden_by(suppressed: list[int]) -> torch.Tensor:
    """Which keys each query may not see, pair by pair."""
    hidden = torch.zeros(len(IDS), len(IDS), dtype=torch.bool)
    for step in suppressed:
        own = tokens_of(TRACE, step)
        for query in range(len(IDS)):
            for key in own:
                hidden[query, key] = query > own[-1]
    return hidden


def likelihoods(logits: torch.Tensor) -> list[float]:
    """Of each step, token by token."""
    logs = logits.double().log_softmax(-1)
    steps = range(len(TRACE.steps))
    return [math.fsum(float(logs[t - 1, IDS[t]]) for t in tokens_of(TRACE, step) if t > 0) for step in steps]


class Masked(SaliencyOracle):
    """The dense float64 attention, with some keys hidden."""

    hidden: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden, kept = hidden, []
        self(IDS, lambda logits: kept.append(logits.detach()) or logits.sum())
        return kept[0]

    def _attention(self, module, query, key, value, attention_mask, **kwargs):
        return super()._attention(module, query, key, value, attention_mask & ~self.hidden, **kwargs)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "gpt_oss"])
def test_suppression_equals_an_explicit_mask(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    if family in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("eager")
    sets = [[], [1], [2, 4], list(range(len(TRACE.steps)))]
    found = suppressed_likelihoods(model, IDS, TRACE, sets)
    oracle = Masked(model)
    expected = torch.tensor([likelihoods(oracle.logits(hidden_by(one))) for one in sets], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-9, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_effects_equal_four_dimensional_masks_of_transformers() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    causal = torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril()

    def forward(suppressed: list[int]) -> torch.Tensor:
        mask = causal & ~hidden_by(suppressed)
        with torch.no_grad():
            logits = model(torch.tensor([IDS]), attention_mask=mask[None, None], use_cache=False).logits[0]
        return torch.tensor(likelihoods(logits), dtype=torch.float64)

    effects, steps = suppression_effects(model, IDS, TRACE), len(TRACE.steps)
    intact = forward([])
    for step in range(steps):
        changes = intact - forward([step])
        assert torch.allclose(effects[step + 1 :, step], changes[step + 1 :], atol=1e-9, rtol=0)
        assert changes[: step + 1].abs().max() < 1e-12
    assert bool(effects.isnan().equal(torch.ones(steps, steps, dtype=torch.bool).triu()))


@pytest.mark.parametrize("measure", ["attention", "signed"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_other_measures_equal_the_oracle(family: str, measure: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    if family == "gpt_oss":
        model.set_attn_implementation("eager")
    targets = torch.tensor(IDS)
    tokens = SaliencyOracle(model)(
        IDS, lambda logits: torch.nn.functional.cross_entropy(logits[:-1], targets[1:]), measure=measure
    )
    expected = torch.stack([oracle_map(tokens[layer].mean(0), TRACE, "causal") for layer in sorted(tokens)])
    for chunk, layers in ((7, None), (None, [1])):
        found = step_saliency(model, IDS, TRACE, measure=measure, chunk_size=chunk, layers=layers)
        rows = expected if layers is None else expected[layers]
        assert (found.maps - rows).abs().max() < 1e-9 * rows.abs().max()
        assert found.about["measure"] == measure
    if measure == "signed":
        with pytest.raises(StepFlowInputError, match="negative entries"):
            _ = found.indices


def test_the_signed_sum_is_the_first_order_effect() -> None:
    """The loss of a trace, if the weights of one pair of steps shrink a little in one layer."""
    model, step = tiny_model("llama", dtype=torch.float64), 0.02  # norms are float32 inside
    targets = torch.tensor(IDS)

    class Shrunk(SaliencyOracle):
        pair = (4, 2)
        factor = 1.0

        def _bridged(self, layer, weights, visible):
            rows, columns = (tokens_of(TRACE, one) for one in self.pair)
            shrink = torch.ones_like(weights)
            if layer == 1:
                shrink[0, :, torch.tensor(rows)[:, None], torch.tensor(columns)] = self.factor
            return weights * shrink

    def loss_at(factor: float) -> float:
        oracle, kept = Shrunk(model), []
        oracle.factor = factor

        def loss(logits):
            kept.append(torch.nn.functional.cross_entropy(logits[:-1], targets[1:]))
            return kept[0]

        oracle(IDS, loss)
        return float(kept[0].detach())

    slope = (loss_at(1 - step) - loss_at(1 + step)) / (2 * step)
    found = step_saliency(model, IDS, TRACE, measure="signed", per_head=True)
    assert float(found.sums[1, :, 4, 2].sum()) == pytest.approx(slope, rel=5e-3)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=9))
def test_rank_correlation_is_spearmans(pairs: list) -> None:
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic)


def test_a_trace_of_the_reasoner() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32"), load_reasoner()[1]
    prompt, response = encode_problem(tokenizer, problems_of("chains-4", "test", 1)[0])
    ids = prompt + response
    with pytest.raises(StepFlowInputError, match="points must be"):
        measure_faithfulness(model, ids, tokenizer=tokenizer, points=0)
    found = measure_faithfulness(model, ids, tokenizer=tokenizer, points=3)
    names = {*MAPS, "random"}
    assert found.thinking.keys() == found.summary.keys() == names
    assert found.deletion.keys() == found.insertion.keys() == names | {"truth"}
    for numbers in (*found.thinking.values(), *found.summary.values()):
        assert len(numbers) == len(found.layers) + 1
        assert all(-1 <= one <= 1 for one in numbers)
    # The best step to lose is the one whose loss costs most.
    assert found.deletion["truth"] <= found.deletion["random"]
    trace = segment_trace(tokenizer, ids)
    summary = [place for place, step in enumerate(trace.steps) if step.label == "summary"]
    thoughts = [place for place, step in enumerate(trace.steps) if step.label == "thinking"]
    (deletion, insertion) = _areas(model, ids, trace, summary, {"order": thoughts}, 2)
    middle, tokens = len(thoughts) / 2, sum(len(tokens_of(trace, step)) for step in summary)
    cut = round(middle)
    sets = [[], thoughts[:cut], thoughts, thoughts[cut:]]
    none, first, whole, second = (suppressed_likelihoods(model, ids, trace, sets)[:, summary].sum(1) / tokens).tolist()
    share = cut / len(thoughts)
    assert deletion["order"] == pytest.approx(share * (none + first) / 2 + (1 - share) * (first + whole) / 2)
    assert insertion["order"] == pytest.approx(share * (whole + second) / 2 + (1 - share) * (second + none) / 2)


def test_too_few_steps_have_no_order() -> None:
    model, tokenizer = load_reasoner()
    with model.disable_stepflow():
        found = measure_faithfulness(model, tokenizer.encode(SHORT), tokenizer=tokenizer)
    assert all(map(math.isnan, found.deletion.values()))
    assert all(math.isnan(one) for row in found.summary.values() for one in row)


def test_bad_input_is_refused() -> None:
    model, tokenizer = load_reasoner()
    ids = tokenizer.encode(SHORT)
    trace = segment_trace(tokenizer, ids)
    with pytest.raises(StepFlowUnsupportedError, match="disable_stepflow"):
        suppression_effects(model, ids, trace)
    with model.disable_stepflow():
        with pytest.raises(StepFlowInputError, match=r"steps 0 to 1, got \[2\]"):
            suppressed_likelihoods(model, ids, trace, [[2]])
        with pytest.raises(StepFlowInputError, match="tokens of the trace, got"):
            suppressed_likelihoods(model, ids[1:], trace, [[]])
        with pytest.raises(StepFlowInputError, match="takes one trace, got 2"):
            measure_faithfulness(model, [ids, ids], tokenizer=tokenizer)
    with pytest.raises(StepFlowInputError, match="measure must be one of saliency, attention, signed, got 'truth'"):
        step_saliency(model, ids, trace, measure="truth")
