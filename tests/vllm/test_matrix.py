"""The plugin in vLLM gives what StepFlow in transformers gives, in every mode of the engine and on every architecture.

Streams are compared token by token, and so are log probabilities: many streams are equal without StepFlow, too.
"""

from functools import lru_cache
from typing import Any

import pytest

from tests.support.vllm_engine import run_engine
from tests.support.vllm_models import SETTINGS, TINY, TINY_MODELS, expected, make_tiny, prompts

pytest.importorskip("vllm")

from hf_stepflow.reasoner import FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ASKED = prompts("chains-4", 6) + prompts("errands-60", 4)
TOLERANCE = 2e-5


@lru_cache
def reference(on: bool) -> list[dict[str, list[Any]]]:
    return expected(FOLDER, ASKED, SETTINGS if on else False, 200)


def assert_equal(found: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float = TOLERANCE) -> float:
    """Compares answers, and returns the greatest difference of log probabilities."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        assert one["ids"] == other["ids"]
        for name in ("logprobs", "prompt_logprobs"):
            if one.get(name) is not None:
                pairs = zip(one[name], other[name], strict=True)
                worst = max([worst, *(abs(made - expected) for made, expected in pairs)])
    assert worst <= tolerance
    return worst


def asked() -> list[list[int]]:
    return [list(ids) for ids in ASKED]


def test_the_settings_matter() -> None:
    on, off = reference(True), reference(False)
    differences = [
        max(abs(a - b) for a, b in zip(x["logprobs"], y["logprobs"], strict=False))
        for x, y in zip(on, off, strict=True)
    ]
    assert min(differences) > 10 * TOLERANCE
    assert max(differences) > 0.1


MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "prompts": {"wants_prompt": True},
    "compiled": {"enforce_eager": False},
    "chunks of 32": {"max_num_batched_tokens": 32, "max_num_seqs": 8},
    "preemption": {
        "num_gpu_blocks_override": 12, "block_size": 32, "max_model_len": 280, "enable_prefix_caching": False
    },
    "engine in a process of its own": {"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}},
    "tensor parallel": {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    },
    "speculation": {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_transformers(mode: str) -> None:
    """All prompts with StepFlow and without, in one batch.

    A mode's own rounding is the difference that the base shows in it; StepFlow may have twice as much.
    """
    arguments = MODES[mode]
    limit = 100 if mode == "preemption" else 200

    def first_tokens(answers: list[dict[str, list[Any]]]) -> list[dict[str, list[Any]]]:
        return [one | {name: one[name][:limit] for name in ("ids", "logprobs")} for one in answers]

    switches = [None] * len(ASKED) + [False] * len(ASKED)
    found = run_engine(FOLDER, asked() * 2, settings=SETTINGS, switches=switches, max_tokens=limit, **arguments)
    made = found["rounds"][0]
    rounding = assert_equal(made[len(ASKED) :], first_tokens(reference(False)), 1e-4)
    assert_equal(made[: len(ASKED)], first_tokens(reference(True)), max(TOLERANCE, 2 * rounding))
    if mode == "preemption":
        assert found["metrics"]["vllm:num_preemptions"] > 0
    if mode == "speculation":
        assert found["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 100


def test_prefixes_are_cached_and_never_shared_with_other_settings() -> None:
    """The second round reads what the first wrote; requests without StepFlow read nothing of those with it."""
    half = [ids + one["ids"][:150] for ids, one in zip(asked(), reference(True), strict=True) if len(one["ids"]) > 150]
    assert half
    wanted = expected(FOLDER, half, SETTINGS, 40)
    switches: list[Any] = [None] * len(half)
    found = run_engine(FOLDER, half, settings=SETTINGS, rounds=2, max_tokens=40, block_size=32)
    assert all(one["cached"] >= 128 for one in found["rounds"][1])
    for made in found["rounds"]:
        assert_equal(made, wanted)
    # Each prompt twice: with StepFlow and without, in one batch and then again from the cache.
    switches = [None] * len(half) + [False] * len(half)
    found = run_engine(FOLDER, half * 2, settings=SETTINGS, switches=switches, rounds=2, max_tokens=40, block_size=32)
    for made in found["rounds"]:
        assert_equal(made, wanted + expected(FOLDER, half, False, 40))
    assert all(one["cached"] >= 128 for one in found["rounds"][1])


def test_requests_have_a_switch() -> None:
    switches = [None, False, True, 0, 1] * 2
    found = run_engine(FOLDER, asked(), settings=SETTINGS, switches=switches)
    on, off = reference(True), reference(False)
    wanted = [
        off[place] if switch in (False, 0) and switch is not None else on[place]
        for place, switch in enumerate(switches)
    ]
    assert_equal(found["rounds"][0], wanted)


def test_several_rounds() -> None:
    """Earlier answers with their thinking are part of the prompt, and a new round opens after them."""
    earlier = prompts("chains-2", 3, 1.0)
    turns = [list(one) + list(other) for one, other in zip(earlier, ASKED[:3], strict=True)]
    turns += [list(one) + list(one) + list(other) for one, other in zip(earlier, ASKED[3:6], strict=True)]
    wanted, base = expected(FOLDER, turns, SETTINGS, 120), expected(FOLDER, turns, False, 120)
    found = run_engine(
        FOLDER, turns * 2, settings=SETTINGS, switches=[None] * 6 + [False] * 6, max_tokens=120, wants_prompt=True
    )
    rounding = assert_equal(found["rounds"][0][6:], base, 1e-4)
    assert_equal(found["rounds"][0][:6], wanted, max(TOLERANCE, 2 * rounding))


def test_bfloat16_is_within_its_rounding() -> None:
    """Right traces are read: their log probabilities differ between the engines as much as without StepFlow."""
    whole = prompts("chains-4", 6, 1.0) + prompts("errands-60", 4, 1.0)
    switches = [None] * len(whole) + [False] * len(whole)
    found = run_engine(
        FOLDER, [list(ids) for ids in whole] * 2, settings=SETTINGS, switches=switches, max_tokens=1,
        wants_prompt=True, dtype="bfloat16",
    )["rounds"][0]  # fmt: skip
    apart = []
    for settings, made in ((SETTINGS, found[: len(whole)]), (False, found[len(whole) :])):
        wanted = expected(FOLDER, whole, settings, 1, "bfloat16")
        pairs = [
            pair
            for x, y in zip(made, wanted, strict=True)
            for pair in zip(x["prompt_logprobs"], y["prompt_logprobs"], strict=True)
        ]
        apart.append(sum(abs(one - other) for one, other in pairs) / len(pairs))
    on, off = apart
    assert on <= 1.5 * off


def test_requests_bring_settings() -> None:
    """One engine computes many settings in one batch, where it was started for that."""
    other = SETTINGS | {"oeb_layers": [3, 4], "smi_layers": [4, 5], "oeb_heads": {"3": [0, 2], "4": [1]}}
    switches = [SETTINGS, other, None, False, other] * 2
    found = run_engine(FOLDER, asked(), additional_config={"stepflow_requests": True}, switches=switches)
    answers = {repr(SETTINGS): reference(True), repr(other): expected(FOLDER, ASKED, other, 200)}
    wanted = [answers.get(repr(switch), reference(False))[place] for place, switch in enumerate(switches)]
    assert_equal(found["rounds"][0], wanted)


def test_an_engine_without_settings_is_vllms_own() -> None:
    assert_equal(run_engine(FOLDER, asked())["rounds"][0], reference(False))


@pytest.mark.parametrize("model_type", TINY_MODELS)
def test_architectures_equal_transformers(model_type: str, tmp_path: Any) -> None:
    folder = make_tiny(model_type, tmp_path)
    half = prompts("chains-4", 3, 0.5) + prompts("errands-60", 1, 0.3)
    wanted, base = expected(folder, half, TINY, 40), expected(folder, half, False, 40)
    differences = [
        abs(a - b)
        for x, y in zip(wanted, base, strict=True)
        for a, b in zip(*(one["prompt_logprobs"] for one in (x, y)), strict=True)
    ]
    assert max(differences) > 100 * TOLERANCE
    found = run_engine(folder, [list(ids) for ids in half], settings=TINY, max_tokens=40, wants_prompt=True)
    assert_equal(found["rounds"][0], wanted)


# Small enough for an interpreter: few blocks, which are copied, and prompts in chunks.
BY_KERNELS: dict[str, Any] = {
    "by_kernels": True, "num_gpu_blocks_override": 40, "block_size": 32, "max_model_len": 400,
    "max_num_batched_tokens": 100, "max_tokens": 6, "wants_prompt": True,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_kernels_equal_transformers(model_type: str, tmp_path: Any) -> None:
    """The form for GPUs, by Triton's interpreter: requests with two settings, and without StepFlow, in one batch."""
    folder = make_tiny(model_type, tmp_path)
    half = prompts("chains-4", 1, 0.5) + prompts("errands-60", 1, 0.3)
    other = TINY | {"bridge_scope": "step", "oeb_heads": {"0": [0, 3], "1": [2]}, "length_temperature": 0.5}
    other |= {"length_temperature_base": 16, "tool_start": [" counts", " has"], "tool_end": ["."], "smi_window": 2}
    switches = [None, None, other, other, False, False]
    found = run_engine(
        folder, [list(ids) for ids in half] * 3, switches=switches,
        additional_config={"stepflow": TINY, "stepflow_requests": True}, **BY_KERNELS,
    )  # fmt: skip
    wanted = [answer for settings in (TINY, other, False) for answer in expected(folder, half, settings, 6)]
    assert_equal(found["rounds"][0], wanted)
    assert found["counts"]["bridged_tokens"] > 100
    assert found["counts"]["injections"] > 10
