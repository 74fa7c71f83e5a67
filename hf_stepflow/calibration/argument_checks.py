"""Whether a calibration can be carried to its end, told before it begins: some run for hours."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hf_stepflow.evaluation.mathematics import demand_math_verify
from hf_stepflow.evaluation.problems import EvalProblem
from hf_stepflow.prompts import encode_prompt, encode_response
from hf_stepflow.runtime.errors import StepFlowInputError

from .laboratory import Sampling


def check_numbers(sampling: Sampling, scored: int) -> None:
    """Refuses numbers that make no sense.

    Args:
        sampling: how responses are generated.
        scored: problems whose responses are scored for each candidate.

    Raises:
        StepFlowInputError: there are some.
    """
    samples, tokens, size, seed = sampling.samples, sampling.max_new_tokens, sampling.batch_size, sampling.seed
    if samples < 1 or tokens < 1 or size < 1 or scored < 2 or not 0 <= seed <= 10**9:
        raise StepFlowInputError(
            f"samples, max_new_tokens and batch_size must be at least 1, scored at least 2 and the seed in 0 to 10^9; "
            f"got {samples}, {tokens}, {size}, {scored} and {seed}"
        )
    if sampling.temperature <= 0:
        raise StepFlowInputError(
            f"the temperature must be above 0, got {sampling.temperature}", hint="samples=1 is greedy"
        )


def demand_packages(problems: Sequence[EvalProblem]) -> None:
    """Checks that what later stages need is installed.

    Args:
        problems: what is asked.

    Raises:
        StepFlowInputError: it is not.
    """
    if find_spec("optuna") is None:
        raise StepFlowInputError(
            "the search for settings needs optuna, which is not installed", hint="pip install 'hf-stepflow[calibrate]'"
        )
    demand_math_verify(problem.kind for problem in problems)


def check_lengths(model: Any, tokenizer: Any, problems: Sequence[EvalProblem], sampling: Sampling) -> None:
    """Refuses problems of either split that the model has no positions for.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        problems: those of both splits.
        sampling: how responses are generated.

    Raises:
        StepFlowInputError: a prompt with the response that may follow, or with its reference trace, is too long.
    """
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is None:
        return
    for problem in problems:
        prompt = len(encode_prompt(tokenizer, problem.prompt, **sampling.template))
        if prompt + sampling.max_new_tokens > room:
            raise StepFlowInputError(
                f"the prompt of problem {problem.id!r} has {prompt} tokens, which with a response of "
                f"max_new_tokens={sampling.max_new_tokens} makes {prompt + sampling.max_new_tokens}; this model has "
                f"{room} positions",
                hint=f"max_new_tokens of at most {max(room - prompt, 0)}, or leave this problem out",
            )
        trace = 0 if problem.trace is None else len(encode_response(tokenizer, problem.trace))
        if prompt + trace > room:
            raise StepFlowInputError(
                f"prompt and trace of problem {problem.id!r} have {prompt} and {trace} tokens; this model has {room} "
                f"positions",
                hint="leave this problem out, or its trace",
            )
