"""StepFlowModelForCausalLM: StepFlow on a causal language model, in place.

Attaching swaps the model's class for a subclass with a forward and a generate around the base's, and sets a registered
attention function; nothing is wrapped and no weight is touched, so loading, saving, PEFT, device maps and generation
stay the base model's business. Detaching gives back the very model it was.
"""

import copy
import functools
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .attention_interface import AttentionLink, attention_modules, base_implementation, query_heads, register_on
from .configuration_stepflow import StepFlowConfig, read_settings, settings_from_data
from .errors import StepFlowInputError, StepFlowUnsupportedError
from .forward import FlowRules, FlowRuntime
from .paged import start_manager
from .report import FlowReport
from .repository import find_preset, load, push_preset_of, save_model, settings_on
from .tokenization_stepflow import end_of_turn_ids, tokenizer_of, warn_if_never_thinking

_UPLOAD = (
    "repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags",
)  # fmt: skip
# Attributes of an attached model that its base does not have.
_STATE = (
    "stepflow_runtime _stepflow_preset _stepflow_replaced _stepflow_stored _compiled_call "
    "_cached_continuous_batching_manager"
)


class StepFlowModelForCausalLM(PreTrainedModel):
    """A causal language model with StepFlow attached.

    Instances are made by `from_pretrained` and `attach`, never by the constructor. They are instances of this class
    and of their base model's class.

    Example:
        >>> output = model.generate(**inputs, max_new_tokens=20, stepflow={"tau_max": 0.1})
        >>> print(model.stepflow_report())
    """

    config_class = StepFlowConfig
    stepflow_runtime: FlowRuntime
    generation_config: Any
    _stepflow_preset: Any
    _stepflow_replaced: Any
    _stepflow_stored: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        stepflow: Any = None,
        tokenizer: Any = None,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a model and attaches StepFlow.

        Args:
            pretrained_model_name_or_path: A model, as for `AutoModelForCausalLM.from_pretrained`, one that was saved
                with StepFlow included; or a preset repository, whose base model is then loaded.
            *args: Passed on.
            stepflow: The settings:

                * a `StepFlowConfig`, a dict, or the path of a JSON file or folder;
                * a preset: its name, its base model's id, a `Preset`, its path or its Hub id, or a lock file;
                * "auto" for the preset of this model, or else the rule;
                * None for the preset repository's settings, or those that the model was saved with, or the defaults.

                On a preset repository, a dict is merged over its settings.
            tokenizer: The model's tokenizer; None loads it from the base's path.
            config: The config of the model or of the preset.
            **kwargs: Passed on to `AutoModelForCausalLM.from_pretrained`. `revision` and `subfolder` locate a preset,
                not its base model, whose revision is the setting `base_model_revision`.

        Raises:
            StepFlowError: As `attach`.

        Example:
            >>> from hf_stepflow.reasoner import FOLDER  # or the Hub id of your model
            >>> model = StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow={"tau_max": 0.1})
        """
        stepflow = find_preset(stepflow)  # a misspelt name is refused before the weights are loaded
        loaded = load(pretrained_model_name_or_path, args, stepflow, tokenizer, config, kwargs)
        model = cls.attach(loaded.model, loaded.settings, tokenizer=loaded.tokenizer)
        model._stepflow_preset = loaded.settings, loaded.block
        return model if loaded.info is None else (model, loaded.info)

    def __init__(self, config: Any = None, *args: Any, **kwargs: Any):
        raise _no_constructor(config)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise _no_constructor(config)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Does nothing: a saved model names its class itself."""

    @classmethod
    def attach(cls, model: Any, config: Any = None, *, tokenizer: Any = None) -> Any:
        """Puts StepFlow on a loaded model, in place.

        Args:
            model: A decoder-only model whose attention goes through Transformers' attention interface.
            config: As `stepflow` of `from_pretrained`.
            tokenizer: The model's tokenizer; None loads it from `base_model_name_or_path` or the model's own path.

        Returns:
            The same object.

        Raises:
            StepFlowUnsupportedError: StepFlow cannot reach the model; the model is left unchanged.
            StepFlowConfigError: The settings do not fit the model or its tokenizer; or the preset is for another
                model.
            StepFlowFileError: There is no preset of this name.

        Example:
            >>> model = StepFlowModelForCausalLM.attach(model.detach_stepflow(), {"alpha": 0.1}, tokenizer=tokenizer)
            >>> output = model.generate(**inputs, max_new_tokens=20)
        """
        return cls._put_on(model, config, tokenizer)

    @classmethod
    def _put_on(cls, model: Any, config: Any, tokenizer: Any, is_on: bool = True) -> Any:
        """As `attach`; with `is_on=False`, StepFlow runs only in blocks with their own settings."""
        if getattr(model, "stepflow_runtime", None) is not None:
            raise StepFlowInputError(
                "StepFlow is already attached to this model", hint="call model.detach_stepflow() first"
            )
        _check_model(model)
        config = find_preset(config)
        lock = getattr(config, "lock", None)
        if lock is not None:
            raise StepFlowInputError(
                f"{lock} pins a commit of its base model, and a loaded model does not tell which one it is of",
                hint=f"StepFlowModelForCausalLM.from_pretrained({lock.base_model!r}, stepflow=...) with the lock file",
            )
        generation = model.generation_config
        stored = getattr(generation, "stepflow", None)
        settings, block = settings_on(model, config)
        modules = attention_modules(model)
        base = base_implementation(modules.values())
        tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model, settings)
        heads = {layer: query_heads(model, module) for layer, module in modules.items()}
        ends = end_of_turn_ids(model, tokenizer)
        runtime = FlowRuntime(settings, tokenizer, heads, base, ends, is_on)
        warn_if_never_thinking(tokenizer, settings)

        name = register_on(base)
        # transformers loads remote classes under a generated subclass of the same name, which cannot be pickled.
        own = StepFlowModelForCausalLM if cls.__name__ == StepFlowModelForCausalLM.__name__ else cls
        kind = _attached_class(own, type(model))
        # Another thread may run the model meanwhile: at every moment class and attention fit each other.
        model.stepflow_runtime = runtime
        _change_class(model, kind)
        model._stepflow_preset = settings, block
        model._stepflow_replaced = {}
        for layer, module in modules.items():
            module.stepflow_link = AttentionLink(layer, runtime.current)
            model._stepflow_replaced[layer] = module.config
            # A copy: other models may share the model's config, which goes on to choose the masks.
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = name
        model.__dict__.pop("_compiled_call", None)
        model._stepflow_stored = generation, stored, generation._from_model_config
        generation._from_model_config = False  # else its file would be read without our block
        generation.stepflow = settings.to_dict()
        return model

    def detach_stepflow(self) -> Any:
        """Takes StepFlow off again and returns the very model it was: class, attention, generation config."""
        for module in self.modules():
            link = module.__dict__.pop("stepflow_link", None)
            if link is not None:
                module.config = self._stepflow_replaced[link.layer]
        generation, stored, generation._from_model_config = self._stepflow_stored
        for config in (generation, self.generation_config):  # which the user may have replaced, by a copy too
            if stored is None:
                config.__dict__.pop("stepflow", None)
            else:
                config.stepflow = stored
        _change_class(self, type(self).__bases__[1])
        for name in _STATE.split():
            self.__dict__.pop(name, None)
        return self

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> Any:
        """Raises an error: StepFlow runs on the implementation that it was attached to."""
        raise _no_other_attention(args, self.stepflow_runtime.base_implementation)

    @contextmanager
    def disable_stepflow(self) -> Iterator[None]:
        """Inside the block this thread runs the base model; tokens it caches there count as question later."""
        with self.stepflow_runtime.override(None):
            yield

    @contextmanager
    def use_stepflow(self, settings: Any = None) -> Iterator[None]:
        """Inside the block this thread runs under other settings.

        Args:
            settings: As `stepflow` of `generate`: a dict is merged over the settings in force, False turns StepFlow
                off, None and True change nothing.

        Raises:
            StepFlowConfigError: Settings that do not fit the model.
        """
        runtime = self.stepflow_runtime
        rules: FlowRules | None = None
        if settings is None or settings is True:
            rules = runtime.effective
        elif isinstance(settings, dict):
            current = (self._call_rules(None, None) or runtime.rules).plan.settings
            rules = runtime.rules_for(current.replace(**settings))
        elif settings is not False:
            rules = runtime.rules_for(read_settings(settings))
        with runtime.override(rules):
            yield

    @property
    def stepflow_config(self) -> StepFlowConfig:
        """The settings in force (those of the preset, unless a call overrides them)."""
        return StepFlowConfig(**self.stepflow_runtime.settings.to_dict())

    @stepflow_config.setter
    def stepflow_config(self, config: Any) -> None:
        runtime = self.stepflow_runtime
        settings = read_settings(config)
        runtime.rules = runtime.rules_for(settings)
        self.generation_config.stepflow = settings.to_dict()

    def stepflow_report(self) -> FlowReport:
        """Reports what the last generate or forward did."""
        return self.stepflow_runtime.report()

    def generate(self, inputs: Any = None, *args: Any, stepflow: Any = None, **kwargs: Any) -> Any:
        """Generates as the base model does, with StepFlow.

        Args:
            inputs: Token ids, as the base's first argument.
            *args: Passed on.
            stepflow: A dict of settings for this call, merged over `generation_config.stepflow`; False turns StepFlow
                off.
            **kwargs: Passed on.

        Raises:
            StepFlowError: Settings that do not fit, an empty prompt or one of padding only, a paged cache.
        """
        runtime = getattr(self, "stepflow_runtime", None)
        if runtime is None or not (runtime.is_on or runtime.is_overridden):
            # A call in another thread has put StepFlow on for itself, and takes it off when it ends.
            kwargs |= {} if stepflow is None else {"stepflow": stepflow}
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        rules = self._call_rules(stepflow, args[0] if args else kwargs.get("generation_config"))
        if rules is None:
            with self.disable_stepflow():
                return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        ids = kwargs.get("input_ids") if inputs is None else inputs
        _check_prompt(ids, kwargs)
        length = None if ids is None else ids.shape[1]
        with self.stepflow_runtime.override(rules, length):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _call_rules(self, stepflow: Any, generation_config: Any) -> FlowRules | None:
        """The settings of one call: the preset's, under the generation config's, under the call's."""
        runtime = self.stepflow_runtime
        if stepflow is False or runtime.effective is None:
            return None
        settings, is_on = runtime.effective.plan.settings, True
        # Settings of an enclosing block were merged over those of the model's generation config already.
        configs = (generation_config,) if runtime.is_overridden else (self.generation_config, generation_config)
        stored = [getattr(source, "stepflow", None) for source in configs]
        for source in (*stored, stepflow):
            if source is None:
                continue
            is_on = source is not False
            if isinstance(source, dict):
                settings = settings.replace(**source)
            elif not isinstance(source, bool):
                settings = read_settings(source)
        return runtime.rules_for(settings) if is_on else None

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        preset_only: bool = False,
        push_to_hub: bool = False,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Saves the whole model with StepFlow, or the preset alone.

        The whole model is a folder that loads without anything else: `AutoModelForCausalLM.from_pretrained` gives the
        base model as it is now, and with `trust_remote_code=True` StepFlow on it. The preset alone has no
        weights: it names its base model, and is loaded with `trust_remote_code=True`.

        Args:
            save_directory: The folder.
            *args: Passed on to the base model's `save_pretrained`.
            preset_only: Leave the weights out; changes that were made to them since the base was loaded are lost.
            push_to_hub: Upload it too; `repo_id` and other arguments of `push_to_hub` may be given then.
            is_main_process: Whether this process writes files that all processes share.
            **kwargs: Passed on.

        Raises:
            StepFlowInputError: `preset_only`, and nothing says which the base model is.
            StepFlowFileError: `preset_only`, and the folder holds weights.
        """
        upload = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs} if push_to_hub else {}
        save_model(self, save_directory, super().save_pretrained, preset_only, is_main_process, args, kwargs)
        if push_to_hub and is_main_process:
            upload = {"token": kwargs["token"]} | upload if "token" in kwargs else upload
            repository = upload.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repository, preset_only=preset_only, **upload)

    def push_to_hub(self, repo_id: str, *, preset_only: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Uploads the files that `save_pretrained` writes.

        Args:
            repo_id: The repository.
            preset_only: As in `save_pretrained`.
            **kwargs: As for the base model's `push_to_hub`.

        Raises:
            StepFlowInputError: As `save_pretrained`; or the base model is a folder of this machine.
        """
        if preset_only:
            return push_preset_of(self, repo_id, **kwargs)
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> Any:
        """Starts continuous batching, with StepFlow; `generate_batch` is built on this.

        The settings in force now, those of `generation_config.stepflow` included, stay in force for all requests.

        Args:
            generation_config: As for the base model.
            continuous_batching_config: As for the base model; `cpu_offload_space`, CUDA graphs, asynchronous batches
                and compilation are refused, and flash attention is not switched to.
            **kwargs: Passed on.

        Returns:
            The manager of requests.

        Raises:
            StepFlowUnsupportedError: StepFlow cannot follow this model or config (docs/serving.md).
            StepFlowInputError: The model keeps a manager that was started under other settings.
        """
        start = super().init_continuous_batching  # type: ignore[misc]
        rules = self._call_rules(None, generation_config)
        return start_manager(self, start, rules, generation_config, continuous_batching_config, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        own, base = type(self).__bases__
        return _rebuild, (own, base, self.stepflow_runtime.base_implementation), self.__dict__


def _rebuild(own: type, base: Any, implementation: str) -> Any:
    register_on(implementation)
    kind = _attached_class(own, base)
    return kind.__new__(kind)


# Calls on one model take turns, since each changes it; a tokenizer that had to be loaded is loaded once.
_LOCKS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_TOKENIZERS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_MAKING_LOCKS = threading.Lock()


def generate_with_stepflow(
    *args: Any, model: Any = None, stepflow: Any = None, tokenizer: Any = None, **kwargs: Any
) -> Any:
    """Generates with StepFlow on a model, and leaves the model as it was.

    This is the `generate` of a repository with the folder `custom_generate`. Calls on one model take turns; other
    threads may call the model's own `generate` meanwhile, without StepFlow.

    Args:
        *args: As for `model.generate`, token ids first; without `model`, the model before them.
        model: Any model that StepFlow runs on. A model that has StepFlow already keeps it, and a dict is merged over
            its settings.
        stepflow: Settings of this call, as for `StepFlowModelForCausalLM.attach`; False turns StepFlow off.
        tokenizer: The model's; None loads it from the model's own path.
        **kwargs: Passed on to `model.generate`.

    Raises:
        StepFlowError: As `attach` and the `generate` of an attached model.
    """
    if model is None:
        model, *args = args  # type: ignore[assignment]
    with _MAKING_LOCKS:
        lock = _LOCKS.setdefault(model, threading.RLock())
    if tokenizer is not None:
        kwargs["tokenizer"] = tokenizer  # generation stops at strings with it
    with lock:
        if getattr(model, "stepflow_runtime", None) is not None:
            return type(model).generate(model, *args, stepflow=stepflow, **kwargs)
        if stepflow is False:
            return type(model).generate(model, *args, **kwargs)
        stored = getattr(model.generation_config, "stepflow", None)
        if isinstance(stepflow, dict) and isinstance(stored, dict) and "generate" in vars(model):
            # This is the model's own `generate`, as that of an attached model is.
            stepflow = settings_from_data(stored, "generation_config.stepflow").replace(**stepflow)
        known = tokenizer if tokenizer is not None else _TOKENIZERS.get(model)
        StepFlowModelForCausalLM._put_on(model, None if stepflow is True else stepflow, known, is_on=False)
        try:
            runtime = model.stepflow_runtime
            if tokenizer is None:
                _TOKENIZERS[model] = runtime.tokenizer
            with runtime.override(runtime.rules):
                return type(model).generate(model, *args, **kwargs)
        finally:
            model.detach_stepflow()


_ATTACHED: dict[tuple[type, type], type] = {}


def _attached_class(own: type, base: Any) -> Any:
    """The subclass of a base model class that attached models have; it goes by the base's name."""
    if (own, base) not in _ATTACHED:

        @functools.wraps(base.forward)  # generation reads its signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            runtime = getattr(self, "stepflow_runtime", None)  # another thread may have just taken it off
            return (
                base.forward(self, *args, **kwargs)
                if runtime is None
                else runtime.run(self, base.forward, args, kwargs)
            )

        body = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "config_class": base.config_class,
            "forward": forward,
        }
        _ATTACHED[own, base] = type(base.__name__, (own, base), body)
    return _ATTACHED[own, base]


def _change_class(model: Any, kind: Any) -> None:
    """Changes a model's class, and with it the bound forwards that accelerate's hooks keep on the instance."""
    for name in ("forward", "_old_forward"):
        kept = model.__dict__.get(name)
        if getattr(kept, "__func__", None) is type(model).forward:
            model.__dict__[name] = types.MethodType(kind.forward, model)
    model.__class__ = kind


def _no_constructor(config: Any) -> StepFlowUnsupportedError:
    """The error for building a model from a preset's config."""
    base = getattr(config, "base_model_name_or_path", None)
    return StepFlowUnsupportedError(
        "a StepFlow model is not made from a config: a preset holds settings for a base model"
        + (f" ({base})" if base else "")
        + ", no weights",
        hint="use AutoModelForCausalLM.from_pretrained on the preset's repository, or StepFlowModelForCausalLM.attach "
        "on a model",
    )


def _no_other_attention(asked: Any, base: str) -> StepFlowUnsupportedError:
    """The error for another attention implementation under StepFlow."""
    return StepFlowUnsupportedError(
        f"the attention implementation cannot become {asked} while StepFlow is attached on {base!r}",
        hint="call detach_stepflow(), set it, and attach again",
    )


def _check_model(model: Any) -> None:
    """Refuses anything but a Transformers model, before anything is changed."""
    if not isinstance(model, PreTrainedModel):
        raise StepFlowUnsupportedError(
            f"StepFlow is put on a Transformers model, got {type(model).__name__}",
            hint="attach to the model inside (of PEFT, model.get_base_model()), or before it is wrapped or compiled",
        )


def _check_prompt(ids: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a prompt in which steps cannot be found.

    Args:
        ids: Its token ids, None where there are none.
        kwargs: Keyword arguments of `generate`.
    """
    if kwargs.get("cache_implementation") == "paged":
        raise StepFlowUnsupportedError(
            "generate with cache_implementation='paged' loses what StepFlow needs to know of each prompt",
            hint="call generate_batch with a list of token ids for each prompt",
        )
    if ids is None:
        if kwargs.get("inputs_embeds") is not None:
            raise StepFlowInputError(
                "StepFlow reads steps from token ids, but generate was given inputs_embeds",
                hint="pass input_ids, or stepflow=False",
            )
        return
    if ids.numel() == 0:
        raise StepFlowInputError(
            f"the prompt is empty (input_ids of shape {list(ids.shape)})", hint="pass at least one token a row"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.any(-1).all()):
        rows = (~mask.bool().any(-1)).nonzero().flatten().tolist()
        raise StepFlowInputError(
            f"rows {rows} of the prompt are padding only", hint="drop them, or put at least one token into each"
        )
