"""Runs an evaluation: every arm gets the same problems, seeds and batches, and a stopped run can be continued."""

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_stepflow.runtime.errors import StepFlowInputError

from .answers import check_may_run
from .arms import Arm, make_arms
from .checkers import demand_math_verify
from .engine import engine_of
from .markers import describe_markers
from .problem import EvalProblem, as_problems
from .progress import RunProgress, announce
from .responses import ResponseMaker
from .result import EvaluationResult
from .run_checks import FirstResponses, check_arm, warn_of_length, warn_of_markers
from .sampler import check_generation
from .store import ResultStore, digest

logger = logging.get_logger(__name__)


def evaluate(
    model: Any,
    problems: Iterable[Any],
    arms: dict[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    n_samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 2048,
    out: str | Path | None = None,
    progress: bool = True,
    run_code: bool = False,
    template: dict[str, Any] | None = None,
    keep_ids: bool = False,
    check: bool = True,
    until: str | None = None,
    kl: bool = True,
    **generation: Any,
) -> EvaluationResult:
    """Runs every arm on the same problems and compares it with the first.

    Args:
        model: A causal language model, with or without StepFlow attached, which is left as it was; or an `Engine`. On
            a CPU, judge in float32: rounding to bfloat16 alone changes results.
        problems: `EvalProblem`s, or dicts with `id`, `question` and `answer` (see `load_problems`).
        arms: {name: False | True | dict of StepFlow settings | `Arm`}; None compares the base with the model's own
            settings.
        tokenizer: The model's tokenizer; None takes that of an attached model, or loads it from the model's path.
        n_samples: The number of responses to each problem; more than one needs `do_sample=True`.
        seed: The seed of sampling and resampling.
        batch_size: The number of responses generated together; prompts of similar length are padded on the left.
        max_new_tokens: The number of tokens that a response may have.
        out: A JSONL file to which each batch appends its results; if it holds a part of this run, the run continues.
        progress: Whether to say which markers are looked for, and to show a progress bar with the running accuracies,
            tokens per second and the time left.
        run_code: Whether programs that the model wrote may be run, for problems with tests.
        template: Further arguments of the chat template, such as `enable_thinking`.
        keep_ids: Whether to keep the token ids of the responses.
        check: Whether to stop if the first responses show that the run can mean nothing: none that ended has an
            answer, or StepFlow was on and did nothing. Otherwise there is a warning at the end.
        until: "decided" stops as soon as every arm is measurably better or worse than the first, by a test that holds
            whenever one looks; batches then come in random order. None answers every problem.
        kl: Whether to measure first, on a few hundred tokens of text without a task, how far each arm moves the
            next-token predictions of the model.
        **generation: Further arguments of `generate`, such as `do_sample`, `temperature`, `top_p`.

    Raises:
        StepFlowInputError: An argument makes no sense, a prompt is too long for the model, `out` holds another run, or
            the first responses have no answers.
        StepFlowError: Settings do not fit the model, or an arm's StepFlow does nothing.

    Example:
        >>> from hf_stepflow import evaluate, load_problems, load_reasoner
        >>> model, problems = load_reasoner()[0], load_problems("reasoner:chains-2", 2)
        >>> result = evaluate(model, problems, {"base": False, "flow": {"tau_max": 0.15}}, progress=False)
        >>> [arm.name for arm in result.arms()]
        ['base', 'flow']
    """
    chosen = make_arms({"base": False, "stepflow": True} if arms is None else arms)
    asked = as_problems(problems)
    counts = {"n_samples": n_samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    check_generation(counts, seed, generation.get("temperature"))
    if n_samples > 1 and not generation.get("do_sample"):
        raise StepFlowInputError(
            f"n_samples={n_samples} greedy responses would all be the same", hint="pass do_sample=True, or n_samples=1"
        )
    if until not in (None, "decided"):
        raise StepFlowInputError(f"until must be None or 'decided', got {until!r}")
    if until is not None and n_samples > 1:
        raise StepFlowInputError(
            f"until={until!r} looks at whole problems, and a batch may hold some of the {n_samples} samples of one",
            hint="leave until or n_samples out; arms that vote on samples of their own are fine",
        )
    if generation.get("num_return_sequences", 1) != 1:
        raise StepFlowInputError("evaluate takes no num_return_sequences", hint="use n_samples or Arm(samples=...)")
    for problem in asked:
        check_may_run(problem, run_code)
    demand_math_verify(problem.kind for problem in asked)
    needs_stepflow = any(arm.stepflow is not False for arm in chosen.values())
    with engine_of(model, tokenizer, needs_stepflow) as engine:
        vocabulary, rules = engine.vocabulary, {name: engine.rules_of(arm) for name, arm in chosen.items()}
        sampler = engine.sampler(chosen, max_new_tokens, generation, template or {}, run_code, keep_ids)
        encoded = {
            instruction: [sampler.encode(problem, instruction) for problem in asked]
            for instruction in {arm.instruction for arm in chosen.values()}
        }
        prompts = {name: encoded[arm.instruction] for name, arm in chosen.items()}
        _check_lengths(engine.positions, asked, prompts, max_new_tokens, chosen)
        first_responses = {}
        for name, arm in chosen.items():
            own, limit = rules[name], int(max_new_tokens * arm.length_factor)
            settings = vocabulary.settings if own is None else own.vocabulary.settings
            first_responses[name] = FirstResponses(name, settings, None if own is None else own.plan, limit)
            if own is not None:
                check_arm(name, arm.stepflow, own.plan, max(map(len, prompts[name])) + limit)
                warn_of_markers(engine.tokenizer, settings, prompts[name])
        warn_of_length(engine.tokenizer, asked, max(one.max_new_tokens for one in first_responses.values()))
        if not sampler.ends:
            logger.warning(
                "The model names no token that ends a turn (eos_token_id), so every response is unfinished."
            )
        header = {
            "problems": digest([problem.asked() for problem in asked]),
            "n_problems": len(asked),
            **engine.identity(),
            "arms": {name: arm.to_dict() for name, arm in chosen.items()},
            **counts,
            "seed": seed,
            "generation": {**generation, **(template or {})},
        }
        if until is not None:
            header["until"] = until
        try:
            json.dumps(header)
        except TypeError as error:
            raise StepFlowInputError(
                f"arguments of generate must be JSON-ready here, because they identify the run: {error}"
            ) from error
        measured = (lambda: {"kl": engine.next_token_kl(chosen, asked, template or {})}) if kl else dict
        store = ResultStore(out, header, lambda: engine.about() | measured())
        by_markers: dict[str, list[str]] = {}
        for name, one in first_responses.items():
            by_markers.setdefault(describe_markers(one.settings), []).append(name)
        for text, names in by_markers.items():
            announce(f"Judging {', '.join(names)}: {text}.", progress)
        _answer(sampler, chosen, asked, prompts, store, progress, first_responses, check)
        _warn_of_idle_budgets(chosen, store.results)
    return EvaluationResult(header, store.about, store.results)


def _answer(
    sampler: ResponseMaker,
    arms: dict[str, Arm],
    problems: list[EvalProblem],
    prompts: dict[str, list[list[int]]],
    store: ResultStore,
    progress: bool,
    first_responses: dict[str, FirstResponses],
    check: bool,
) -> None:
    """Generates and stores the results that the store lacks, batch by batch."""
    n_samples, seed, size = (store.header[name] for name in ("n_samples", "seed", "batch_size"))
    # By the length of the first arm's prompts, so that every arm gets the same batches.
    order = sorted(range(len(problems)), key=lambda index: len(next(iter(prompts.values()))[index]))
    items = [(index, sample) for index in order for sample in range(n_samples)]
    done = {(result["arm"], result["problem"], result["sample"]) for result in store.results}
    limits = {name: one.max_new_tokens * arms[name].samples for name, one in first_responses.items()}
    bar = RunProgress(list(arms), len(items), store.results, limits, progress)
    sampler.progress = bar.count if progress else None
    own = {name: [one for one in store.results if one["arm"] == name] for name in arms}
    if check:
        for name, first in first_responses.items():
            first.check(own[name])
    starts = list(enumerate(range(0, len(items), size)))
    if "until" in store.header:  # else the first problems would all be short
        random.Random(seed).shuffle(starts)
    try:
        for number, start in starts:
            if "until" in store.header and EvaluationResult(store.header, {}, store.results).is_decided:
                break
            batch = items[start : start + size]
            asked = [problems[index] for index, _ in batch]
            for name in list(arms) if number % 2 == 0 else reversed(arms):  # no arm is always the one that warms up
                if all((name, problems[index].id, sample) in done for index, sample in batch):
                    continue
                bar.begin(name, len(batch))
                made = sampler.run(
                    arms[name], asked, [prompts[name][index] for index, _ in batch], batch_seed(seed, number)
                )
                place = {"arm": name, "batch": number, "of": len(batch)}
                rows = [
                    {"problem": problem.id, "sample": sample, **place, **result}
                    for problem, (_, sample), result in zip(asked, batch, made, strict=True)
                ]
                store.append(rows)
                own[name] += rows
                bar.end()
                if check:
                    first_responses[name].check(own[name])
    finally:
        bar.close()
    for name, first in first_responses.items():
        first.check(own[name], is_all=True, may_stop=check)


def _check_lengths(
    room: int | None,
    problems: list[EvalProblem],
    prompts: dict[str, list[list[int]]],
    max_new_tokens: int,
    arms: dict[str, Arm],
) -> None:
    """Refuses prompts for which the model lacks positions, before anything is generated."""
    for name, arm in arms.items():
        longest = max(range(len(problems)), key=lambda index: len(prompts[name][index]))
        length = len(prompts[name][longest])
        wanted = length + int(max_new_tokens * arm.length_factor)
        if room is not None and wanted > room:
            fitting = int(max(room - length, 0) / arm.length_factor)
            raise StepFlowInputError(
                f"the prompt of problem {problems[longest].id!r} has {length} tokens in the arm {name!r}, which with "
                f"the response makes {wanted}; this model has {room} positions",
                hint=f"max_new_tokens of at most {fitting}, or shorter problems",
            )


def _warn_of_idle_budgets(arms: dict[str, Arm], results: list[dict[str, Any]]) -> None:
    for name, arm in arms.items():
        own = [result["steps"] for result in results if result["arm"] == name]
        if (arm.min_steps or arm.max_steps is not None) and own and not any(own):
            logger.warning(
                "The budget of the arm %r did nothing: no thinking was found in any response. If the model does not "
                "mark its thinking, attach StepFlow with implicit_thinking=True.",
                name,
            )


def batch_seed(seed: int, batch: int) -> int:
    """The seed of one batch, the same for every arm."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:4], "big")
