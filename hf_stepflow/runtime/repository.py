"""Folders and repositories with StepFlow: how they are loaded, and the one writer of their files.

There are three kinds, and `load` takes any of them, as well as a model without StepFlow:

* a preset repository (model type "stepflow"): settings, the name of a base model, and this code; no weights;
* a whole model that was saved with StepFlow: weights, with the settings in its generation config, and this code, a
  second time in `custom_generate`, where transformers finds it when a class of its own is asked for the model;
* a repository for `generate(custom_generate=...)`: this code alone.

`RepositoryFiles` writes them all. Code is copied byte for byte.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import PushToHubMixin, logging

from .configuration_stepflow import (
    BASE_FIELDS,
    PRESET_ARCHITECTURES,
    StepFlowConfig,
    base_of,
    changed_fields,
    commit_of,
    fetching,
    meant_for_base,
    read_json,
    read_repository_file,
    read_settings,
    settings_from_data,
    trust_for,
)
from .errors import StepFlowConfigError, StepFlowError, StepFlowFileError, StepFlowInputError
from .settings import SETTING_NAMES, StepFlowSettings
from .tokenization_stepflow import load_base_tokenizer

logger = logging.get_logger(__name__)

CONFIG_CLASS = "configuration_stepflow.StepFlowConfig"
MODEL_CLASS = "modeling_stepflow.StepFlowModelForCausalLM"
TOKENIZER_CLASS = "tokenization_stepflow.StepFlowTokenizer"
# The files of this folder that a repository names; they bring the files that they import.
PRESET_CODE = ("configuration_stepflow", "modeling_stepflow", "tokenization_stepflow")
MODEL_CODE = ("modeling_stepflow",)
AUTO_MAP = {"AutoModelForCausalLM": MODEL_CLASS}
# The folder in which transformers looks for a repository's own `generate`, and the file that it runs. The file is kept
# as text, because the copy of this code in a preset repository, which can save whole models too, does without it.
CUSTOM_GENERATE = "custom_generate"
GENERATE = (
    '"""The `generate` of a repository: transformers runs it in place of its own."""\n\n'
    "from .modeling_stepflow import generate_with_stepflow as generate\n\n"
    '__all__ = ["generate"]\n'
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_HERE = Path(__file__).parent


@dataclass
class Loaded:
    """A model to put StepFlow on.

    Attributes:
        model: The model.
        info: The loading info, where `output_loading_info` asked for it.
        settings: The settings for it.
        tokenizer: Its tokenizer, or the one that was given.
        block: Name, architecture and provenance of the preset, None where the settings are not those of a preset.
    """

    model: Any
    info: Any
    settings: StepFlowSettings
    tokenizer: Any
    block: dict[str, Any] | None = None


def load(
    path: Any, args: tuple[Any, ...], stepflow: Any, tokenizer: Any, config: Any, kwargs: dict[str, Any]
) -> Loaded:
    """Loads a model with its settings and tokenizer.

    Args:
        path: A model, as for `AutoModelForCausalLM.from_pretrained`, or a preset.
        args: Positional arguments of the call.
        stepflow: As for `StepFlowModelForCausalLM.from_pretrained`.
        tokenizer: The model's tokenizer, or None.
        config: Config of the model or of the preset, or None.
        kwargs: Keyword arguments of the call.

    Raises:
        StepFlowError: As `StepFlowModelForCausalLM.attach`.
    """
    lock = getattr(stepflow, "lock", None)
    if lock is not None and str(path).casefold() == lock.base_model.casefold():
        kwargs = {"revision": lock.base_revision} | kwargs
    data = {} if path is None else read_repository_file(path, "config.json", kwargs)
    given = config if isinstance(config, PretrainedConfig) else None
    if (given.model_type if given is not None else data.get("model_type")) == "stepflow":
        return _load_preset(path, args, stepflow, tokenizer, given, data, kwargs)
    if config is not None:
        kwargs = kwargs | {"config": config}
    if lock is not None:
        lock.check_base(str(path), commit_of(path, kwargs))
    if is_saved_with_stepflow(data if given is None else given):
        kwargs = kwargs | {"trust_remote_code": False}  # else this code would be asked again
    kwargs.pop("_from_auto", None)
    model, info = _without_info(AutoModelForCausalLM.from_pretrained(path, *args, **kwargs))
    if is_saved_with_stepflow(model.config):
        del model.config.auto_map  # saving the model names its class anew
    settings, block = settings_on(model, stepflow)
    if tokenizer is None:
        tokenizer = _tokenizer_beside(path, settings, kwargs)
    return Loaded(model, info, settings, tokenizer, block)


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
        settings_from_data(data, str(path))  # warns of settings that this release does not know
        config, kwargs = StepFlowConfig.from_dict(dict(data), return_unused_kwargs=True, **kwargs)
    base, revision = base_of(config, path)
    generation = read_repository_file(path, "generation_config.json", kwargs)
    rest = meant_for_base(kwargs)
    rest = {name: value for name, value in changed_fields(config, data).items() if name not in rest} | rest
    where = fetching(kwargs) | {"revision": revision}
    lock = getattr(stepflow, "lock", None)
    if lock is not None:
        lock.check_base(base, commit_of(base, where))
    try:
        rest["trust_remote_code"] = trust_for(base, rest.get("trust_remote_code"), where)
        model, info = _without_info(AutoModelForCausalLM.from_pretrained(base, *args, revision=revision, **rest))
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
    _apply_generation_config(model, generation, data, path)
    if tokenizer is None:
        trust = kwargs.get("trust_remote_code")
        tokenizer = load_base_tokenizer(base, revision, **fetching(kwargs), trust_remote_code=trust)
    return Loaded(model, info, settings, tokenizer, block)


def _apply_generation_config(model: Any, data: dict[str, Any], stored: dict[str, Any], source: Any) -> None:
    """Puts a preset's generation config over that of its base; the settings come from its config.json, `stored`."""
    block = data.get("stepflow")
    if isinstance(block, dict) and any(name in stored and stored[name] != value for name, value in block.items()):
        logger.warning(
            "%s: generation_config.json holds other StepFlow settings than config.json; those of config.json count",
            source,
        )
    for name, value in data.items():
        if name not in ("stepflow", "transformers_version", "_from_model_config"):
            setattr(model.generation_config, name, value)


def _tokenizer_beside(path: Any, settings: StepFlowSettings, kwargs: dict[str, Any]) -> Any:
    """The tokenizer of the base that the settings name, else the one beside the model."""
    where, trust = fetching(kwargs), kwargs.get("trust_remote_code")
    if settings.base_model_name_or_path:
        path, revision = settings.base_model_name_or_path, settings.base_model_revision
    else:
        revision = kwargs.get("revision")
        where |= {"subfolder": kwargs["subfolder"]} if kwargs.get("subfolder") else {}
    return load_base_tokenizer(path, revision, **where, trust_remote_code=trust)


def _without_info(loaded: Any) -> tuple[Any, Any]:
    return loaded if isinstance(loaded, tuple) else (loaded, None)


def is_saved_with_stepflow(config: Any) -> bool:
    """Whether a config is that of a whole model whose repository brings this code."""
    auto_map = config.get("auto_map") if isinstance(config, dict) else getattr(config, "auto_map", None)
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return isinstance(named, str) and named.split("--")[-1] == MODEL_CLASS


# Presets by name are looked up in the hf_stepflow package. This code also runs without the package, and as a copy
# beside it, so it asks for the package's public names, `load_preset` and `preset_for`, only when a preset is meant.


def find_preset(source: Any) -> Any:
    """Finds the preset meant by a name, a base model's id, a preset's path or a Hub id; returns anything else as is.

    Args:
        source: As `stepflow` of `StepFlowModelForCausalLM.from_pretrained`; "auto" needs the model and stays "auto".

    Raises:
        StepFlowConfigError: A preset is meant, but hf_stepflow is not installed; or the preset is wrong.
        StepFlowFileError: There is no preset of this name.
    """
    if source == "auto" or not isinstance(source, str | Path) or _is_settings(source):
        return source
    return _package(str(source)).load_preset(source)


def settings_for(source: Any, model: Any) -> tuple[StepFlowSettings, dict[str, Any] | None]:
    """The settings meant for a model, and the preset they come from.

    Args:
        source: As for `find_preset`.
        model: The model, which a preset is checked against.

    Returns:
        The settings; name, architecture and provenance of the preset for this very model, else None.

    Raises:
        StepFlowError: As `find_preset`; or the preset is for another architecture.
    """
    source = find_preset(source)
    if isinstance(source, str) and source == "auto":
        source = _package(source).preset_for(model)
    if not hasattr(source, "for_model"):
        return read_settings(source), None
    # As plain data, because the package's classes are others than those of a copy of this code.
    settings = StepFlowSettings(**source.for_model(model).to_dict())
    is_its_base = settings.base_model_name_or_path == source.base_model
    return settings, source.to_config().to_dict().get("stepflow_preset") if is_its_base else None


def settings_on(model: Any, stepflow: Any) -> tuple[StepFlowSettings, dict[str, Any] | None]:
    """As `settings_for`; without a source, the settings that the model was stored with, or else the defaults."""
    stored = getattr(model.generation_config, "stepflow", None)
    if stepflow is None and isinstance(stored, dict):
        return settings_from_data(stored, "generation_config.stepflow"), None
    return settings_for(stepflow, model)


def _is_settings(source: str | Path) -> bool:
    """Whether a path holds plain settings, or cannot be a preset and is left to `read_settings` to refuse."""
    path = Path(source)
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):  # unlike Path's own, these take a name that no file can have
        return isinstance(source, Path) and not os.path.isfile(path / "preset.json")
    _, data = read_json(path)
    # A preset's file, config, or lock file.
    is_preset = not data.keys().isdisjoint(("provenance", "stepflow_preset", "format"))
    is_preset = is_preset or (path / "preset.json").is_file()
    return not is_preset and data.get("model_type", "stepflow") == "stepflow"


def _package(source: str) -> Any:
    try:
        return importlib.import_module("hf_stepflow")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("hf_stepflow"):
            raise
        raise StepFlowConfigError(
            f"{source!r} is no path of StepFlow settings, and presets are looked up by the hf_stepflow package, which "
            "is not installed here",
            hint="`pip install hf-stepflow`, or give a dict, a StepFlowConfig, or the path of a file with settings",
        ) from error


def code_files(*entries: str) -> list[Path]:
    """The files of this folder that repositories bring: modules by name, and all that they import from it."""
    files = [_HERE / f"{name}.py" for name in entries]
    needed = {Path(found) for file in files for found in get_relative_import_files(file)}
    return sorted({*files, *needed})


class RepositoryFiles(PushToHubMixin):
    """The files that StepFlow writes to a folder or repository.

    Args:
        code: Modules of this folder to bring, with the files that they import.
        config: Contents of config.json, or None to write none.
        generation_config: The generation config, or None to write none.
        tokenizer_config: Contents of tokenizer_config.json, or None to write none.
    """

    def __init__(
        self,
        code: tuple[str, ...],
        config: dict[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        tokenizer_config: dict[str, Any] | None = None,
    ):
        self.code = code
        self.config = config
        self.generation_config = generation_config
        self.tokenizer_config = tokenizer_config

    @classmethod
    def of_preset(
        cls,
        settings: StepFlowSettings,
        block: dict[str, Any] | None = None,
        base_config: Any = None,
        generation_config: Any = None,
        code_repo: str | None = None,
        code_revision: str | None = None,
    ) -> "RepositoryFiles":
        """The files of a preset.

        Args:
            settings: The settings, which name the base model.
            block: Name, architecture and provenance of the preset, for `stepflow_preset`, or None.
            base_config: The base's config, of which tools read some fields; None where it is not known.
            generation_config: The base's generation config, which the preset's is put over; None for none.
            code_repo: Hub id of the repository that holds the code, or None to bring it.
            code_revision: The commit of `code_repo` to run, None for any.

        Raises:
            StepFlowInputError: The settings name no base model.
        """
        if not settings.base_model_name_or_path:
            raise StepFlowInputError(
                "a preset names its base model, but neither the settings nor the model say which it is",
                hint="set base_model_name_or_path, or save the whole model (preset_only=False)",
            )
        where = "" if code_repo is None else f"{code_repo}--"
        fields = {} if base_config is None else _base_fields(base_config)
        config = StepFlowConfig(
            **settings.to_dict(),
            **({"stepflow_preset": block} if block else {}),
            **({"stepflow_code_revision": code_revision} if code_revision else {}),
            **fields,
            auto_map={"AutoConfig": where + CONFIG_CLASS, "AutoModelForCausalLM": where + MODEL_CLASS},
            architectures=PRESET_ARCHITECTURES,
        )
        return cls(
            PRESET_CODE if code_repo is None else (),
            json.loads(config.to_json_string()) | {"architectures": PRESET_ARCHITECTURES},
            generation_config_with(generation_config, settings),
            {"auto_map": {"AutoTokenizer": [where + TOKENIZER_CLASS, None]}},
        )

    @classmethod
    def of_model(cls, config: dict[str, Any], generation_config: Any, settings: StepFlowSettings) -> "RepositoryFiles":
        """The files beside the weights and the tokenizer of a whole model.

        Args:
            config: The base's config.json.
            generation_config: The base's generation config.
            settings: The settings.
        """
        kept = {name: value for name, value in config.items() if name != "_name_or_path"}
        generation = generation_config_with(generation_config, without_base(settings))
        return cls(MODEL_CODE, kept | {"auto_map": AUTO_MAP}, generation)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the files.

        Args:
            save_directory: Folder; it is made where there is none.
            **kwargs: Options for saving weights, which are ignored: there are none.

        Raises:
            StepFlowFileError: The files of a preset would be put beside weights.
        """
        folder = Path(save_directory)
        if self.tokenizer_config is not None:
            _refuse_whole_model(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("config.json", self.config), ("tokenizer_config.json", self.tokenizer_config)):
            if data is not None:
                text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8")
        if self.generation_config is not None:
            self.generation_config.to_json_file(folder / "generation_config.json")
        for file in code_files(*self.code):
            (folder / file.name).write_bytes(file.read_bytes())
        if self.code == MODEL_CODE:
            write_custom_generate(folder)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """The end of `push_to_hub`, at which the repository is there and its id is whole."""
        _refuse_other_repository(repo_id, kwargs.get("token"), kwargs.get("revision"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def write_custom_generate(folder: Path) -> None:
    """Writes the folder `custom_generate`: StepFlow for each call of `generate`.

    Beside weights, transformers puts it in place of the model's `generate` under `trust_remote_code=True`, whichever
    class loads them.

    Args:
        folder: The folder of the repository.
    """
    inner = folder / CUSTOM_GENERATE
    inner.mkdir(parents=True, exist_ok=True)
    for file in code_files(*MODEL_CODE):
        (inner / file.name).write_bytes(file.read_bytes())
    (inner / "generate.py").write_bytes(GENERATE.encode())


def generation_config_with(base: Any, settings: StepFlowSettings) -> GenerationConfig:
    """Puts the settings into a copy of a generation config, or into a new one for None."""
    config = GenerationConfig() if base is None else GenerationConfig.from_dict(base.to_dict())
    config._from_model_config = False  # else its file would be read without our block
    config.__dict__["stepflow"] = settings.to_dict()
    return config


def without_base(settings: StepFlowSettings) -> StepFlowSettings:
    """The settings for a folder with weights: the base is the model in the folder, whatever its origin is called."""
    return settings.replace(base_model_name_or_path=None, base_model_revision=None)


def _base_fields(config: Any) -> dict[str, Any]:
    """The fields of a model's config that a preset carries over, for tools that read only the preset's."""
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in BASE_FIELDS}
    return {name: value for name, value in found.items() if value is not None}


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


def save_model(
    model: Any,
    folder: Any,
    save: Callable[..., None],
    preset_only: bool,
    is_main_process: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Saves an attached model, whole or its preset alone.

    Args:
        model: The model.
        folder: The folder to write to.
        save: `save_pretrained` of the base model.
        preset_only: Leave the weights out.
        is_main_process: Whether this process writes files that all processes share.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
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
        RepositoryFiles(MODEL_CODE).save_pretrained(folder)
    if not _has_tokenizer(Path(folder)):  # where there is one, it may be newer than ours
        model.stepflow_runtime.tokenizer.save_pretrained(folder)


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, not a redirection to that of a preset's base."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return False
    named = (read_json(file)[1].get("auto_map") or {}).get("AutoTokenizer") or [None]
    return not str(named[0]).endswith(TOKENIZER_CLASS)


def preset_files(model: Any) -> RepositoryFiles:
    """The files of an attached model's preset alone.

    Raises:
        StepFlowInputError: Nothing says which the base model is.
    """
    return RepositoryFiles.of_preset(*_preset_of(model), model.config, model.generation_config)


def _preset_of(model: Any) -> tuple[StepFlowSettings, dict[str, Any] | None]:
    settings = _settings_in_force(model)
    attached, block = model._stepflow_preset
    if not settings.base_model_name_or_path:
        path = getattr(model.config, "_name_or_path", None) or None
        if path is not None and os.path.isdir(path):
            logger.warning("The preset names a folder of this machine as its base model: %s", path)
        settings = settings.replace(base_model_name_or_path=path, base_model_revision=None)
    return settings, block if settings == attached else None


def push_preset_of(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """`push_to_hub` of an attached model's preset alone.

    Raises:
        StepFlowInputError: Nothing says which the base model is, or it is a folder of this machine.
    """
    files = preset_files(model)
    base = (files.config or {})["base_model_name_or_path"]
    if os.path.isdir(base):
        raise StepFlowInputError(
            f"the base model {base!r} is a folder of this machine, which nobody else can load",
            hint="push the base model to the Hub first and set base_model_name_or_path, or push the whole model",
        )
    return files.push_to_hub(repo_id, **{"commit_message": "Upload StepFlow preset"} | kwargs)


def _settings_in_force(model: Any) -> StepFlowSettings:
    """The settings of a call that names none; the preset's, if such calls run without StepFlow."""
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
