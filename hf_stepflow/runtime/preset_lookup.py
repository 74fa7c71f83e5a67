"""Presets by name, for `stepflow=`: looked up in the hf_stepflow package where it is installed.

This code travels to Hub repositories, where the package need not be, so it is asked only when a preset is meant.
"""

import importlib
import os
from pathlib import Path
from typing import Any

from .configuration_stepflow import StepFlowSettings, read_json, read_settings
from .errors import StepFlowConfigError


def find_preset(source: Any) -> Any:
    """The preset that is meant by a name, a base model's id, a preset's path or a Hub id; anything else as it is.

    Args:
        source: as `stepflow` of `StepFlowModelForCausalLM.from_pretrained`; "auto" needs the model and stays "auto".

    Raises:
        StepFlowConfigError: a preset is meant, but hf_stepflow is not installed; or the preset is wrong.
        StepFlowFileError: nothing of this name.
    """
    if source == "auto" or not isinstance(source, str | Path) or _is_settings(source):
        return source
    return _presets(str(source)).load_preset(source)


def settings_for(source: Any, model: Any) -> tuple[StepFlowSettings, dict[str, Any] | None]:
    """The settings that are meant for a model, and the preset that they are.

    Args:
        source: as for `find_preset`.
        model: the model, which a preset is checked against.

    Returns:
        The settings; name, architecture and provenance of the preset for this very model, else None.

    Raises:
        StepFlowError: as `find_preset`; or a preset for another architecture.
    """
    source = find_preset(source)
    if isinstance(source, str) and source == "auto":
        source = _presets(source).preset_for(model)
    if not hasattr(source, "for_model"):
        return read_settings(source), None
    # As plain data, because the package's classes are others than those of a copy of this code.
    settings = StepFlowSettings(**source.for_model(model).to_dict())
    is_its_base = settings.base_model_name_or_path == source.base_model
    return settings, source.to_config().to_dict().get("stepflow_preset") if is_its_base else None


def _is_settings(source: str | Path) -> bool:
    """Whether a path holds plain settings, or cannot be a preset and is left to `read_settings` to refuse."""
    path = Path(source)
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):  # unlike Path's own, these take a name that no file can have
        return isinstance(source, Path) and not os.path.isfile(path / "preset.json")
    _, data = read_json(path)
    is_preset = "provenance" in data or "stepflow_preset" in data or (path / "preset.json").is_file()
    return not is_preset and data.get("model_type", "stepflow") == "stepflow"


def _presets(source: str) -> Any:
    try:
        return importlib.import_module("hf_stepflow.calibration.presets")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("hf_stepflow"):
            raise
        raise StepFlowConfigError(
            f"{source!r} is no path of StepFlow settings, and presets are looked up by the hf_stepflow package, which "
            "is not installed here",
            hint="`pip install hf-stepflow`, or give a dict, a StepFlowConfig, or the path of a file with settings",
        ) from error
