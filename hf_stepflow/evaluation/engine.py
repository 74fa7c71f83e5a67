"""Engines of an evaluation: a model in transformers, or a server of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import transformers

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.forward import FlowRules
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.step_detector import StepVocabulary

from .arms import Arm
from .kl import kl_to_base
from .neutral import neutral_texts
from .problem import EvalProblem
from .responses import ResponseMaker
from .rivals import check_rival
from .sampler import Sampler, prepared
from .store import identify, machine


class Engine:
    """Runs one model under any arm.

    Attributes:
        tokenizer: The model's tokenizer.
        vocabulary: The step rules, for arms that do not change them.
        settings: The settings that arms start from; None where no arm has StepFlow.
        positions: The number of positions that the model has, or None.
    """

    tokenizer: Any
    vocabulary: StepVocabulary
    settings: StepFlowSettings | None
    positions: int | None

    def rules_for(self, settings: StepFlowSettings) -> FlowRules:
        """Settings resolved against the model and its tokenizer.

        Raises:
            StepFlowConfigError: They do not fit.
        """
        raise NotImplementedError

    def rules_of(self, arm: Arm) -> FlowRules | None:
        """The settings of an arm, resolved; None where it has no StepFlow."""
        if arm.stepflow is False or self.settings is None:
            return None
        return self.rules_for(self.settings.replace(**(arm.stepflow if isinstance(arm.stepflow, dict) else {})))

    def sampler(self, arms: dict[str, Arm], *args: Any) -> ResponseMaker:
        """Makes the sampler, with the arguments of `ResponseMaker` from `max_new_tokens` on.

        Args:
            arms: The arms that will be asked for.
            *args: The arguments.

        Raises:
            StepFlowInputError: The engine cannot run an arm, or does not take an argument of `generate`.
        """
        raise NotImplementedError

    def next_token_kl(
        self, arms: dict[str, Arm], problems: list[EvalProblem], template: dict[str, Any]
    ) -> dict[str, Any]:
        """Measures how far the arms move predictions on text without a task, JSON-ready.

        Args:
            arms: The arms.
            problems: The problems of the run.
            template: Further arguments of the chat template.

        Returns:
            `texts`, what was read, and `arms`, the fields of `NextTokenKL` by arm; or no arms, and the `reason`.
        """
        return {"arms": {}, "reason": f"{type(self).__name__} gives no predictions on given texts"}

    def identity(self) -> dict[str, Any]:
        """Returns the inputs that results depend on, JSON-ready: model, tokenizer and way of running."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """The model's name, the machine and the versions."""
        raise NotImplementedError


class TransformersEngine(Engine):
    """A model in transformers; made by `engine_of`."""

    def __init__(self, model: Any, tokenizer: Any, runtime: Any):
        self._model, self._runtime = model, runtime
        if tokenizer is None:
            tokenizer = _load_tokenizer(model) if runtime is None else runtime.tokenizer
        self.tokenizer = tokenizer
        self.vocabulary = StepVocabulary.from_tokenizer(tokenizer) if runtime is None else runtime.rules.vocabulary
        self.settings = None if runtime is None else runtime.settings
        self.positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def rules_for(self, settings: StepFlowSettings) -> FlowRules:
        """As `Engine`."""
        return self._runtime.rules_for(settings)

    def sampler(self, arms: dict[str, Arm], *args: Any) -> Sampler:
        """As `Engine`.

        Raises:
            StepFlowUnsupportedError: The model's attention is out of reach of an arm's rival.
            StepFlowConfigError: A rival's parameters do not fit the model.
        """
        for arm in arms.values():
            rival = arm.steering
            if rival is not None:
                check_rival(self._model, rival)
        return Sampler(self._model, self.tokenizer, self.vocabulary, *args)

    def next_token_kl(
        self, arms: dict[str, Arm], problems: list[EvalProblem], template: dict[str, Any]
    ) -> dict[str, Any]:
        """As `Engine`."""
        kind, texts = neutral_texts(self.tokenizer, problems)
        rules = {name: self.rules_of(arm) for name, arm in arms.items()}
        vocabularies = {name: self.vocabulary if own is None else own.vocabulary for name, own in rules.items()}
        found = kl_to_base(self._model, self.tokenizer, arms, texts, vocabularies, self.positions, **template)
        return {"texts": kind, "arms": {name: asdict(one) for name, one in found.items()}}

    def identity(self) -> dict[str, Any]:
        """As `Engine`."""
        generation_config = (
            self._model.generation_config.to_diff_dict()
        )  # applies wherever a run asks for nothing else
        generation_config.pop("transformers_version", None)
        return {
            **identify(self._model, self.tokenizer),
            "settings": None if self.settings is None else self.settings.to_dict(),
            "generation_config": generation_config,
            "attention": self._model.config._attn_implementation,
        }

    def about(self) -> dict[str, Any]:
        """As `Engine`."""
        return {"model": getattr(self._model.config, "_name_or_path", ""), **machine(self._model.device)}


@contextmanager
def engine_of(model: Any, tokenizer: Any, needs_stepflow: bool) -> Iterator[Engine]:
    """The engine of a model, which is left as it was.

    Args:
        model: A causal language model, or an `Engine`.
        tokenizer: The model's tokenizer, or None.
        needs_stepflow: Whether an arm has StepFlow.

    Raises:
        StepFlowInputError: A block around the call already says when StepFlow is on.
    """
    if isinstance(model, Engine):
        yield model
        return
    runtime = getattr(model, "stepflow_runtime", None)
    if runtime is not None and runtime.is_overridden:
        raise StepFlowInputError(
            "arms say when StepFlow is on, but evaluate was called inside of disable_stepflow or use_stepflow",
            hint="call it outside, and give the settings as an arm",
        )
    with prepared(model, tokenizer, attach=needs_stepflow) as runtime:
        yield TransformersEngine(model, tokenizer, runtime)


def _load_tokenizer(model: Any) -> Any:
    path = getattr(model.config, "_name_or_path", "")
    if not path:
        raise StepFlowInputError("the model names no path to load its tokenizer from", hint="pass tokenizer=...")
    return transformers.AutoTokenizer.from_pretrained(path)
