"""`hf-stepflow verify --engine vllm`: the same trace through a vLLM engine, compared with the verified model.

The model in transformers is checked first (`hf_stepflow.verification`); what vLLM computes is then compared with it.
How much the two engines differ without StepFlow is measured beside it, and is what rounding may explain.
"""

import random
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from hf_stepflow.runtime.step_detector import Field
from hf_stepflow.verification.checks import Check, Verification, verify_model
from hf_stepflow.verification.trace import ReadTrace

from .engine import counters_in
from .offline import VllmEngine
from .requests import FIELD

_DECODED = 24  # tokens that are generated and compared
_SMALLEST = 2e-5  # a difference of log probabilities that float32 always has


def verify_engine(engine: VllmEngine, model: Any, name: str, *, tokens: int = 40, seed: int = 0) -> Verification:
    """Checks that StepFlow acts in a vLLM engine as it does on a model in transformers, and measures its cost.

    Args:
        engine: The engine.
        model: The same model in transformers, with StepFlow attached; its settings are checked.
        name: What the report calls the model.
        tokens: Tokens to measure, with StepFlow and without.
        seed: The seed of the order in which the two take turns.

    Example:
        >>> engine = VllmEngine("Qwen/Qwen3-0.6B", dtype="float32")
        >>> verify_engine(engine, StepFlowModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"), "Qwen3-0.6B").passed
        True
    """
    there = verify_model(model, name, tokens=tokens, seed=seed)
    trace = ReadTrace.of(model)
    ids, prompt = trace.ids[0].tolist(), trace.ids[0, : trace.prompt_length].tolist()
    settings = trace.settings.to_dict()
    counters = counters_in(engine.llm.llm_engine.vllm_config, 0)
    before = counters.read() if counters is not None else {}
    read = {switch: _read(engine, ids, settings if switch else False) for switch in (True, False)}
    counted = {key: count - before[key] for key, count in counters.read().items()} if counters is not None else {}
    wanted = {switch: _read_in_transformers(model, trace, switch) for switch in (True, False)}
    made = {switch: _write(engine, prompt, settings if switch else False) for switch in (True, False)}
    told = {switch: _write_in_transformers(model, prompt, switch) for switch in (True, False)}
    checks = (
        *(replace(check, name=f"transformers: {check.name}") for check in there.checks),
        _counts_check(trace, counted),
        _equal_check("vLLM reads the trace as transformers does", read, wanted),
        _stream_check(made, told),
        _effect_check(read),
    )
    about = engine.about()
    return replace(
        there,
        engine=about["engine"],
        machine=there.machine | {"vllm runs as": f"{about['engine']}, {engine.identity()['dtype']}"},
        checks=checks,
        cost=_cost(engine, prompt, settings, tokens, seed),
    )


def _ask(engine: VllmEngine, ids: list[int], asked: Any, **kwargs: Any) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, extra_args={FIELD: asked}, **kwargs)
    return engine.llm.generate([{"prompt_token_ids": ids}], [params], use_tqdm=False)[0]


def _read(engine: VllmEngine, ids: list[int], asked: Any) -> torch.Tensor:
    """Log probability of each token of a text after the first."""
    found = _ask(engine, ids, asked, max_tokens=1, prompt_logprobs=0).prompt_logprobs
    return torch.tensor([one[token].logprob for one, token in zip(found[1:], ids[1:], strict=True)])


def _read_in_transformers(model: Any, trace: ReadTrace, is_on: bool) -> torch.Tensor:
    rules = trace.rules if is_on else None
    with torch.no_grad(), model.stepflow_runtime.override(rules, trace.prompt_length):
        logits = model(trace.ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, trace.ids[0, 1:, None])[:, 0].cpu()


def _write(engine: VllmEngine, prompt: list[int], asked: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after a prompt, and their log probabilities."""
    made = _ask(engine, prompt, asked, max_tokens=_DECODED, logprobs=0, ignore_eos=True).outputs[0]
    ids = list(made.token_ids)
    return ids, torch.tensor([one[token].logprob for one, token in zip(made.logprobs, ids, strict=True)])


def _write_in_transformers(model: Any, prompt: list[int], is_on: bool) -> tuple[list[int], torch.Tensor]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=_DECODED,
        min_new_tokens=_DECODED,
        return_dict_in_generate=True,
        output_logits=True,
        temperature=None,
        top_p=None,
        top_k=None,
        stepflow={} if is_on else False,
    )
    made = output.sequences[0, len(prompt) :].tolist()
    steps = [step[0].float().log_softmax(-1)[token] for step, token in zip(output.logits, made, strict=True)]
    return made, torch.stack(steps).cpu()


def _counts_check(trace: ReadTrace, counted: dict[str, int]) -> Check:
    prompt_length = trace.prompt_length if trace.settings.implicit_thinking else None
    records = trace.rules.vocabulary.scan(trace.ids[0].tolist(), prompt_length=prompt_length)
    wanted = {
        "requests": 1,
        "bridged_tokens": sum(record[Field.ACTIVE] for record in records),
        "injections": sum(record[Field.TRIGGER] for record in records),
    }
    if not counted:
        return Check("vLLM counts what it does", False, "the worker's counts are not on this machine")
    # One more token may have been written after the trace.
    passed = all(0 <= counted[key] - wanted[key] <= (key != "requests") for key in wanted)
    found = f"{counted['bridged_tokens']} tokens bridged, {counted['injections']} injected"
    return Check("vLLM counts what it does", passed, found, {"counted": counted, "expected": wanted})


def _equal_check(name: str, found: dict[bool, torch.Tensor], wanted: dict[bool, torch.Tensor]) -> Check:
    on, off = (float((found[switch] - wanted[switch]).abs().max()) for switch in (True, False))
    allowed = max(_SMALLEST, 2 * off)
    text = f"log probabilities within {on:.1e} (allowed {allowed:.1e}; without StepFlow {off:.1e})"
    return Check(name, on <= allowed, text, {"error": on, "without_stepflow": off, "tolerance": allowed})


def _stream_check(made: dict[bool, tuple[list[int], torch.Tensor]], told: dict[bool, Any]) -> Check:
    """Compares streams; where the base's own differ, rounding decides between tokens and nothing can be said."""
    name = "vLLM writes what transformers writes"
    same = {switch: made[switch][0] == told[switch][0] for switch in made}
    if not same[False]:
        return Check(name, True, "not comparable: without StepFlow the engines write different tokens")
    if not same[True]:
        return Check(name, False, "other tokens, and without StepFlow the same")
    logprobs = ({switch: one[switch][1] for switch in one} for one in (made, told))
    found = _equal_check(name, *logprobs)
    return replace(found, found=f"the same {len(made[True][0])} tokens; {found.found}")


def _effect_check(read: dict[bool, torch.Tensor]) -> Check:
    effect = float((read[True] - read[False]).abs().max())
    return Check(
        "StepFlow is active in vLLM", effect > 0, f"log probabilities differ from the base's by up to {effect:.4f}",
        {"difference": effect},
    )  # fmt: skip


def _cost(engine: VllmEngine, prompt: list[int], settings: Any, tokens: int, seed: int) -> dict[str, float]:
    """The time of a token with StepFlow and without, which take turns in random order; the prompt's is left out."""
    order, times = random.Random(seed), {"on": [], "off": []}  # type: ignore[var-annotated]
    asked = {"on": settings, "off": False}
    rounds = 3
    for _ in range(rounds):
        for arm in order.sample(sorted(asked), 2):
            spans = []
            for length in (1, 1 + tokens):
                start = time.perf_counter()
                _ask(engine, prompt, asked[arm], max_tokens=length, ignore_eos=True)
                spans.append(time.perf_counter() - start)
            times[arm].append((spans[1] - spans[0]) / tokens)
    on, off = (1000 * statistics.median(times[arm]) for arm in ("on", "off"))
    ratio = statistics.median(one / other for one, other in zip(times["on"], times["off"], strict=True))
    return {"on_ms": on, "off_ms": off, "ratio": ratio, "tokens": tokens * rounds}
