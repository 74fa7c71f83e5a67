"""Generates the responses of one batch under one arm with transformers, and judges them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_stepflow.prompts import encode_prompt
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.logits_process import StepBudgetLogitsProcessor
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.report import RowReport
from hf_stepflow.runtime.step_detector import SUMMARY, THINKING, Field, StepVocabulary

from .answers import CORRECT, judge, votes
from .arms import Arm
from .problem import EvalProblem
from .progress import TokenCounter


def check_generation(counts: Mapping[str, Any], seed: Any, temperature: Any) -> None:
    """Refuses arguments at which generation, or the statistics after it, would fail.

    Args:
        counts: Whole numbers of at least one, by the names of their arguments.
        seed: A whole number of at least zero.
        temperature: The temperature of the sampling, above zero; None leaves it to the model.

    Raises:
        StepFlowInputError: An argument is something else.
    """
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise StepFlowInputError(f"{name} must be a whole number of at least 1, got {count!r}")
    if type(seed) is not int or seed < 0:
        raise StepFlowInputError(f"the seed must be a whole number of at least 0, got {seed!r}")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (is_number and 0 < temperature < math.inf):
        raise StepFlowInputError(
            f"the temperature must be a number above 0, got {temperature!r}",
            hint="it is for sampling: a single response without do_sample=True is greedy and takes none",
        )


@contextmanager
def prepared(model: Any, tokenizer: Any = None, stepflow: Any = None, *, attach: bool = False) -> Iterator[Any]:
    """Puts a model into evaluation mode, with StepFlow attached if asked for, and restores it afterwards.

    Args:
        model: A causal language model.
        tokenizer: The model's tokenizer.
        stepflow: The settings to attach, as for `StepFlowModelForCausalLM.attach`.
        attach: Whether StepFlow is needed. If it is attached already, it stays as it is.

    Yields:
        The runtime of StepFlow, or None without StepFlow.
    """
    was_training = model.training
    attaches = attach and getattr(model, "stepflow_runtime", None) is None
    if attaches:
        StepFlowModelForCausalLM.attach(model, stepflow, tokenizer=tokenizer)
    try:
        model.eval()
        yield getattr(model, "stepflow_runtime", None)
    finally:
        if attaches:
            model.detach_stepflow()
        model.train(was_training)


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
class Sampler:
    """Generates with one model under any arm.

    Attributes:
        model: The model, with StepFlow attached if an arm needs it.
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
        prompt = problem.prompt if instruction is None else f"{problem.prompt}\n\n{instruction}"
        ids = encode_prompt(self.tokenizer, prompt, **self.template)
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
            steps and text; `votes` if there are several samples: for each its tokens, answer and outcome, and whether
            the vote up to it is right; and `stepflow` if StepFlow was on: its mean effect.
        """
        responses, seconds = self.respond(arm, prompts, seed)
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

    @torch.no_grad()
    def respond(self, arm: Arm, prompts: Sequence[list[int]], seed: int) -> tuple[list[Response], float]:
        """Generates `arm.samples` responses to each prompt.

        Args:
            arm: The arm.
            prompts: Token ids, of any lengths.
            seed: The seed of the sampling; the caller's random state is kept.

        Returns:
            The responses, those of one prompt together, and the seconds that generation took.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        vocabulary = self._vocabulary_of(arm)
        counter = None if self.progress is None else TokenCounter(self.progress, width, self._pad)
        device = self.model.device.type
        devices = [self.model.device] if device != "cpu" else []
        with torch.random.fork_rng(devices, device_type=device if devices else "cuda"):
            torch.manual_seed(seed)
            start = time.perf_counter()
            made = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                **self._arguments(arm, vocabulary),
                **({} if counter is None else {"stopping_criteria": [counter]}),
            )
            rows = made[:, width:].tolist()  # waits for the device
            seconds = time.perf_counter() - start
        reports: Sequence[RowReport | None] = [None] * len(rows)
        beams = self.generation.get("num_beams") or self.model.generation_config.num_beams or 1
        # Beams change rows, so their report cannot be split into responses.
        if arm.stepflow is not False and self.model.stepflow_runtime.last is not None and beams == 1:
            reports = self.model.stepflow_report().rows
        responses = [
            self._response(vocabulary, prompts[row // arm.samples], ids, report)
            for row, (ids, report) in enumerate(zip(rows, reports, strict=True))
        ]
        return responses, seconds

    @property
    def ends(self) -> set[int]:
        """The ids that end a turn."""
        config = self.model.generation_config.eos_token_id
        ends = config if isinstance(config, list) else [config]
        return {token for token in (*ends, self.tokenizer.eos_token_id) if token is not None}

    def _vocabulary_of(self, arm: Arm) -> StepVocabulary:
        """The step rules of an arm, whose settings may change those of the model."""
        if not isinstance(arm.stepflow, dict):
            return self.vocabulary
        runtime = self.model.stepflow_runtime
        return runtime.rules_for(runtime.settings.replace(**arm.stepflow)).vocabulary

    def _arguments(self, arm: Arm, vocabulary: StepVocabulary) -> dict[str, Any]:
        arguments = {
            "max_new_tokens": int(self.max_new_tokens * arm.length_factor),
            "do_sample": False,
            "pad_token_id": self._pad,
            **self.generation,
        }
        if arm.samples > 1:
            arguments["num_return_sequences"] = arm.samples
            if not arguments["do_sample"]:
                arguments |= {"do_sample": True, "temperature": arm.temperature}
        if not arguments["do_sample"]:
            arguments |= dict.fromkeys(("temperature", "top_p", "top_k"))
        if arm.min_steps or arm.max_steps is not None:
            budget = StepBudgetLogitsProcessor(vocabulary, min_steps=arm.min_steps, max_steps=arm.max_steps)
            arguments["logits_processor"] = [budget]
        if getattr(self.model, "stepflow_runtime", None) is not None:
            arguments["stepflow"] = {} if arm.stepflow is True else arm.stepflow
        return arguments

    def _response(
        self, vocabulary: StepVocabulary, prompt: list[int], ids: list[int], report: RowReport | None
    ) -> Response:
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

    @property
    def _pad(self) -> int:
        """The token for padding; many models have none of their own."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *sorted(self.ends), 0)
        return next(token for token in known if token is not None)


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
