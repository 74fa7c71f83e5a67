"""Rival methods against their papers' equations, written out here in float64, and as arms of an evaluation."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from hf_stepflow.cli import main
from hf_stepflow.evaluation.arms import Arm, combine_arms, parse_arm
from hf_stepflow.evaluation.emphasis import emphasised_tokens
from hf_stepflow.evaluation.page import write_report
from hf_stepflow.evaluation.rivals import InstABoost, Pasta, Rival, SpotLight, Steering, check_rival, steered
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.store import read_results
from hf_stepflow.problems import load_problems
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner import FOLDER, load_reasoner
from hf_stepflow.runtime.attention import AttentionCall
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.vllm.offline import VllmEngine
from tests.support.flow import byte_tokenizer
from tests.support.tiny_models import tiny_model

PROMPTS = [[5 + (7 * place * (row + 1)) % 300 for place in range(length)] for row, length in enumerate((23, 9, 14))]
PLACES = [list(range(4, 15)), [2, 3, 6], list(range(5, 12))]
NEW = 12
SOME_HEADS = {1: [0, 3], 2: [2]}
METHODS = (Pasta(alpha=0.05), Pasta(alpha=0.2, heads=SOME_HEADS), SpotLight(target=0.6), InstABoost(factor=4.0))
# Grouped queries in all; a window, a softcap and learned sinks.
MODELS = (("qwen3", "sdpa"), ("qwen3", "eager"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"))


def steered_weights(rival: Rival, layer: int, head: int, weights: list[float], emphasised: set[int], n: int) -> list:
    """One row of attention weights after a method, as its paper has it; not normalised, before and after.

    Args:
        rival: The method.
        layer: The layer.
        head: The query head.
        weights: The weights of one query over the keys that it sees, from the first on.
        emphasised: The emphasised keys.
        n: The length of the prompt.
    """
    if isinstance(rival, Pasta):  # alpha A_ij / C_i outside the emphasised part of the input, A_ij / C_i elsewhere
        chosen = rival.heads == "all" or head in rival.heads.get(layer, [])
        outside = [chosen and key < n and key not in emphasised for key in range(len(weights))]
        scaled = [rival.alpha * one if is_outside else one for one, is_outside in zip(weights, outside, strict=True)]
    elif isinstance(rival, SpotLight):  # logits plus log(target / psi) where psi is below the target
        share = sum(one for key, one in enumerate(weights) if key in emphasised) / sum(weights)
        bias = math.log(rival.target / share) if 0 < share < rival.target else 0.0
        scaled = [one * math.exp(bias) if key in emphasised else one for key, one in enumerate(weights)]
    else:  # M A_ij for the instruction
        assert isinstance(rival, InstABoost)
        scaled = [rival.factor * one if key in emphasised else one for key, one in enumerate(weights)]
    return scaled


class Reference:
    """Dense attention of one row without padding and without a cache, with a method, query by query and head by head.

    Attributes:
        rival: The method.
        emphasised: The emphasised keys.
        n: The length of the prompt.
        softcap: Whether the attention applies its softcap: sdpa does not.
    """

    def __init__(self, rival: Rival, emphasised: set[int], n: int, softcap: bool):
        self.rival, self.emphasised, self.n, self.softcap = rival, emphasised, n, softcap

    def __call__(self, module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        (heads, length, _), groups = query.shape[1:], key.shape[1]
        output = torch.zeros(1, length, heads, value.shape[-1], dtype=torch.float64)
        for head in range(heads):
            own = head * groups // heads
            logits = (query[0, head] @ key[0, own].T * scaling).tolist()
            sink = kwargs["s_aux"][head].item() if kwargs.get("s_aux") is not None else None
            for place in range(length):
                first = 0 if sliding_window is None else max(0, place - sliding_window + 1)
                row = logits[place][: place + 1]
                if self.softcap and kwargs.get("softcap") is not None:
                    row = [kwargs["softcap"] * math.tanh(one / kwargs["softcap"]) for one in row]
                powers = [math.exp(one) if at >= first else 0.0 for at, one in enumerate(row)]
                scaled = steered_weights(self.rival, module.layer_idx, head, powers, self.emphasised, self.n)
                total = sum(scaled) + (0.0 if sink is None else math.exp(sink))
                weights = torch.tensor(scaled, dtype=torch.float64) / total
                output[0, place, head] = weights @ value[0, own, : place + 1]
        return output, None


def batch(prompts=PROMPTS) -> dict[str, torch.Tensor]:
    """The prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, rival: Rival, prompts=PROMPTS, places=PLACES, **options):
    """Greedy responses of exactly NEW tokens, with their logits."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad(), steered(model, rival, list(map(len, prompts)), places):
        return model.generate(**batch(prompts), **options, return_dict_in_generate=True, output_logits=True)


def same_logits(model, kind: str, made, rival: Rival) -> None:
    """Compares the logits of a batch with those of the reference on each whole row."""
    is_capped = model.config._attn_implementation == "eager"
    width = max(map(len, PROMPTS))
    logits = torch.stack(made.logits, 1)
    for row, (prompt, places) in enumerate(zip(PROMPTS, PLACES, strict=True)):
        AttentionInterface.register("rival_reference", Reference(rival, set(places), len(prompt), is_capped))
        naive = tiny_model(kind, dtype=torch.float64)
        naive.load_state_dict(model.state_dict())
        naive.config._attn_implementation_internal = "rival_reference"
        with torch.no_grad():
            expected = naive(made.sequences[row : row + 1, width - len(prompt) :]).logits[0, len(prompt) - 1 : -1]
        tolerance = 1e-4 if model.dtype == torch.float32 else 1e-6  # norms are in float32 in both
        torch.testing.assert_close(logits[row].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rival", METHODS, ids=["pasta", "pasta-heads", "spotlight", "instaboost"])
@pytest.mark.parametrize(("kind", "attention"), MODELS, ids=["-".join(one) for one in MODELS])
def test_responses_follow_the_papers_equations(kind: str, attention: str, rival: Rival) -> None:
    """Cached decoding of a padded batch gives the logits of the naive float64 method on each whole row."""
    # In eager attention transformers takes the softmax in float32, where a float64 mask overflows.
    model = tiny_model(kind, dtype=torch.float32 if attention == "eager" else torch.float64)
    model.set_attn_implementation(attention)
    made = generated(model, rival)
    same_logits(model, kind, made, rival)
    plain = generated(model, InstABoost(factor=1))
    assert not torch.allclose(torch.stack(made.logits), torch.stack(plain.logits), atol=1e-3)


@pytest.mark.parametrize("rival", [Pasta(alpha=1), SpotLight(target=0), InstABoost(factor=1)])
def test_a_method_that_asks_for_nothing_is_the_base(rival: Rival) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        base = model.generate(
            **batch(),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert torch.equal(torch.stack(generated(model, rival).logits), torch.stack(base.logits))


@pytest.mark.parametrize("rival", [Pasta(alpha=1 - 1e-12), SpotLight(target=1e-12), InstABoost(factor=1 + 1e-12)])
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gpt_oss"])
def test_a_method_that_asks_for_next_to_nothing_is_the_base_but_for_rounding(kind: str, rival: Rival) -> None:
    model = tiny_model(kind)
    base, made = generated(model, InstABoost(factor=1)), generated(model, rival)
    assert torch.equal(made.sequences, base.sequences)
    torch.testing.assert_close(torch.stack(made.logits), torch.stack(base.logits), rtol=0, atol=2e-5)


def test_spotlight_ends_below_its_target() -> None:
    """The share psi becomes target / (1 + target - psi) where it was below the target, and stays elsewhere."""
    logits = torch.randn(2, 4, 6, 30, dtype=torch.float64, generator=torch.manual_seed(0)) * 2
    emphasised = torch.zeros(2, 1, 1, 30, dtype=torch.bool)
    emphasised[0, ..., 3:9] = emphasised[1, ..., :2] = True
    before = (logits.softmax(-1) * emphasised).sum(-1)
    biased = logits + SpotLight(target=0.3).bias(0, logits, emphasised, torch.ones(30, dtype=torch.bool))
    after = (biased.softmax(-1) * emphasised).sum(-1)
    expected = torch.where(before < 0.3, 0.3 / (1.3 - before), before)
    assert 0 < (before < 0.3).double().mean() < 1
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("rival", METHODS, ids=["pasta", "pasta-heads", "spotlight", "instaboost"])
def test_ways_of_generating_agree(rival: Rival) -> None:
    """Beams and samples repeat rows, and a static cache holds empty slots: the question stays where it is."""
    model = tiny_model("qwen3", dtype=torch.float64)
    made = generated(model, rival)
    static = generated(model, rival, cache_implementation="static", disable_compile=True)
    uncached = generated(model, rival, use_cache=False)
    for other in (static, uncached):
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(made.logits), rtol=0, atol=1e-6)
    beams = generated(model, rival, num_beams=3, num_return_sequences=2).sequences
    for row, (prompt, places) in enumerate(zip(PROMPTS, PLACES, strict=True)):
        alone = generated(model, rival, [prompt], [places], num_beams=3, num_return_sequences=2).sequences
        assert torch.equal(beams[2 * row : 2 * row + 2, -NEW:], alone[:, -NEW:])


def test_every_kind_of_mask_is_read() -> None:
    """Plain causal attention comes without a mask, or with a bool, an additive or a block mask."""
    random = torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, dtype=torch.float64, generator=random) for heads in (4, 2, 2))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
    block = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    emphasised = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    outputs = [
        Steering(METHODS[0], base, emphasised).attend(AttentionCall(0, query, key, value, mask, {}, base))[0]
        for base, mask in (("sdpa", None), ("sdpa", causal), ("eager", added), ("flex_attention", block))
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_a_long_prompt_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    made = generated(model, METHODS[0])
    monkeypatch.setattr("hf_stepflow.evaluation.rivals._CHUNK_ELEMENTS", 3 * 4 * 23 * 5)
    torch.testing.assert_close(torch.stack(generated(model, METHODS[0]).logits), torch.stack(made.logits))


def test_half_precision() -> None:
    model = tiny_model("qwen3")
    whole = torch.stack(generated(model, METHODS[0], max_new_tokens=1, min_new_tokens=1).logits)
    half = torch.stack(generated(model.bfloat16(), METHODS[0], max_new_tokens=1, min_new_tokens=1).logits).float()
    assert torch.nn.functional.cosine_similarity(half, whole, dim=-1).min() > 0.99


def state_of(model) -> list:
    """Everything about a model that steering touches."""
    hooks = len(model._forward_pre_hooks)
    return [hooks, *((sorted(module.__dict__), id(module.__dict__.get("config"))) for module in model.modules())]


@pytest.mark.parametrize("is_attached", [False, True])
def test_the_model_is_left_as_it_was(is_attached: bool) -> None:
    model = tiny_model("qwen3")
    if is_attached:
        StepFlowModelForCausalLM.attach(model, tokenizer=byte_tokenizer())
    before = state_of(model)
    with pytest.raises(ValueError, match="max_new_tokens"):  # raised inside, by generate
        generated(model, METHODS[0], max_new_tokens=-1)
    assert state_of(model) == before
    with steered(model, METHODS[0], [3], [[1]]):
        assert state_of(model) != before
    assert state_of(model) == before
    options = {"stepflow": False} if is_attached else {}
    made = generated(model, METHODS[0], **options)
    assert state_of(model) == before
    torch.testing.assert_close(
        torch.stack(made.logits), torch.stack(generated(tiny_model("qwen3"), METHODS[0]).logits), rtol=0, atol=0
    )


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model("qwen3")
    check_rival(model, Pasta(heads={3: [0, 3]}))
    with pytest.raises(StepFlowConfigError, match="names the head 4 of layer 0, which has 4 query heads"):
        check_rival(model, Pasta(heads={0: [4]}))
    with pytest.raises(StepFlowConfigError, match="names the layer 4, which has no attention in this model"):
        check_rival(model, Pasta(heads=[1, 4]))
    with pytest.raises(StepFlowUnsupportedError):
        check_rival(tiny_model("mamba"), InstABoost())


TEMPLATE = (
    "{% for one in messages %}[{{ one.role }}] {{ one.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_the_question_is_found_by_its_characters() -> None:
    tokenizer = byte_tokenizer()

    def found(question: str, message: str, **template) -> str:
        ids = encode_prompt(tokenizer, message, **template)
        return tokenizer.decode(
            [ids[place] for place in emphasised_tokens(tokenizer, question, message, ids, **template)]
        )

    assert found("Two eggs?", "Two eggs?") == "Two eggs?"
    tokenizer.chat_template = TEMPLATE
    try:
        assert found("  Two eggs?\n", "  Two eggs?\n\nBe brief.") == "Two eggs?"
        # Words of the question elsewhere are not the question.
        assert found("user", "user\n\nThe user asks.", system="user") == "user"
        ids = encode_prompt(tokenizer, "user", system="user")
        assert emphasised_tokens(tokenizer, "user", "user", ids, system="user") == [*range(21, 25)]
        with pytest.raises(StepFlowInputError, match="does not encode to the 2 token ids"):
            emphasised_tokens(tokenizer, "Eggs?", "Eggs?", [5, 6])
        tokenizer.chat_template = "{{ messages[0].content | upper }}"
        with pytest.raises(StepFlowInputError, match="is not found as it is"):
            found("Two eggs?", "Two eggs?")
    finally:
        tokenizer.chat_template = None


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(StepFlowUnsupportedError, match="Slow does not tell which characters"):
        emphasised_tokens(Slow(), "a", "a", [1])


def test_arms_of_the_command_line() -> None:
    assert parse_arm("pasta")[1] == Arm(rival="pasta", rival_parameters={"alpha": 0.01, "heads": "all"})
    name, arm = parse_arm('few=pasta:alpha=0.1,heads={"3":[0,2],"5":[1]}')
    assert (name, arm.steering) == ("few", Pasta(alpha=0.1, heads={3: [0, 2], 5: [1]}))
    assert parse_arm("pasta:heads=[1,2]")[1].steering == Pasta(heads=[1, 2])
    assert parse_arm("spotlight:target=0.3")[1].steering == SpotLight(target=0.3)
    assert parse_arm("instaboost:factor=5,samples=4,temperature=1.0")[1] == Arm(
        rival="instaboost", rival_parameters={"factor": 5}, samples=4, temperature=1.0
    )
    settings = {"tau_max": 0, "alpha": 0, "length_temperature": 1, "length_temperature_base": 512}
    assert parse_arm("length-temperature:length_temperature_base=512")[1] == Arm(stepflow=settings)
    for arm in (parse_arm(text)[1] for text in ("base", 'pasta:heads={"3":[0]}', "spotlight", "instaboost")):
        assert Arm(**json.loads(json.dumps(arm.to_dict()))) == arm


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pasta:alpha=0", r"alpha of pasta must be a number in \(0, 1\], got 0"),
        ("pasta:heads=[]", "heads of pasta must be an object"),
        ('pasta:heads={"a":[1]}', "heads of pasta must be an object"),
        ('pasta:heads={"1":[0,0]}', "heads of pasta must be an object"),
        ("pasta:heads=-1", "heads of pasta must be an object"),
        ("spotlight:target=1", r"target of spotlight must be a number in \[0, 1\), got 1"),
        ("instaboost:factor=true", "factor of instaboost must be a number of at least 1, got True"),
        ("instaboost:tau_max=0.1", "instaboost takes the parameters factor, got {'tau_max': 0.1}"),
        ("length-temperature", "length_temperature_base is not set"),
    ],
)
def test_bad_arms(text: str, words: str) -> None:
    with pytest.raises(StepFlowConfigError, match=words):
        parse_arm(text)


def test_arms_that_cannot_be() -> None:
    with pytest.raises(StepFlowConfigError, match="both change attention"):
        Arm(stepflow=True, rival="pasta")
    with pytest.raises(StepFlowConfigError, match="without a rival takes no rival_parameters"):
        Arm(rival_parameters={"alpha": 0.1})
    with pytest.raises(StepFlowConfigError, match="unknown method of attention steering 'seka'"):
        Arm(rival="seka")
    with pytest.raises(StepFlowInputError, match="is combined with other methods as StepFlow is"):
        combine_arms({"base": False}, {"pasta": Arm(rival="pasta")})
    with pytest.raises(StepFlowInputError, match="the arm 'p' runs pasta, whose attention exists"):
        VllmEngine.sampler(object.__new__(VllmEngine), {"p": Arm(rival="pasta")})


def test_arms_without_a_rival_are_stored_as_before() -> None:
    names = "stepflow samples temperature min_steps max_steps length_factor instruction"
    assert list(Arm(samples=2).to_dict()) == names.split()


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner()


def test_arms_on_the_reasoner(reasoner, tmp_path: Path) -> None:
    """Rivals run beside StepFlow and with votes, and each differs from the base when it is strong."""
    rivals = {
        "pasta": Arm(rival="pasta", rival_parameters={"alpha": 1e-6}),
        "spotlight": Arm(rival="spotlight", rival_parameters={"target": 0.9}),
        "instaboost": Arm(rival="instaboost", rival_parameters={"factor": 50}),
    }
    vote = {"vote": Arm(samples=2, temperature=1.0)}
    arms = combine_arms({"base": False, "stepflow": {"tau_max": 0.3}, "pasta": rivals["pasta"]}, vote) | rivals
    assert [name for name in arms if "+" in name] == ["stepflow + vote", "pasta + vote"]
    problems = load_problems("reasoner:chains-2", 2)
    out = tmp_path / "results.jsonl"
    result = evaluate(reasoner[0], problems, arms, max_new_tokens=20, progress=False, check=False, out=out)
    texts = {name: [one["text"] for one in result.results if one["arm"] == name] for name in arms}
    assert all(texts[name] != texts["base"] for name in rivals)
    found = {one.name: one.method for one in result.compute[1]}
    assert found == dict.fromkeys(arms) | {name: "vote" for name in arms if "+" in name}
    write_report(result, problems, tmp_path / "report.html")
    # Without StepFlow on the model, and in batches of another size, the responses are the same.
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    again = evaluate(
        model, problems, rivals, tokenizer=tokenizer, max_new_tokens=20, progress=False, check=False, batch_size=1
    )
    for name in rivals:
        assert [one["text"] for one in again.results if one["arm"] == name] == texts[name]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    arms = ["base", "pasta", "spotlight", "instaboost", "length-temperature:length_temperature_base=30"]
    command = ["eval", "--model", "reasoner", "--problems", "reasoner:chains-2", "--limit", "2", "--out", str(out)]
    assert main([*command, "--max-new-tokens", "45", *(word for arm in arms for word in ("--arm", arm))]) == 0
    assert "instaboost: " in capsys.readouterr().out
    header, results, _ = read_results(out)
    assert header["run"]["arms"]["spotlight"]["rival_parameters"] == {"target": 0.2}
    assert len(results) == 2 * len(arms)
