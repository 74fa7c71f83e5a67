"""The checks of `hf-stepflow verify`, and the cost of a token.

The model reads a short trace, at once and token by token, while its attention is watched.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError
from hf_stepflow.runtime.forward import cache_argument
from hf_stepflow.runtime.settings import StepFlowSettings

from .trace import STEPS, ReadTrace
from .watch import Watch

# Largest errors that rounding explains: of an output relative to the largest value, of logits to the largest logit.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_OFF = {"tau_max": 0.0, "alpha": 0.0, "length_temperature": 0.0}
_WARM_UP = 3


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        passed: Whether it holds.
        found: What was found, as text.
        numbers: The numbers behind it.
    """

    name: str
    passed: bool
    found: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """The findings of `verify_model`.

    Attributes:
        engine: What ran the model, with its version.
        model: The name of the model.
        machine: Versions, device, dtype and attention implementation.
        settings: The settings that differ from the defaults.
        trace: The length of the trace, and its steps.
        checks: The checks, in order.
        cost: Milliseconds of a decoded token with StepFlow on and off, and their ratio.
    """

    engine: str
    model: str
    machine: dict[str, str]
    settings: dict[str, Any]
    trace: dict[str, int]
    checks: tuple[Check, ...]
    cost: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        return {
            "engine": self.engine,
            "model": self.model,
            "passed": self.passed,
            "machine": self.machine,
            "settings": self.settings,
            "trace": self.trace,
            "checks": [vars(check) for check in self.checks],
            "cost": self.cost,
        }

    def __str__(self) -> str:
        changed = ", ".join(f"{name}={value}" for name, value in self.settings.items()) or "the defaults"
        rows = [("engine", self.engine), ("model", self.model), *self.machine.items(), ("settings", changed)]
        rows.append(("trace", ", ".join(f"{number} {name}" for name, number in self.trace.items())))
        lines = [f"hf-stepflow verify: {'PASSED' if self.passed else 'FAILED'}", ""]
        lines += [f"{name:<14}{value}" for name, value in rows] + [""]
        lines += [f"{'ok' if check.passed else 'FAILED':<8}{check.name}: {check.found}" for check in self.checks]
        if self.cost:
            on, off, ratio = (self.cost[name] for name in ("on_ms", "off_ms", "ratio"))
            lines += ["", f"a token costs {on:.2f} ms with StepFlow, {off:.2f} ms without: {ratio:.2f} times"]
        return "\n".join(lines)


def verify_model(model: Any, name: str, *, tokens: int = 40, seed: int = 0) -> Verification:
    """Checks that StepFlow acts on a model and computes what it should, and measures its cost.

    Args:
        model: A model with StepFlow attached, which is left as it was. The settings in force are checked.
        name: What the report calls the model.
        tokens: Decode steps to measure, with StepFlow and without; they take turns in random order.
        seed: The seed of that order.

    Raises:
        StepFlowInputError: StepFlow is not attached.

    Example:
        >>> from hf_stepflow import load_reasoner
        >>> from hf_stepflow.verification import verify_model
        >>> verify_model(load_reasoner()[0], "reasoner").passed
        True
    """
    if getattr(model, "stepflow_runtime", None) is None:
        raise StepFlowInputError("StepFlow is not attached to the model", hint="call StepFlowModelForCausalLM.attach")
    was_training = model.training
    model.eval()
    trace = ReadTrace.of(model)
    checks, cost = [_steps_check(trace)], {}
    try:
        with torch.no_grad():
            checks += _checks(model, trace)
            cost = _cost(model, trace, tokens, seed)
    except StepFlowError as error:
        checks.append(Check("runs", False, f"{error.message} ({error.hint})"))
    finally:
        model.train(was_training)
    defaults = vars(StepFlowSettings())
    settings = {key: value for key, value in vars(trace.settings).items() if value != defaults[key]}
    settings = {key: value for key, value in settings.items() if not key.startswith("base_model")}
    engine = f"transformers {metadata.version('transformers')}"
    return Verification(engine, name, _machine(model), settings, trace.lengths(), tuple(checks), cost)


def _machine(model: Any) -> dict[str, str]:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{os.cpu_count()} CPUs"
    return {
        "hf_stepflow": metadata.version("hf-stepflow"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {device}",
        "runs as": f"{str(model.dtype).removeprefix('torch.')}, {model.stepflow_runtime.base_implementation}, "
        f"{model.config.model_type}, on {model.device}",
    }


def _checks(model: Any, trace: ReadTrace) -> list[Check]:
    """The checks that run the model."""
    runtime, ids = model.stepflow_runtime, trace.ids
    watch = Watch(model, trace)
    with runtime.override(trace.rules, trace.prompt_length):
        on = model(ids).logits[0].float()
        with watch.watching():
            watch.total = ids.shape[1]
            model(ids)
            decoded = _decoded(model, trace, watch)
    with model.disable_stepflow():
        disabled = model(ids).logits[0]
        own = _difference(disabled, _decoded(model, trace, watch))
    with model.use_stepflow(_OFF):
        zero = model(ids).logits[0]
    with _detached(model):
        base = model(ids).logits[0]
    tolerance = _TOLERANCES.get(model.dtype, _TOLERANCES[torch.bfloat16])
    return [
        _floor_check(watch, tolerance),
        _injection_check(watch, tolerance),
        _reference_check(watch, tolerance),
        _decode_check(_difference(on, decoded), own, tolerance),
        _effect_check(on, base.float()),
        _off_check(base, disabled, zero),
    ]


def _decoded(model: Any, trace: ReadTrace, watch: Watch) -> torch.Tensor:
    """Logits of the prompt's last token and of all after it, token by token: [tokens, vocabulary]."""
    ids, watch.total = trace.ids, trace.prompt_length
    made = model(ids[:, : watch.total], use_cache=True)
    logits = [made.logits[0, -1:]]
    for token in range(trace.prompt_length, ids.shape[1]):
        watch.total = token + 1
        made = model(ids[:, token : token + 1], use_cache=True, **cache_argument(made))
        logits.append(made.logits[0])
    return torch.cat(logits)


def _difference(whole: torch.Tensor, decoded: torch.Tensor) -> float:
    """The largest difference between the logits of one pass and those of decoding, relative to the largest logit."""
    return float((whole[-len(decoded) :].float() - decoded.float()).abs().max() / whole.float().abs().max())


@contextmanager
def _detached(model: Any) -> Iterator[None]:
    """Inside the block StepFlow is taken off the model."""
    own: Any = type(model).__bases__[0]
    runtime = model.stepflow_runtime
    settings, preset = runtime.settings, model._stepflow_preset
    model.detach_stepflow()
    try:
        yield
    finally:
        own._put_on(model, settings, runtime.tokenizer, runtime.is_on)
        model._stepflow_preset = preset


def _steps_check(trace: ReadTrace) -> Check:
    lengths = trace.lengths()
    passed = lengths["thinking steps"] >= 2 and lengths["summary steps"] >= 1
    found = f"{lengths['thinking steps']} of {len(STEPS)} thinking steps, {lengths['summary steps']} in the summary"
    return Check("steps are found", passed, found, lengths)


def _floor_check(watch: Watch, tolerance: float) -> Check:
    name, layers = "floor in every bridged layer", sorted(watch.plan.tau)
    if not layers:
        return Check(name, True, "these settings switch the bridge off")
    silent = [layer for layer in layers if layer not in watch.seen or not watch.seen[layer].floors]
    if silent:
        return Check(name, False, f"attention in layers {silent} met no query with a floor", {"layers": silent})
    seen = [watch.seen[layer] for layer in layers]
    total, lifted = sum(each.floors for each in seen), sum(each.lifted for each in seen)
    worst = min(each.lowest for each in seen)
    found = f"{_listed(layers)}, {total} queries and heads, {lifted} lifted; least mass of a bridge {worst:.6f} floors"
    numbers = {"layers": layers, "queries": total, "lifted": lifted, "least_floors": worst, "tolerance": tolerance}
    return Check(name, worst >= 1 - tolerance, found, numbers)


def _injection_check(watch: Watch, tolerance: float) -> Check:
    name, layers = "injection in every layer of it", sorted(watch.plan.inject)
    if not layers:
        return Check(name, True, "these settings switch the injection off")
    silent = [layer for layer in layers if layer not in watch.seen or not watch.seen[layer].injections]
    if silent:
        return Check(name, False, f"attention in layers {silent} met no first token of a step", {"layers": silent})
    total = sum(watch.seen[layer].injections for layer in layers)
    least = min(watch.seen[layer].moved for layer in layers)
    found = f"{_listed(layers)}, {total} tokens; the least got {least:.4f} of what it should"
    numbers = {"layers": layers, "tokens": total, "least_share": least}
    # The injection is small beside the output, whose rounding is in the share.
    return Check(name, least > max(0.5, 1 - 100 * tolerance), found, numbers)


def _reference_check(watch: Watch, tolerance: float) -> Check:
    worst = max((each.error for each in watch.seen.values()), default=0.0)
    total = sum(each.queries for each in watch.seen.values())
    found = f"{total} outputs of attention within {worst:.1e} of the reference (allowed {tolerance:.0e})"
    passed = total > 0 and worst <= tolerance
    return Check("equal to the reference", passed, found, {"outputs": total, "error": worst, "tolerance": tolerance})


def _decode_check(error: float, own: float, tolerance: float) -> Check:
    allowed = max(tolerance, 2 * own)
    found = f"logits within {error:.1e} of those of one pass (allowed {allowed:.0e}; without StepFlow {own:.1e})"
    numbers = {"error": error, "without_stepflow": own, "tolerance": allowed}
    return Check("token by token as at once", error <= allowed, found, numbers)


def _effect_check(on: torch.Tensor, base: torch.Tensor) -> Check:
    effect = float((on - base).abs().max())
    found = f"logits differ from the base's by up to {effect:.4f}" if effect else "the logits are the base's"
    return Check("StepFlow is active", effect > 0, found, {"difference": effect})


def _off_check(base: torch.Tensor, disabled: torch.Tensor, zero: torch.Tensor) -> Check:
    parts = {"disable_stepflow": disabled, "settings of zero": zero}
    wrong = [name for name, logits in parts.items() if not torch.equal(logits, base)]
    found = f"other logits under {' and '.join(wrong)}" if wrong else "the base's logits, bit for bit"
    return Check("off is off", not wrong, found, {"different": wrong})


def _cost(model: Any, trace: ReadTrace, tokens: int, seed: int) -> dict[str, float]:
    """The median time of a decode step with StepFlow and without, which take turns in random order."""
    ids, first = trace.ids, trace.segment.index(1) + 1
    following = [token for token, segment in enumerate(trace.segment) if segment == 1 and token >= first]
    order = random.Random(seed)
    rules = {"on": trace.rules, "off": None}
    caches: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {"on": [], "off": []}
    for step in range(tokens + _WARM_UP):
        token = ids[:, following[step % len(following)], None]
        for arm in order.sample(sorted(rules), 2):
            with model.stepflow_runtime.override(rules[arm], trace.prompt_length):
                if arm not in caches:
                    caches[arm] = cache_argument(model(ids[:, :first], use_cache=True))
                _wait_for(model)
                start = time.perf_counter()
                model(token, use_cache=True, **caches[arm])
                _wait_for(model)
            if step >= _WARM_UP:
                times[arm].append(time.perf_counter() - start)
    on, off = (1000 * statistics.median(times[arm]) for arm in ("on", "off"))
    ratio = statistics.median(one / other for one, other in zip(times["on"], times["off"], strict=True))
    return {"on_ms": on, "off_ms": off, "ratio": ratio, "tokens": tokens}


def _wait_for(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _listed(layers: list[int]) -> str:
    return f"layers {', '.join(map(str, layers))}"
