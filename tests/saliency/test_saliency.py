"""The engine of Step-Saliency against the naive oracle, the published numbers, and its own promises."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_stepflow import StepFlowModelForCausalLM, step_saliency
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.trace import Trace, segment_trace
from hf_stepflow.saliency import memory
from hf_stepflow.saliency.maps import StepSums, step_of_token
from tests.support.flow import (
    FAMILIES,
    IMPLEMENTATIONS,
    TRACES,
    TWO_ROUNDS,
    VARIANTS,
    attach,
    byte_tokenizer,
    encode,
    oracle_settings,
    oracle_trace,
)
from tests.support.saliency_oracle import SaliencyOracle, oracle_map
from tests.support.tiny_models import tiny_model

STEPS = StepFlowSettings(min_step_chars=5)
SHORT = "Two eggs?<think>Add one. Then two.\n\nSo now. It is so.</think>Two.\n\nBye."
LOSSES = ("trace", "summary", (30, 77))


def loss_of(loss, ids: list[int], trace: Trace):
    """The loss as a function of logits."""
    targets = torch.tensor(ids)

    def of(logits: torch.Tensor) -> torch.Tensor:
        if isinstance(loss, tuple):
            return logits[loss]
        each = torch.nn.functional.cross_entropy(logits[:-1], targets[1:], reduction="none")
        return each.mean() if loss == "trace" else each[trace.segment_ids[1:] == 2].mean()

    return of


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@cache
def model_of(family: str, implementation: str | None = None):
    """A tiny model of a family in float64."""
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation(implementation or IMPLEMENTATIONS.get(family, "sdpa"))
    return model


@cache
def expected_maps(family: str, text: str, loss, pooling: str = "causal") -> torch.Tensor:
    """The oracle's maps [L, S, S]."""
    ids = encode(text)
    trace = segment_trace(byte_tokenizer(), ids, STEPS)
    tokens = SaliencyOracle(model_of(family))(ids, loss_of(loss, ids, trace))
    return torch.stack([oracle_map(tokens[layer].mean(0), trace, pooling) for layer in sorted(tokens)])


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_oracle(family: str, loss) -> None:
    found = step_saliency(
        model_of(family), encode(SHORT), tokenizer=byte_tokenizer(), config=STEPS, loss=loss, chunk_size=7
    )
    assert relative(found.maps, expected_maps(family, SHORT, loss)) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_long_enough_for_the_window_and_in_blocks(family: str) -> None:
    found = step_saliency(
        model_of(family), encode(TRACES[0]), tokenizer=byte_tokenizer(), config=STEPS, pooling="block"
    )
    assert relative(found.maps, expected_maps(family, TRACES[0], "trace", "block")) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_many_tiles_of_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_stepflow.saliency.kernel._FEWEST_KEYS", 5)
    monkeypatch.setattr("hf_stepflow.saliency.kernel._TILE_ELEMENTS", 1)
    for per_head in (False, True):
        found = step_saliency(
            model_of(family),
            encode(SHORT),
            tokenizer=byte_tokenizer(),
            config=STEPS,
            chunk_size=7,
            checkpoints=per_head,
            per_head=per_head,
        )
        assert relative(found.mean_maps, expected_maps(family, SHORT, "trace")) < 1e-9


@pytest.mark.parametrize("variant", ["paper", "step", "heads"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_of_the_intervened_model(family: str, variant: str) -> None:
    chosen = VARIANTS[variant].replace(length_temperature=0.0, length_temperature_base=None)
    ids = encode(SHORT)
    oracle = oracle_settings(model_of(family), chosen)
    trace = segment_trace(byte_tokenizer(), ids, chosen)
    tokens = SaliencyOracle(model_of(family), oracle)(ids, loss_of("trace", ids, trace), oracle_trace(ids, chosen))
    expected = torch.stack([oracle_map(tokens[layer].mean(0), trace, "causal") for layer in sorted(tokens)])
    model = attach(copy.deepcopy(model_of(family)), chosen)
    for checkpoints in (False, True):
        found = step_saliency(model, ids, chunk_size=5, checkpoints=checkpoints)
        assert relative(found.maps, expected) < 1e-9
    with model.disable_stepflow():
        off = step_saliency(model, ids, config=chosen)
    plain = step_saliency(model_of(family), ids, trace)
    assert torch.equal(off.maps, plain.maps)
    assert relative(plain.maps, expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
@settings(max_examples=10)
@given(st.integers(1, 40), st.booleans())
def test_any_chunk_size_and_checkpoints(family: str, chunk_size: int, checkpoints: bool) -> None:
    found = step_saliency(
        model_of(family),
        encode(SHORT),
        tokenizer=byte_tokenizer(),
        config=STEPS,
        chunk_size=chunk_size,
        checkpoints=checkpoints,
    )
    assert relative(found.maps, expected_maps(family, SHORT, "trace")) < 1e-9


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, one) for family in ("llama", "gpt_oss") for one in ("eager", "flex_attention")] + [("llama", "sdpa")],
)
def test_every_base_implementation(family: str, implementation: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    found = step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer(), config=STEPS)
    assert relative(found.maps, expected_maps(family, SHORT, "trace")) < 1e-9
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = copy.deepcopy(model_of("llama")).to(dtype)
    found = step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer(), config=STEPS)
    assert found.maps.dtype == torch.float32
    assert (
        relative(found.maps, expected_maps("llama", SHORT, "trace"))
        < {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("with_stepflow", [False, True])
def test_batch_and_padding_equal_single(family: str, with_stepflow: bool) -> None:
    model = copy.deepcopy(model_of(family))
    if with_stepflow:
        attach(model, VARIANTS["step"])
    texts = [SHORT, TRACES[0], TWO_ROUNDS]
    rows = [encode(text) for text in texts]
    traces = [segment_trace(byte_tokenizer(), row, VARIANTS["step"]) for row in rows]
    alone = [step_saliency(model, row, trace) for row, trace in zip(rows, traces, strict=True)]
    together = step_saliency(model, [torch.tensor(row) for row in rows], traces)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    padded = step_saliency(
        model,
        ids,
        traces,
        attention_mask=(torch.arange(width) >= width - torch.tensor([len(row) for row in rows])[:, None]).long(),
    )
    for one, other, third in zip(alone, together, padded, strict=True):
        assert relative(other.maps, one.maps) < 1e-7  # deepseek_v3 routes in float32
        assert torch.equal(other.maps, third.maps)


def test_heads_and_layers_can_be_chosen() -> None:
    model, ids = model_of("qwen3"), encode(SHORT)
    trace = segment_trace(byte_tokenizer(), ids, STEPS)
    whole = step_saliency(model, ids, trace)
    heads = step_saliency(model, ids, trace, per_head=True, layers=[1, 3])
    assert heads.maps.shape == (2, 4, len(trace.steps), len(trace.steps))
    assert heads.layers == [1, 3]
    assert relative(heads.maps.mean(1), whole.maps[[1, 3]]) < 1e-12
    for name, values in heads.indices.items():
        torch.testing.assert_close(values, whole.indices[name][[1, 3]], equal_nan=True)


def test_a_run_leaves_no_trace_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    calls = []
    model.model.layers[2].register_forward_hook(lambda *args: calls.append(1))

    def state() -> dict:
        modules = {}
        for name, module in model.named_modules():
            kept = {key: value for key, value in module.__dict__.items() if not key.startswith("_")}
            modules[name] = (kept, list(module._forward_hooks), list(module._forward_pre_hooks), type(module))
        parameters = {name: (one.requires_grad, one.grad) for name, one in model.named_parameters()}
        return {"modules": modules, "parameters": parameters, "implementation": model.config._attn_implementation}

    def check() -> None:
        after = state()
        assert after["implementation"] == before["implementation"]
        for name, (kept, *rest) in before["modules"].items():
            assert after["modules"][name][1:] == tuple(rest)
            assert after["modules"][name][0].keys() == kept.keys()
            for key, value in kept.items():
                assert after["modules"][name][0][key] is value, (name, key)
        for name, (required, grad) in before["parameters"].items():
            assert after["parameters"][name] == (required, grad) or after["parameters"][name][1] is grad
            assert after["parameters"][name][0] == required
        assert torch.is_grad_enabled() == grad_mode

    before, grad_mode = state(), torch.is_grad_enabled()
    for checkpoints in (False, True):
        step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer(), checkpoints=checkpoints)
        check()
    monkeypatch.setattr("hf_stepflow.saliency.kernel._Tiles.backward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer(), checkpoints=True)
    check()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_other_grad_modes(mode) -> None:
    model = model_of("llama")
    with mode():
        found = step_saliency(model, torch.tensor(encode(SHORT)), tokenizer=byte_tokenizer(), config=STEPS)
        assert not torch.is_grad_enabled()
    assert relative(found.maps, expected_maps("llama", SHORT, "trace")) < 1e-9


def test_steps_end_by_the_settings_in_force() -> None:
    ids = encode(SHORT)
    preset = STEPS.replace(tau_max=0.4)
    inside = preset.replace(step_rule="paragraph")
    model = attach(copy.deepcopy(model_of("llama")), preset)
    with model.use_stepflow({"step_rule": "paragraph"}):
        found = step_saliency(model, ids)
        with model.disable_stepflow():
            off = step_saliency(model, ids)
    after = step_saliency(model, ids)
    expected = step_saliency(attach(copy.deepcopy(model_of("llama")), inside), ids)
    assert found.steps == expected.steps
    assert torch.equal(found.maps, expected.maps)
    assert len(found.steps) < len(after.steps)
    # Where StepFlow is off, nothing cuts in the pass, and the preset says where steps end.
    assert off.steps == after.steps == segment_trace(byte_tokenizer(), ids, preset).steps


def test_implicit_thinking() -> None:
    ids = encode("Two eggs? Add one. Then two.\n\nSo now.")
    implicit = StepFlowSettings(implicit_thinking=True, min_step_chars=3)
    expected = segment_trace(byte_tokenizer(), ids, implicit, prompt_length=9)
    plain = step_saliency(model_of("llama"), ids, expected)
    assert [step.label for step in plain.steps] == ["question"] + ["thinking"] * 3
    cut = step_saliency(model_of("llama"), ids, tokenizer=byte_tokenizer(), config=implicit, prompt_length=9)
    assert torch.equal(cut.maps, plain.maps)
    model = attach(copy.deepcopy(model_of("llama")), implicit.replace(tau_max=0.4))
    rows = [ids, ids[:-3]]
    both = step_saliency(model, rows, prompt_length=[9, 8])
    assert [one.steps[0].end for one in both] == [9, 8]
    assert relative(both[0].maps, plain.maps) > 1e-3


def test_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(model_of("llama"))
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    found = step_saliency(adapted, encode(SHORT), tokenizer=byte_tokenizer(), config=STEPS)
    assert all(one.grad is None for one in adapted.parameters())
    assert any(one.requires_grad for one in adapted.parameters())
    merged = step_saliency(
        copy.deepcopy(adapted).merge_and_unload(), encode(SHORT), tokenizer=byte_tokenizer(), config=STEPS
    )
    assert relative(found.maps, merged.maps.double()) < 1e-9
    assert relative(found.maps, expected_maps("llama", SHORT, "trace")) > 1e-3
    tuned = peft.get_peft_model(
        copy.deepcopy(model_of("llama")), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(StepFlowUnsupportedError, match="virtual tokens"):
        step_saliency(tuned, encode(SHORT), tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    "name", ["gptoss_sw128_T192", "llama_gqa_T128", "llama_gqa_T256", "llama_logit_T112", "qwen3_gqa_T128"]
)
def test_published_maps(shared_dir, name: str) -> None:
    folder = shared_dir / "goldens" / "saliency" / name
    golden, case = load_file(folder / "golden.safetensors"), json.loads((folder / "case.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "gpt_oss":
        config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").double()
    place = golden["token_to_step_offsets"].flatten()
    questions, thinking = case["boundaries"]["question"], case["boundaries"]["thinking"]
    segment = torch.bucketize(place, torch.tensor([questions, questions + thinking]), right=True)
    trace = Trace(segment, torch.where(place < 0, -1, torch.where(segment == 0, 0, place - questions + 1)))
    target = case["target"]
    loss = (target["target_pos"], target["target_token_id"]) if target else "trace"
    found = step_saliency(model, golden["input_ids"], trace, loss=loss, pooling="block")
    assert relative(found.maps, golden["step_matrix_offset_map"].double()) < 1e-5


@settings(max_examples=60)
@given(st.data())
def test_step_sums_equal_loops(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 1200))
    ends = sorted(data.draw(st.sets(st.integers(1, length), max_size=12)) | {length})
    place = torch.full((length,), -1)
    start = 0
    for number, end in enumerate(ends):
        place[start:end] = number
        start = end
    none = data.draw(st.lists(st.integers(0, length - 1), max_size=5))
    place[none] = -1
    tokens = torch.rand(2, length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pool, sums = (
        StepSums(place, len(ends), torch.device("cpu")),
        torch.zeros(2, len(ends), len(ends), dtype=torch.float64),
    )
    rows, columns = data.draw(st.integers(1, length)), data.draw(st.integers(0, 3))
    for first in range(0, length, rows):
        # Tiles may reach past the row, into padding.
        tile = torch.nn.functional.pad(tokens[:, first : first + rows], (0, columns), value=9.0)
        pool.add(sums, first, 0, tile)
    members = (place[:, None] == torch.arange(len(ends))).double()
    torch.testing.assert_close(sums, members.T @ tokens @ members)


def test_one_step_and_none() -> None:
    ids = encode("No thinking here.")
    found = step_saliency(model_of("llama"), ids, tokenizer=byte_tokenizer())
    assert found.maps.shape == (4, 1, 1)
    assert all(values.isnan().all() for values in found.indices.values())
    assert step_of_token(found.trace).tolist() == [0] * len(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "everything"}, "loss must be"),
        ({"loss": (1000, 3)}, "position below"),
        ({"pooling": "mean"}, "pooling must be one of causal, block"),
        ({"chunk_size": 0}, "chunk_size must be a positive number"),
        ({"layers": [7]}, "layers names layers"),
        ({"layers": "none"}, "names none"),
        ({"tokenizer": None}, "the steps are not known"),
        ({"input_ids": [5]}, "two tokens at least"),
        ({"input_ids": [5, 6, 4000]}, "must lie in 0 to 319"),
        ({"input_ids": torch.rand(4)}, "rows of token ids"),
        ({"input_ids": encode("No summary."), "loss": "summary"}, "a summary"),
        ({"trace": Trace([0, 1], [0, 1])}, "must describe input_ids"),
        ({"trace": [1]}, "must be a Trace"),
        ({"input_ids": "Two eggs?"}, r"tokenizer\(text"),
        ({"input_ids": []}, "rows of token ids"),
        ({"attention_mask": [[1, 1]]}, "shape of input_ids"),
        ({"layers": 2}, r"layers=\[2\]"),
        ({"checkpoints": "no"}, "checkpoints must be"),
        ({"prompt_length": -5}, "number of tokens"),
        ({"prompt_length": True}, "number of tokens"),
        ({"prompt_length": [3, 4]}, "one number or 1"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    given_arguments = {"input_ids": encode(SHORT), "tokenizer": byte_tokenizer()} | arguments
    with pytest.raises(StepFlowInputError if "layers names" not in message else ValueError, match=message):
        step_saliency(model_of("llama"), given_arguments.pop("input_ids"), **given_arguments)


def test_weights_that_are_no_numbers() -> None:
    model = copy.deepcopy(model_of("llama"))
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(StepFlowInputError, match="not a number"):
        step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer())


def test_a_trace_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encode(SHORT) * 4
    trace = Trace([0] * len(ids), [0] * len(ids))
    model = model_of("llama")
    monkeypatch.setattr("hf_stepflow.saliency.memory.free_bytes", lambda device: 60_000_000)
    step_saliency(model, ids, trace, chunk_size=2)
    with pytest.raises(memory.StepFlowMemoryError, match=r"chunk_size=10000.*\n.*chunk_size=(\d+)") as caught:
        step_saliency(model, ids, trace, chunk_size=10000)
    fits = int(str(caught.value).rsplit("chunk_size=", 1)[1].split()[0])
    step_saliency(model, ids, trace, chunk_size=fits)
    monkeypatch.setattr("hf_stepflow.saliency.memory.free_bytes", lambda device: 100_000)
    with pytest.raises(memory.StepFlowMemoryError, match="tokens would fit"):
        step_saliency(model, ids, trace)
    assert isinstance(caught.value, MemoryError)


def test_models_that_stepflow_cannot_reach() -> None:
    model = tiny_model("bloom")
    with pytest.raises(StepFlowUnsupportedError, match="attention interface"):
        step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer())
    assert StepFlowModelForCausalLM is not None


def test_threads_wait_or_are_refused() -> None:
    model, ids = copy.deepcopy(model_of("llama")), encode(SHORT)
    expected = expected_maps("llama", SHORT, "trace")
    options = {"tokenizer": byte_tokenizer(), "config": STEPS}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: step_saliency(model, ids, **options), range(8)))
    assert all(relative(one.maps, expected) < 1e-9 for one in found)
    assert model.config._attn_implementation == "sdpa"

    refused, is_done = [], threading.Event()

    def other_use() -> None:
        while not is_done.is_set():
            try:
                model(torch.tensor([ids[:9]]))
            except StepFlowUnsupportedError as error:
                refused.append(str(error))

    thread = threading.Thread(target=other_use)
    thread.start()
    found = [step_saliency(model, ids, **options) for _ in range(5)]
    is_done.set()
    thread.join()
    assert all(relative(one.maps, expected) < 1e-9 for one in found)
    assert all("another thread" in one for one in refused)


def test_experts_whose_router_has_a_loss() -> None:
    model = tiny_model("mixtral", dtype=torch.float64)
    plain = step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer())
    model.config.output_router_logits = True
    assert torch.equal(step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer()).maps, plain.maps)


def test_steering_hooks_act_once() -> None:
    model, ids = copy.deepcopy(model_of("llama")), encode(SHORT)
    vector = torch.linspace(-1, 1, 64, dtype=torch.float64)

    def steer(module, args, output):
        output.last_hidden_state = output.last_hidden_state + vector
        return output

    model.model.register_forward_hook(steer)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    found = step_saliency(model, ids, tokenizer=byte_tokenizer())
    assert found.about["loss_value"] == pytest.approx(float(expected), rel=1e-6)  # transformers' own is in float32


def test_the_report_stays_that_of_the_last_call() -> None:
    model = attach(copy.deepcopy(model_of("llama")), VARIANTS["paper"])
    model(torch.tensor([encode(SHORT)]))
    before = str(model.stepflow_report())
    step_saliency(model, encode(TRACES[0]))
    assert str(model.stepflow_report()) == before


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(model_of("llama"))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    found = step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer(), config=STEPS)
    assert relative(found.maps, expected_maps("llama", SHORT, "trace")) < 1e-9
    assert all(one.requires_grad for one in model.parameters())


def test_half_precision_keeps_small_gradients() -> None:
    model = copy.deepcopy(model_of("llama"))
    ids = encode(TRACES[0])
    trace = segment_trace(byte_tokenizer(), ids, STEPS)
    exact = step_saliency(model, ids, trace)
    half = step_saliency(model.half(), ids, trace)
    assert relative(half.maps, exact.maps.double()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        mixed = step_saliency(copy.deepcopy(model_of("llama")).float(), ids, trace)
    assert relative(mixed.maps, exact.maps.double()) < 0.1


def test_a_model_made_for_inference_alone() -> None:
    with torch.inference_mode():
        model = tiny_model("llama", seed=1)
    with pytest.raises(StepFlowUnsupportedError, match="inference_mode"):
        step_saliency(model, encode(SHORT), tokenizer=byte_tokenizer())


def test_all_traces_are_weighed_before_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encode(SHORT) * 8
    rows = [ids[:50], ids]
    traces = [Trace([0] * len(row), [0] * len(row)) for row in rows]
    monkeypatch.setattr("hf_stepflow.saliency.memory.free_bytes", lambda device: 5_000_000)
    monkeypatch.setattr("hf_stepflow.saliency.api._Call.maps", lambda *args: pytest.fail("it ran"))
    with pytest.raises(memory.StepFlowMemoryError, match=f"a trace of {len(ids)} tokens"):
        step_saliency(model_of("llama"), rows, traces)


def test_the_estimate_is_near_what_is_taken() -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=1024)
    ids = torch.randint(5, 300, (1, 400))
    exact = memory.saved_bytes(model, lambda: model(ids, use_cache=False))
    short = memory.saved_bytes(model, lambda: model(ids[:, :16], use_cache=False))
    assert exact == pytest.approx(short / 16 * 400, rel=0.2)
