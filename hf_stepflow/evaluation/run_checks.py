"""Checks that a run can show anything: its settings, its limits, and its first responses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from hf_stepflow.prompts import encode_response
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowError, StepFlowInputError, shown
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings

from .answers import NO_ANSWER, UNFINISHED
from .markers import describe_markers, unknown_markers
from .problem import EvalProblem

logger = logging.get_logger(__name__)

# The fewest responses that may stop a run.
FEWEST = 4

# For each mechanism: its strength, its layers, its heads, and what the plan holds of it.
_MECHANISMS = (
    ("tau_max", "oeb_layers", "oeb_heads", "tau"),
    ("alpha", "smi_layers", None, "inject"),
    ("length_temperature", "length_temperature_layers", "length_temperature_heads", "gamma"),
)
_EXCERPT = 300  # characters of a response in an error
_MARKERS = "thinking_start and summary_start to the markers of the model, or implicit_thinking=True if it has none"


def check_arm(name: str, given: "dict[str, Any] | bool", plan: FlowPlan, longest: int) -> None:
    """Refuses an arm that asks for something which its other settings make impossible; warns if it asks for nothing.

    Args:
        name: The name of the arm.
        given: Its StepFlow settings, or True for those of the model.
        plan: The settings in force, resolved against the model.
        longest: The greatest number of tokens that a prompt and its response can have.

    Raises:
        StepFlowConfigError: A mechanism, or the sinks, cannot act in any response.
    """
    settings, asked = plan.settings, given if isinstance(given, dict) else {}
    for strength, layers, heads, part in _MECHANISMS:
        if asked.get(strength) and not getattr(plan, part):
            cause = f"{layers}={shown(getattr(settings, layers))}"
            if heads is not None and getattr(settings, heads) is not None:
                cause += f" and {heads}={shown(getattr(settings, heads))}"
            raise StepFlowConfigError(
                f"the arm {name!r} asks for {strength}={asked[strength]}, but {cause} leave it no layer to act in",
                hint=f"give {layers}, for instance 'all', or leave {strength} out",
            )
    base = settings.length_temperature_base
    if asked.get("length_temperature") and base is not None and base >= longest:
        raise StepFlowConfigError(
            f"the arm {name!r} sharpens attention in contexts of more than {base:g} tokens, and a prompt with its "
            f"response has {longest} at most",
            hint="give a smaller length_temperature_base, or a greater max_new_tokens",
        )
    if asked.get("sink_tokens", 0) >= longest:
        raise StepFlowConfigError(
            f"the arm {name!r} takes the first {settings.sink_tokens} tokens out of the bridge, and a prompt with its "
            f"response has {longest} at most: nothing is left of the bridge",
            hint="sink_tokens of 0 to 4 are usual",
        )
    if not any(getattr(plan, part) for *_, part in _MECHANISMS):
        logger.warning("The arm %r is the base: its settings turn every mechanism of StepFlow off.", name)


def warn_of_markers(tokenizer: Any, settings: StepFlowSettings, prompts: Iterable[Sequence[int]]) -> None:
    """Warns if nothing shows that the model marks its thinking as the settings say."""
    markers = unknown_markers(tokenizer, settings, prompts)
    if markers:
        logger.warning(
            "Neither the vocabulary nor the chat template nor a prompt has %s, which should start the thinking. "
            "Unless the model writes it, StepFlow finds no steps. Set %s.",
            " or ".join(map(repr, markers)),
            _MARKERS,
        )


def warn_of_length(tokenizer: Any, problems: Sequence[EvalProblem], max_new_tokens: int) -> None:
    """Warns if no response can be as long as the shortest known one: a trace, or the bare answer."""
    known = [problem.trace or problem.answer for problem in problems if problem.kind != "code" or problem.trace]
    if not known:
        return
    # A token has at least one character only as a rule; the texts are few enough to encode the shortest ones.
    shortest = min(len(encode_response(tokenizer, text)) for text in sorted(known, key=len)[:8])
    if shortest > max_new_tokens:
        logger.warning(
            "max_new_tokens=%d is less than the %d tokens of the shortest right response that is known, so perhaps no "
            "response can be finished. Set max_new_tokens to at least %d.",
            max_new_tokens,
            shortest,
            shortest,
        )


def check_steps(results: Sequence[Mapping[str, Any]], settings: StepFlowSettings) -> None:
    """Refuses to look for settings of StepFlow on responses without a thinking step.

    Args:
        results: The first results of the base, as the results file holds them.
        settings: The settings whose markers are looked for.

    Raises:
        StepFlowConfigError: At least `FEWEST` responses ended, and none has a step.
    """
    ended = [one for one in results if one["outcome"] != UNFINISHED]  # the others may have been cut before a step
    if len(ended) >= FEWEST and not any(one["steps"] for one in results):
        raise StepFlowConfigError(
            f"no thinking step was found in any of the first {len(results)} responses of the base "
            f"({describe_markers(settings)}), so StepFlow could do nothing",
            hint=f"set {_MARKERS}",
        )


@dataclass
class FirstResponses:
    """The first responses of one arm, read batch by batch until they show that the run can mean something.

    Attributes:
        name: The name of the arm.
        settings: The settings whose markers are looked for.
        plan: The settings resolved against the model if StepFlow is on, else None.
        max_new_tokens: The number of tokens that a response may have.
        may_go_on: Whether the caller has a way to go on regardless, which errors then name.
    """

    name: str
    settings: StepFlowSettings
    plan: FlowPlan | None
    max_new_tokens: int
    may_go_on: bool = True
    _is_answered: bool = field(default=False, init=False)
    _is_active: bool = field(default=False, init=False)
    _are_cut: bool = field(default=False, init=False)

    def check(self, results: Sequence[Mapping[str, Any]], *, is_all: bool = False, may_stop: bool = True) -> None:
        """Checks all results of the arm so far; fewer than `FEWEST` stop no run.

        Args:
            results: The results, as the results file holds them.
            is_all: Whether there will be no more: few of them then give a warning.
            may_stop: Whether to raise; otherwise there is a warning.

        Raises:
            StepFlowInputError: No response that ended has an answer.
            StepFlowConfigError: StepFlow was on and did nothing.
        """
        if not self._is_answered:
            self._look_for_answers(results, is_all, may_stop)
        if not self._is_active and self.plan is not None:
            self._look_for_effects(results, self.plan, is_all, may_stop)

    def _look_for_answers(self, results: Sequence[Mapping[str, Any]], is_all: bool, may_stop: bool) -> None:
        ended = [one for one in results if one["outcome"] != UNFINISHED]
        self._is_answered = any(one["outcome"] != NO_ANSWER for one in ended)
        if not ended and not self._are_cut and (is_all or len(results) >= FEWEST):
            self._are_cut = True
            logger.warning(
                "None of the first %d responses of the arm %r ended within max_new_tokens=%d, and unfinished "
                "responses count as wrong. Raise max_new_tokens.",
                len(results),
                self.name,
                self.max_new_tokens,
            )
        if self._is_answered or not ended or (len(ended) < FEWEST and not is_all):
            return
        text = " ".join(ended[0]["text"].split())
        self._stop(
            StepFlowInputError(
                f"no answer was found in any of the first {len(ended)} finished responses of the arm {self.name!r} "
                f"({describe_markers(self.settings)}). The one to problem {ended[0]['problem']!r} is: "
                f"{text if len(text) <= _EXCERPT else '...' + text[-_EXCERPT:]}",
                hint="let the question ask for the answer in \\boxed{} or after 'The answer is'; if the model marks "
                f"its thinking in another way, set {_MARKERS}{self._way_on}",
            ),
            may_stop and len(ended) >= FEWEST,
        )

    def _look_for_effects(
        self, results: Sequence[Mapping[str, Any]], plan: FlowPlan, is_all: bool, may_stop: bool
    ) -> None:
        has_steps = any(one["steps"] for one in results)
        effects = [one.get("stepflow") for one in results]  # there are none for beams
        bridges = any(has_steps if one is None else one["bridged_share"] is not None for one in effects)
        injects = any(has_steps if one is None else one["injections"] for one in effects)
        idle = ["the bridge"] * (bool(plan.tau) and not bridges) + ["the injection"] * (
            bool(plan.inject) and not injects
        )
        self._is_active = bool(results) and not idle
        if not idle or (len(results) < FEWEST and not is_all):
            return
        has_ended = any(one["outcome"] != UNFINISHED for one in results)  # a limit that cuts all is another matter
        works = plan.gamma or (plan.tau and bridges) or (plan.inject and injects)
        way_out = "see step_rule and min_step_chars" if has_steps else f"set {_MARKERS}"
        self._is_active = True  # or it stops; one warning is enough
        self._stop(
            StepFlowConfigError(
                f"{' and '.join(idle)} did nothing in any of the first {len(results)} responses of the arm "
                f"{self.name!r}: {'there were too few steps' if has_steps else 'no thinking step was found'} "
                f"({describe_markers(plan.settings)})",
                hint=f"{way_out}{self._way_on}",
            ),
            may_stop and not works and len(results) >= FEWEST and has_ended,
        )

    @property
    def _way_on(self) -> str:
        return "; --no-check (check=False) goes on regardless" if self.may_go_on else ""

    def _stop(self, error: StepFlowError, may_stop: bool) -> None:
        """Raises an error, or logs it."""
        if may_stop:
            raise error
        logger.warning("%s\nhint: %s", error.message, error.hint)
