"""Generates responses with transformers."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.logits_process import StepBudgetLogitsProcessor
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.report import RowReport
from hf_stepflow.runtime.step_detector import StepVocabulary

from .arms import Arm
from .progress import TokenCounter
from .responses import Response, ResponseMaker
from .rivals import steered


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


class Sampler(ResponseMaker):
    """Generates with one model, which has StepFlow attached if an arm needs it."""

    @torch.no_grad()
    def respond(
        self, arm: Arm, prompts: Sequence[list[int]], seed: int, places: Sequence[list[int]] | None = None
    ) -> tuple[list[Response], float]:
        """Generates responses to prompts; the caller's random state is kept.

        Raises:
            StepFlowInputError: The arm has a rival, and the places of the question are not given.
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
        with (
            self._steered(arm, prompts, places),
            torch.random.fork_rng(devices, device_type=device if devices else "cuda"),
        ):
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
            self.read_response(vocabulary, prompts[row // arm.samples], ids, report)
            for row, (ids, report) in enumerate(zip(rows, reports, strict=True))
        ]
        return responses, seconds

    def _steered(
        self, arm: Arm, prompts: Sequence[list[int]], places: Sequence[list[int]] | None
    ) -> AbstractContextManager[None]:
        rival = arm.steering
        if rival is None:
            return nullcontext()
        if places is None:
            raise StepFlowInputError(
                f"{rival.kind} steers attention towards the question, whose places in the prompts are not given",
                hint="pass places=..., or call `run`, which finds them",
            )
        return steered(self.model, rival, list(map(len, prompts)), places)

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
        if arm.rival is not None:
            arguments["disable_compile"] = True  # its attention reads the length of the cache in every pass
        if getattr(self.model, "stepflow_runtime", None) is not None:
            arguments["stepflow"] = {} if arm.stepflow is True else arm.stepflow
        return arguments

    @property
    def _pad(self) -> int:
        """The token for padding; many models have none of their own."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *sorted(self.ends), 0)
        return next(token for token in known if token is not None)
