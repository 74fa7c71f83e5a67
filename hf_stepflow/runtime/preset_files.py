"""The files of a preset repository: settings, the name of the base model, and this code; no weights."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import PushToHubMixin, logging

from .base_model import MODEL_CLASS, read_repository_file
from .configuration_stepflow import BASE_FIELDS, StepFlowConfig, StepFlowSettings, read_json
from .errors import StepFlowFileError, StepFlowInputError
from .repository_code import copy_code

logger = logging.get_logger(__name__)

PRESET_CODE = ("configuration_stepflow", "modeling_stepflow", "tokenization_stepflow")
_CLASSES = {"AutoConfig": "configuration_stepflow.StepFlowConfig", "AutoModelForCausalLM": MODEL_CLASS}
_TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_stepflow.StepFlowTokenizer", None]}}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


class PresetFiles(PushToHubMixin):
    """What a preset repository holds.

    Args:
        settings: with the base model in them.
        block: name, architecture and provenance of the preset, as in `stepflow_preset`, or None.
        base_config: the base's config, of which tools read some fields; None where it is not known.
        generation_config: the base's, which the repository's goes over; None for nothing but StepFlow's settings.

    Raises:
        StepFlowInputError: settings that name no base model.
    """

    def __init__(
        self,
        settings: StepFlowSettings,
        block: dict[str, Any] | None = None,
        base_config: Any = None,
        generation_config: Any = None,
    ):
        if not settings.base_model_name_or_path:
            raise StepFlowInputError(
                "a preset names its base model, but neither the settings nor the model say which it is",
                hint="set base_model_name_or_path, or save the whole model (preset_only=False)",
            )
        self.settings = settings
        self.block = block
        self.base_config = base_config
        self.generation_config = generation_config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the files.

        Args:
            save_directory: folder; made where there is none.
            **kwargs: of the saving of weights, of which there are none.

        Raises:
            StepFlowFileError: there is a whole model in the folder.
        """
        folder = Path(save_directory)
        _refuse_whole_model(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = base_fields(self.base_config) if self.base_config is not None else {}
        block = {"stepflow_preset": self.block} if self.block else {}
        config = StepFlowConfig(
            **self.settings.to_dict(), **block, **fields, auto_map=_CLASSES, architectures=[MODEL_CLASS.split(".")[1]]
        )
        config.to_json_file(folder / "config.json")
        generation = generation_config_with(self.generation_config, self.settings)
        generation.to_json_file(folder / "generation_config.json")
        text = json.dumps(_TOKENIZER, indent=2, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        copy_code(folder, *PRESET_CODE)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """The end of `push_to_hub`, at which the repository is there and its id is whole."""
        _refuse_other_repository(repo_id, kwargs.get("token"), kwargs.get("revision"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def generation_config_with(base: Any, settings: StepFlowSettings) -> GenerationConfig:
    """A generation config with the settings of StepFlow in it.

    Args:
        base: the rest of it, or None.
        settings: the settings.
    """
    config = GenerationConfig() if base is None else GenerationConfig.from_dict(base.to_dict())
    config._from_model_config = False  # else its file would be read without our block
    config.__dict__["stepflow"] = settings.to_dict()
    return config


def base_fields(config: Any) -> dict[str, Any]:
    """The fields of a model's config that a preset carries over, for tools that read only the preset's."""
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in BASE_FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def is_redirected(folder: Path) -> bool:
    """Whether the tokenizer of a folder is that of a preset's base."""
    file = folder / "tokenizer_config.json"
    return file.is_file() and read_json(file)[1].get("auto_map") == _TOKENIZER["auto_map"]


def apply_generation_config(model: Any, data: dict[str, Any], stored: dict[str, Any], source: Any) -> None:
    """Puts a preset's generation config over that of its base.

    Args:
        model: the base.
        data: of the preset's generation_config.json.
        stored: of its config.json, where the settings of StepFlow are read from.
        source: where they are, for messages.
    """
    block = data.get("stepflow")
    if isinstance(block, dict) and any(name in stored and stored[name] != value for name, value in block.items()):
        logger.warning(
            "%s: generation_config.json holds other StepFlow settings than config.json; those of config.json count",
            source,
        )
    for name, value in data.items():
        if name not in ("stepflow", "transformers_version", "_from_model_config"):
            setattr(model.generation_config, name, value)


def _refuse_whole_model(folder: Path) -> None:
    """A preset's config.json would take the place of that of weights in the same folder."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    weights = next((name for name in names if name.endswith(_WEIGHTS)), None)
    if weights is not None:
        raise StepFlowFileError(
            f"{str(folder)!r} holds weights ({weights}); a preset's config.json would take the place of theirs",
            hint="save the preset to a folder of its own",
        )


def _refuse_other_repository(repo_id: str, token: Any, revision: str | None) -> None:
    """As `_refuse_whole_model`, for a repository: that of the base model itself, for instance."""
    try:
        data = read_repository_file(repo_id, "config.json", {"token": token, "revision": revision})
    except OSError:
        if revision is None:
            raise
        # There is no such branch yet: it will be made from the main one.
        data = read_repository_file(repo_id, "config.json", {"token": token})
    if data and data.get("model_type") != "stepflow":
        raise StepFlowFileError(
            f"{repo_id!r} holds a model of type {str(data.get('model_type'))[:60]!r}; a preset's config.json would "
            "take the place of that model's",
            hint="push the preset to a repository of its own",
        )
