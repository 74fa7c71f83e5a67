"""The responses of one batch under one arm, whatever generates them: prompts, steps, verdicts and votes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_stepflow.prompts import encode_prompt
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.report import RowReport
from hf_stepflow.runtime.step_detector import SUMMARY, THINKING, Field, StepVocabulary

from .answers import CORRECT, judge, votes
from .arms import Arm
from .emphasis import emphasised_tokens
from .loops import ends_in_loop
from .problem import EvalProblem


@dataclass(frozen=True)
class Response:
    """One response to one prompt.

    Attributes:
        ids: Its token ids, including the end of the turn.
        text: Its text, including special tokens.
        summary: The text in which the answer is looked for, without special tokens: what follows the thinking, or
            all of the response if thinking is implicit or nothing follows it.
        steps: The number of thinking steps.
        is_finished: Whether the model ended its turn.
        report: The effect of StepFlow, if it was on.
        is_closed: Whether the response got beyond its thinking.
    """

    ids: list[int]
    text: str
    summary: str
    steps: int
    is_finished: bool
    report: RowReport | None = None
    is_closed: bool = True


@dataclass
class ResponseMaker:
    """Asks for responses under any arm and judges them; subclasses say what generates.

    Attributes:
        model: The model, or the engine that runs it.
        tokenizer: The model's tokenizer.
        vocabulary: The step rules of the model, for arms that do not change them.
        max_new_tokens: The number of tokens that a response may have.
        generation: Further arguments of `generate`.
        template: Further arguments of the chat template.
        run_code: Whether programs may be run to judge them.
        keep_ids: Whether results hold the token ids of their responses.
        progress: A function that is called about twice a second with the number of tokens that a batch has so far.
    """

    model: Any
    tokenizer: Any
    vocabulary: StepVocabulary
    max_new_tokens: int
    generation: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    run_code: bool = False
    keep_ids: bool = False
    progress: Callable[[int], Any] | None = None

    def encode(self, problem: EvalProblem, instruction: str | None = None) -> list[int]:
        """Encodes a prompt, in the chat template if there is one.

        Args:
            problem: The problem to ask.
            instruction: A text that ends the user's message.
        """
        ids = encode_prompt(self.tokenizer, _message(problem, instruction), **self.template)
        if not ids:
            raise StepFlowInputError(f"the prompt of problem {problem.id!r} has no tokens")
        return ids

    def run(self, arm: Arm, problems: Sequence[EvalProblem], prompts: Sequence[list[int]], seed: int) -> list[dict]:
        """Answers one batch.

        Args:
            arm: The arm.
            problems: The problems of the batch.
            prompts: Their token ids.
            seed: The seed of the batch, the same for every arm.

        Returns:
            For each problem its outcome, answer, right, tokens (of all samples), seconds (its share of the batch),
            steps, loops (the samples that end in one) and text; `votes` if there are several samples: for each its
            tokens, answer and outcome, and whether the vote up to it is right; and `stepflow` if StepFlow was on: its
            mean effect.
        """
        places = None
        if arm.rival is not None:
            places = [
                emphasised_tokens(
                    self.tokenizer, problem.prompt, _message(problem, arm.instruction), prompt, **self.template
                )
                for problem, prompt in zip(problems, prompts, strict=True)
            ]
        responses, seconds = self.respond(arm, prompts, seed, places)
        results = []
        for index, problem in enumerate(problems):
            own = responses[index * arm.samples : (index + 1) * arm.samples]
            verdicts = [judge(problem, one.summary, one.is_finished, run_code=self.run_code) for one in own]
            voted = votes(problem, verdicts)
            verdict, chosen = voted[-1].verdict, own[voted[-1].chosen]
            result: dict[str, Any] = {
                "outcome": verdict.outcome,
                "right": verdict.outcome == CORRECT,
                "answer": verdict.answer,
                "tokens": sum(len(one.ids) for one in own),
                "seconds": round(seconds / len(problems), 4),
                "steps": chosen.steps,
                "loops": sum(not one.is_finished and ends_in_loop(one.ids) for one in own),
                "text": chosen.text,
            }
            if arm.samples > 1:
                result["votes"] = [
                    {
                        "tokens": len(one.ids),
                        "answer": its.answer,
                        "outcome": its.outcome,
                        "right": vote.verdict.outcome == CORRECT,
                    }
                    for one, its, vote in zip(own, verdicts, voted, strict=True)
                ]
            if self.keep_ids:
                result["ids"] = chosen.ids
            if chosen.report is not None:
                result["stepflow"] = _mean_effect(chosen.report)
            results.append(result)
        return results

    def respond(
        self, arm: Arm, prompts: Sequence[list[int]], seed: int, places: Sequence[list[int]] | None = None
    ) -> tuple[list[Response], float]:
        """Generates `arm.samples` responses to each prompt.

        Args:
            arm: The arm.
            prompts: Token ids, of any lengths.
            seed: The seed of the sampling.
            places: For each prompt the places of the question in it, towards which the arm's rival steers attention;
                not needed without a rival.

        Returns:
            The responses, those of one prompt together, and the seconds that generation took.
        """
        raise NotImplementedError

    @property
    def ends(self) -> set[int]:
        """The ids that end a turn."""
        raise NotImplementedError

    def read_response(
        self, vocabulary: StepVocabulary, prompt: list[int], ids: list[int], report: RowReport | None = None
    ) -> Response:
        """Reads one response.

        Args:
            vocabulary: The step rules.
            prompt: The token ids of its prompt.
            ids: Its own, with whatever follows the end of the turn.
            report: The effect of StepFlow on it, if that is known.
        """
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        own = ids if end is None else ids[: end + 1]
        records = vocabulary.scan(prompt + ids[:end], prompt_length=len(prompt))
        written, settings = records[len(prompt) :], vocabulary.settings
        thought = [place for place, record in enumerate(written) if record[Field.LABEL] % 3 == THINKING]
        summary = ""
        # Implicit thinking ends at a phrase that belongs to the answer: \boxed{ opens the box.
        if thought and not settings.implicit_thinking:
            after = zip(own[thought[-1] + 1 :], written[thought[-1] + 1 :], strict=False)
            ids_of_summary = [token for token, record in after if record[Field.LABEL] % 3 == SUMMARY]
            summary = self.tokenizer.decode(ids_of_summary, skip_special_tokens=True)
        if not summary.strip():  # a model that marks no summary may answer anywhere
            summary = self.tokenizer.decode(own, skip_special_tokens=True)
        return Response(
            ids=own,
            text=self.tokenizer.decode(own),
            summary=summary,
            steps=records[-1][Field.THINKING_STEPS] if records else 0,
            is_finished=end is not None,
            report=report,
            is_closed=not records or records[-1][Field.SEGMENT] != THINKING,
        )


def _message(problem: EvalProblem, instruction: str | None) -> str:
    """The user's message."""
    return problem.prompt if instruction is None else f"{problem.prompt}\n\n{instruction}"


def _mean_effect(report: RowReport) -> dict[str, Any]:
    """The effect of StepFlow on one response: means over the bridge queries of all layers, and injections."""
    layers = [layer for layer in report.layers if layer.bridge_queries]
    queries = sum(layer.bridge_queries for layer in layers)
    effect: dict[str, Any] = {
        name: round(sum(getattr(layer, name) * layer.bridge_queries for layer in layers) / queries, 5)
        if queries
        else None
        for name in ("bridged_share", "mass_before", "mass_after")
    }
    return effect | {"injections": sum(layer.injections for layer in report.layers)}
