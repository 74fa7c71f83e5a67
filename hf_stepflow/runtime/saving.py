"""Saving a model with StepFlow: whole, as a folder that loads on its own, or the preset alone."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .base_model import MODEL_CLASS
from .configuration_stepflow import StepFlowSettings
from .errors import StepFlowInputError
from .preset_files import PresetFiles, is_redirected
from .repository_code import copy_code

logger = logging.get_logger(__name__)

MODEL_CODE = MODEL_CLASS.split(".")[0]
AUTO_MAP = {"AutoModelForCausalLM": MODEL_CLASS}


def save_files(
    model: Any,
    folder: Any,
    save: Callable[..., None],
    preset_only: bool,
    is_main_process: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """`save_pretrained` of an attached model.

    Args:
        model: it.
        folder: where to.
        save: `save_pretrained` of the base model.
        preset_only: leave the weights out.
        is_main_process: whether this process writes files that all processes share.
        args: of the call.
        kwargs: of the call.
    """
    if preset_only:
        if is_main_process:
            preset_files(model).save_pretrained(folder)
        return
    own_code = type(model)._auto_class is not None
    if own_code:
        logger.warning_once(
            "The base model brings code of its own, which is what its folder loads with trust_remote_code=True; for "
            "StepFlow on it, load it with StepFlowModelForCausalLM.from_pretrained."
        )
    with _as_stored(model, own_code):
        save(folder, *args, is_main_process=is_main_process, **kwargs)
    if not is_main_process or os.path.isfile(folder):
        return
    if not own_code:
        copy_code(Path(folder), MODEL_CODE)
    has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file() and not is_redirected(Path(folder))
    if not has_tokenizer:  # where there is one, it may be newer than ours
        model.stepflow_runtime.tokenizer.save_pretrained(folder)


def preset_files(model: Any) -> PresetFiles:
    """The files of the preset alone.

    Raises:
        StepFlowInputError: nothing says which the base model is.
    """
    settings = _settings_in_force(model)
    attached, block = model._stepflow_preset
    if not settings.base_model_name_or_path:
        path = getattr(model.config, "_name_or_path", None) or None
        if path is not None and os.path.isdir(path):
            logger.warning("The preset names a folder of this machine as its base model: %s", path)
        settings = settings.replace(base_model_name_or_path=path, base_model_revision=None)
    return PresetFiles(settings, block if settings == attached else None, model.config, model.generation_config)


def push_files(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """`push_to_hub` of the preset alone.

    Raises:
        StepFlowInputError: nothing says which the base model is, or it is a folder of this machine.
    """
    files = preset_files(model)
    base = files.settings.base_model_name_or_path
    if base is None or os.path.isdir(base):
        raise StepFlowInputError(
            f"the base model {base!r} is a folder of this machine, which nobody else can load",
            hint="push the base model to the Hub first and set base_model_name_or_path, or push the whole model",
        )
    return files.push_to_hub(repo_id, **{"commit_message": "Upload StepFlow preset"} | kwargs)


def without_base(settings: StepFlowSettings) -> StepFlowSettings:
    """Settings for a folder with weights: the base is what is in the folder, whatever its origin is called."""
    return settings.replace(base_model_name_or_path=None, base_model_revision=None)


def _settings_in_force(model: Any) -> StepFlowSettings:
    """Those of a call without settings of its own; those of the preset where such calls run without StepFlow."""
    rules = model._call_rules(None, None)
    return (model.stepflow_runtime.rules if rules is None else rules).plan.settings


@contextmanager
def _as_stored(model: Any, own_code: bool) -> Iterator[None]:
    """Inside the block, config and generation config say what the files are to say."""
    config, generation = model.config, model.generation_config
    auto_map, block = config.__dict__.get("auto_map"), getattr(generation, "stepflow", None)
    generation.stepflow = without_base(_settings_in_force(model)).to_dict()
    if not own_code:
        config.auto_map = AUTO_MAP
    try:
        yield
    finally:
        if block is None:  # the user's own generation config
            del generation.stepflow
        else:
            generation.stepflow = block
        if auto_map is not None:
            config.auto_map = auto_map
        else:
            config.__dict__.pop("auto_map", None)
