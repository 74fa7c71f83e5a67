"""Whether a calibration can be carried to its end, told before it begins: some run for hours."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hf_stepflow.evaluation.generation import check_generation
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
    counts = {name: getattr(sampling, name) for name in ("samples", "max_new_tokens", "batch_size")}
    check_generation(counts, sampling.seed, sampling.temperature)
    if type(scored) is not int or scored < 2:
        raise StepFlowInputError(f"scored must be a whole number of at least 2, got {scored!r}")


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
