"""evaluate: the same problems, seeds and batches for every arm, resumable, with a verdict."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import logging

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.step_detector import StepVocabulary

from .answers import check_may_run
from .arms import Arm, make_arms
from .checkers import demand_math_verify
from .problem import EvalProblem, check_unique, problem_of
from .result import EvaluationResult
from .sampler import Sampler, check_generation
from .store import ResultStore, digest, machine, model_digest

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
    **generation: Any,
) -> EvaluationResult:
    """Runs every arm on the same problems and compares them with the first.

    Args:
        model: a causal language model, StepFlow attached or not; left as it was. Judge in float32 on a CPU: rounding
            to bfloat16 alone flips results.
        problems: `EvalProblem`s, or dicts with `id`, `question`, `answer` (see `load_problems`).
        arms: {name: False | True | dict of StepFlow settings | `Arm`}; None for base against the model's own settings.
        tokenizer: the model's tokenizer; None takes that of an attached model, or loads it from the model's path.
        n_samples: responses to each problem; more than one asks for `do_sample=True`.
        seed: of sampling and of resampling.
        batch_size: responses generated together, padded on the left, of like length.
        max_new_tokens: tokens that a response may have.
        out: JSONL file that results are appended to after each batch; a run that was stopped is continued.
        progress: show a progress bar with the running accuracies.
        run_code: allow running programs that the model wrote, for problems with tests.
        template: further arguments of the chat template, such as `enable_thinking`.
        keep_ids: keep the token ids of the responses too.
        **generation: further arguments of `generate`, such as `do_sample`, `temperature`, `top_p`.

    Raises:
        StepFlowInputError: arguments that make no sense, prompts too long for the model, another run's file.
        StepFlowError: settings that do not fit the model.
    """
    chosen = make_arms({"base": False, "stepflow": True} if arms is None else arms)
    asked = check_unique(one if isinstance(one, EvalProblem) else problem_of(one) for one in problems)
    check_generation(
        {"n_samples": n_samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens},
        seed,
        generation.get("temperature"),
    )
    if n_samples > 1 and not generation.get("do_sample"):
        raise StepFlowInputError(
            f"n_samples={n_samples} greedy responses would all be the same", hint="pass do_sample=True, or n_samples=1"
        )
    if generation.get("num_return_sequences", 1) != 1:
        raise StepFlowInputError(
            "num_return_sequences is not for the runner", hint="use n_samples or Arm(samples=...)"
        )
    for problem in asked:
        check_may_run(problem, run_code)
    demand_math_verify(problem.kind for problem in asked)
    with _ready(model, tokenizer, chosen) as (vocabulary, tokenizer):
        sampler = Sampler(model, tokenizer, vocabulary, max_new_tokens, generation, template or {}, run_code, keep_ids)
        encoded = {
            instruction: [sampler.encode(problem, instruction) for problem in asked]
            for instruction in {arm.instruction for arm in chosen.values()}
        }
        prompts = {name: encoded[arm.instruction] for name, arm in chosen.items()}
        _check_lengths(model, asked, prompts, max_new_tokens, chosen)
        items = _sorted_by_length(asked, prompts, n_samples)
        runtime = getattr(model, "stepflow_runtime", None)
        header = {
            "problems": digest([problem.asked() for problem in asked]),
            "n_problems": len(asked),
            "model": model_digest(model),
            "tokenizer": digest([len(tokenizer), tokenizer.chat_template]),
            "dtype": str(model.dtype).removeprefix("torch."),
            "settings": None if runtime is None else runtime.settings.to_dict(),
            "generation_config": _generation_config(model),
            "attention": model.config._attn_implementation,
            "device": model.device.type,
            "arms": {name: arm.to_dict() for name, arm in chosen.items()},
            "n_samples": n_samples,
            "seed": seed,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "generation": {**generation, **(template or {})},
        }
        try:
            json.dumps(header)
        except TypeError as error:
            raise StepFlowInputError(
                f"arguments of generate must be JSON-ready here, since runs are told apart by them: {error}"
            ) from error
        about = {"model": getattr(model.config, "_name_or_path", ""), **machine(model.device)}
        store = ResultStore(out, header, about)
        _run(sampler, chosen, items, store, seed, batch_size, progress)
        _warn_of_idle_budgets(chosen, store.results)
    return EvaluationResult(header, about, store.results)


# A problem, which of its samples, and the prompt of each arm.
Item = tuple[EvalProblem, int, dict[str, list[int]]]


def _run(
    sampler: Sampler,
    arms: dict[str, Arm],
    items: list[Item],
    store: ResultStore,
    seed: int,
    batch_size: int,
    progress: bool,
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm

    done = {(result["arm"], result["problem"], result["sample"]) for result in store.results}
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for result in store.results:
        _count(tally, [result])
    bar = tqdm(
        total=len(items) * len(arms),
        initial=len(done),
        disable=not progress or are_progress_bars_disabled(),
        unit="response",
    )
    _show(bar, arms, tally)
    for number, start in enumerate(range(0, len(items), batch_size)):
        batch = items[start : start + batch_size]
        names = list(arms)
        for name in names if number % 2 == 0 else reversed(names):  # no arm is always the one that warms up
            if all((name, problem.id, sample) in done for problem, sample, _ in batch):
                continue
            made = sampler.run(
                arms[name], [item[0] for item in batch], [item[2][name] for item in batch], batch_seed(seed, number)
            )
            results = [
                {"arm": name, "problem": problem.id, "sample": sample, "batch": number, "of": len(batch), **result}
                for (problem, sample, _), result in zip(batch, made, strict=True)
            ]
            store.append(results)
            _count(tally, results)
            bar.update(len(results))
            _show(bar, arms, tally)
    bar.close()


def _count(tally: dict[str, list[int]], results: list[dict[str, Any]]) -> None:
    for result in results:
        tally[result["arm"]][0] += result["right"]
        tally[result["arm"]][1] += 1


def _show(bar: Any, arms: dict[str, Arm], tally: dict[str, list[int]]) -> None:
    """The running accuracy of the first arm, and how far the others are from it."""
    first, *others = arms
    if not tally[first][1]:
        return
    base = tally[first][0] / tally[first][1]
    texts = [f"{first} {base:.1%}"]
    texts += [f"{name} {100 * (tally[name][0] / tally[name][1] - base):+.1f}" for name in others if tally[name][1]]
    bar.set_postfix_str(", ".join(texts))


@contextmanager
def _ready(model: Any, tokenizer: Any, arms: dict[str, Arm]) -> Iterator[tuple[StepVocabulary, Any]]:
    """The model in evaluation mode, with StepFlow if an arm needs it; as it was afterwards."""
    runtime = getattr(model, "stepflow_runtime", None)
    if runtime is not None and runtime.is_overridden:
        raise StepFlowInputError(
            "arms say when StepFlow is on, but evaluate was called inside of disable_stepflow or use_stepflow",
            hint="call it outside, and give the settings as an arm",
        )
    attaches = runtime is None and any(arm.stepflow is not False for arm in arms.values())
    was_training = model.training
    if attaches:
        StepFlowModelForCausalLM.attach(model, tokenizer=tokenizer)
        runtime = model.stepflow_runtime
    try:
        model.eval()
        if runtime is None:
            tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(model)
            vocabulary = StepVocabulary.from_tokenizer(tokenizer)
        else:
            tokenizer = tokenizer if tokenizer is not None else runtime.tokenizer
            vocabulary = runtime.rules.vocabulary
            for arm in arms.values():
                if isinstance(arm.stepflow, dict):
                    runtime.rules_for(runtime.settings.replace(**arm.stepflow))  # raises before anything is generated
        yield vocabulary, tokenizer
    finally:
        if attaches:
            model.detach_stepflow()
        model.train(was_training)


def _load_tokenizer(model: Any) -> Any:
    path = getattr(model.config, "_name_or_path", "")
    if not path:
        raise StepFlowInputError("the model names no path to load its tokenizer from", hint="pass tokenizer=...")
    return transformers.AutoTokenizer.from_pretrained(path)


def _sorted_by_length(problems: list[EvalProblem], prompts: dict[str, list[list[int]]], n_samples: int) -> list[Item]:
    """The problems by the length of the first arm's prompts: every arm gets the same batches."""
    first = next(iter(prompts.values()))
    order = sorted(range(len(problems)), key=lambda index: len(first[index]))
    return [
        (problems[index], sample, {name: own[index] for name, own in prompts.items()})
        for index in order
        for sample in range(n_samples)
    ]


def _check_lengths(
    model: Any,
    problems: list[EvalProblem],
    prompts: dict[str, list[list[int]]],
    max_new_tokens: int,
    arms: dict[str, Arm],
) -> None:
    """Refuses what the model has no positions for, before anything is generated."""
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
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


def _generation_config(model: Any) -> dict[str, Any]:
    """What the model's own generation config changes: it holds where a run asks for nothing else."""
    return {
        key: value for key, value in model.generation_config.to_diff_dict().items() if key != "transformers_version"
    }


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
