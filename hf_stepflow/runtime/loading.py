"""What `from_pretrained` loads: a model with its settings and tokenizer.

It comes from one of three kinds of folders and repositories:

* a preset repository (model type "stepflow"): its base model, from elsewhere;
* a whole model that was saved with StepFlow: itself, with the settings in its generation config;
* any other model: itself.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig

from .base_model import (
    base_of,
    changed_fields,
    fetching,
    is_saved_with_stepflow,
    meant_for_base,
    read_repository_file,
    trust_for,
)
from .configuration_stepflow import SETTING_NAMES, StepFlowConfig, StepFlowSettings, read_settings, settings_from_data
from .errors import StepFlowError, StepFlowFileError
from .preset_files import apply_generation_config
from .preset_lookup import settings_for
from .tokenization_stepflow import load_base_tokenizer


@dataclass
class Loaded:
    """A model on which StepFlow is to be put.

    Attributes:
        model: it.
        info: what the loading told, where that was asked for.
        settings: for it.
        tokenizer: its own, or that which was given.
        block: name, architecture and provenance of the preset that the settings are, None where they are none.
    """

    model: Any
    info: Any
    settings: StepFlowSettings
    tokenizer: Any
    block: dict[str, Any] | None = None


def load(
    path: Any, args: tuple[Any, ...], stepflow: Any, tokenizer: Any, config: Any, kwargs: dict[str, Any]
) -> Loaded:
    """Loads a model.

    Args:
        path: as for `AutoModelForCausalLM.from_pretrained`, or a preset's.
        args: of the call.
        stepflow: as for `StepFlowModelForCausalLM.from_pretrained`.
        tokenizer: the model's, or None.
        config: of the model or of the preset, or None.
        kwargs: of the call.

    Raises:
        StepFlowError: as `StepFlowModelForCausalLM.attach`.
    """
    data = {} if path is None else read_repository_file(path, "config.json", kwargs)
    given = config if isinstance(config, PretrainedConfig) else None
    if (given.model_type if given is not None else data.get("model_type")) == "stepflow":
        return _load_preset(path, args, stepflow, tokenizer, given, data, kwargs)
    if config is not None:
        kwargs = kwargs | {"config": config}
    if is_saved_with_stepflow(data if given is None else given):
        kwargs = kwargs | {"trust_remote_code": False}  # else this code would be asked again
    kwargs.pop("_from_auto", None)
    model, info = _parted(AutoModelForCausalLM.from_pretrained(path, *args, **kwargs))
    if is_saved_with_stepflow(model.config):
        del model.config.auto_map  # whoever saves the model says anew how it is loaded
    settings, block = settings_on(model, stepflow)
    if tokenizer is None:
        tokenizer = _own_tokenizer(path, settings, model, kwargs)
    return Loaded(model, info, settings, tokenizer, block)


def settings_on(model: Any, stepflow: Any) -> tuple[StepFlowSettings, dict[str, Any] | None]:
    """As `settings_for`; without a source, the settings that the model was stored with, or else the defaults."""
    stored = getattr(model.generation_config, "stepflow", None)
    if stepflow is None and isinstance(stored, dict):
        return settings_from_data(stored, "generation_config.stepflow"), None
    return settings_for(stepflow, model)


def _load_preset(
    path: Any,
    args: tuple[Any, ...],
    stepflow: Any,
    tokenizer: Any,
    config: Any,
    data: dict[str, Any],
    kwargs: dict[str, Any],
) -> Loaded:
    kwargs = dict(kwargs)
    if config is None:
        settings_from_data(data, str(path))  # tells of settings that this release does not know
        config, kwargs = StepFlowConfig.from_dict(dict(data), return_unused_kwargs=True, **kwargs)
    base, revision = base_of(config, path)
    generation = read_repository_file(path, "generation_config.json", kwargs)
    rest = meant_for_base(kwargs)
    rest = {name: value for name, value in changed_fields(config, data).items() if name not in rest} | rest
    where = fetching(kwargs) | {"revision": revision}
    try:
        rest["trust_remote_code"] = trust_for(base, rest.get("trust_remote_code"), where)
        model, info = _parted(AutoModelForCausalLM.from_pretrained(base, *args, revision=revision, **rest))
    except StepFlowError:
        raise
    except OSError as error:
        raise StepFlowFileError(
            f"the base model {base!r} of the preset {str(path)!r} could not be loaded: {error}",
            hint="it has to be reachable by its name; where access to it is gated, ask for it and pass token=...",
        ) from error
    if stepflow is None or isinstance(stepflow, dict):
        settings = read_settings(config).replace(**(stepflow or {}))
        stored = StepFlowSettings(**{name: data[name] for name in SETTING_NAMES if name in data})
        block = getattr(config, "stepflow_preset", None) if settings == stored else None
    else:
        settings, block = settings_for(stepflow, model)
    apply_generation_config(model, generation, data, path)
    if tokenizer is None:
        trust = kwargs.get("trust_remote_code")
        tokenizer = load_base_tokenizer(base, revision, **fetching(kwargs), trust_remote_code=trust)
    return Loaded(model, info, settings, tokenizer, block)


def _own_tokenizer(path: Any, settings: StepFlowSettings, model: Any, kwargs: dict[str, Any]) -> Any:
    """The tokenizer of the base that the settings name, else the one beside the model."""
    where = fetching(kwargs)
    trust = kwargs.get("trust_remote_code")
    if settings.base_model_name_or_path:
        path, revision = settings.base_model_name_or_path, settings.base_model_revision
    else:
        revision = kwargs.get("revision")
        where |= {"subfolder": kwargs["subfolder"]} if kwargs.get("subfolder") else {}
    return load_base_tokenizer(path, revision, **where, trust_remote_code=trust)


def _parted(loaded: Any) -> tuple[Any, Any]:
    """The model, and what `output_loading_info` adds."""
    return loaded if isinstance(loaded, tuple) else (loaded, None)
