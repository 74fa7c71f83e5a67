"""Whether a calibration can be carried to its end, told before it begins: some run for hours."""

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
