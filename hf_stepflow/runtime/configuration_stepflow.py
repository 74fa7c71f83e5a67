"""StepFlowConfig, the config of a StepFlow repository; how settings are read; and the base model that it names.

A call such as `AutoModelForCausalLM.from_pretrained("org/preset", revision="v2", dtype="bfloat16")` names a revision
of the preset's repository, but a dtype of the base's weights.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, cast

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .errors import StepFlowConfigError, StepFlowFileError, shown
from .settings import DEFAULTS, SETTING_NAMES, StepFlowSettings, unknown_setting, with_summary_start

logger = logging.get_logger(__name__)

# More than any file needs, and little enough that no file holds up the program.
MAX_FILE_BYTES = 4 * 1024 * 1024

# What the config.json of a preset says; `StepFlowConfig` puts a class of transformers before it.
PRESET_ARCHITECTURES = ["StepFlowModelForCausalLM"]


class StepFlowConfig(PretrainedConfig):
    """The configuration of a StepFlow model: the settings of `StepFlowSettings` as flat fields of a config.json.

    Other names are Transformers' own.

    Raises:
        StepFlowConfigError: A value that no model could use, or the misspelt name of a setting; the message names it
            and what is expected.

    Example:
        >>> from hf_stepflow import StepFlowConfig
        >>> StepFlowConfig(tau_max=0.1).alpha
        0.06
    """

    model_type = "stepflow"

    def __init__(self, **kwargs: Any):
        given = {name: kwargs.pop(name) for name in SETTING_NAMES if name in kwargs}
        for name in kwargs:
            if name not in _TRANSFORMERS_FIELDS and difflib.get_close_matches(name, SETTING_NAMES, 1, 0.85):
                raise unknown_setting(name)
        _check_code_revision(kwargs.get("stepflow_code_revision"))
        settings = StepFlowSettings(**with_summary_start(given, DEFAULTS["summary_start"]))
        for name in SETTING_NAMES:
            setattr(self, name, getattr(settings, name))
        super().__init__(**kwargs)
        if self.architectures == PRESET_ARCHITECTURES:
            # `transformers serve` looks the first name up in transformers; this one leads it to the auto_map.
            self.architectures = ["AutoModelForCausalLM", *PRESET_ARCHITECTURES]

    @property
    def settings(self) -> StepFlowSettings:
        """The settings alone, checked again (fields may have been changed since)."""
        return StepFlowSettings(**{name: getattr(self, name) for name in SETTING_NAMES})


def _check_code_revision(recorded: Any) -> None:
    """Refuses to run code of another commit than the one that a preset without code records."""
    loaded = re.fullmatch(r"transformers_modules\..*\.([0-9a-f]{40})\.\w+", __name__)  # as transformers names it
    if recorded is not None and loaded and recorded != loaded[1]:
        raise StepFlowConfigError(
            f"the preset is pinned to commit {shown(recorded)} of its code, but commit {loaded[1]!r} was loaded",
            hint=f"pass code_revision={shown(recorded)}",
        )


def read_settings(
    source: "StepFlowConfig | StepFlowSettings | dict[str, Any] | str | Path | None",
) -> StepFlowSettings:
    """Reads settings from whatever a user has at hand.

    Args:
        source: A config, settings, a dict, the path of a JSON file or of a folder with a config.json; None gives the
            defaults (the paper's constants).

    Raises:
        StepFlowConfigError: A dict holds unknown names, or a value is wrong.
        StepFlowFileError: The path cannot be read, or the file holds no JSON object.
    """
    if source is None:
        return StepFlowSettings()
    if isinstance(source, StepFlowSettings):
        return source
    if isinstance(source, dict):
        return StepFlowSettings().replace(**source)
    if type(source).__name__ == "StepFlowSettings":  # of another copy of this code
        return StepFlowSettings(**cast(Any, source).to_dict())
    if getattr(source, "model_type", None) == "stepflow":
        return StepFlowSettings(**{name: getattr(source, name, DEFAULTS[name]) for name in SETTING_NAMES})
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    raise StepFlowConfigError(
        f"stepflow must be a StepFlowConfig, a dict, a path or None, got {type(source).__name__}"
    )


def _read_file(path: Path) -> StepFlowSettings:
    file, data = read_json(path)
    if "stepflow" in data and isinstance(data["stepflow"], dict):
        data = data["stepflow"]
    return settings_from_data(data, str(file))


def read_json(path: Path) -> tuple[Path, dict[str, Any]]:
    """Reads the JSON object in a file, or in the config.json of a folder; returns the file too.

    Raises:
        StepFlowFileError: There is no such file, or it holds something else.
    """
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):  # unlike Path's own, these take a name that no file can have
        raise StepFlowFileError(
            f"no StepFlow settings at {shown(str(path))}",
            hint="give the path of a JSON file or of a folder with a config.json, a dict, or a StepFlowConfig",
        )
    return file, read_object(file, repr(str(file)))


def read_object(file: Path, name: str, longest: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Reads the JSON object in an untrusted file.

    Args:
        file: The file.
        name: The name of the file in messages.
        longest: The greatest number of bytes it may have.

    Raises:
        StepFlowFileError: The file cannot be read, is too long, or holds something else.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(longest + 1)
    except OSError as error:
        raise StepFlowFileError(f"{name} cannot be read: {error}", hint="check its permissions") from error
    if len(content) > longest:
        raise StepFlowFileError(f"{name} is longer than {longest} bytes, which no such file needs")
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, an integer of thousands of digits, too deep
        raise StepFlowFileError(f"{name} is not JSON: {error}", hint="write or fetch the file again") from error
    if not isinstance(data, dict):
        raise StepFlowFileError(f"{name} holds {type(data).__name__}, expected an object")
    return data


def settings_from_data(data: dict[str, Any], source: str) -> StepFlowSettings:
    """Reads settings from stored data, which a newer release may have written: unknown names give a warning.

    Args:
        data: The stored names and values; the names of Transformers' own config fields are ignored.
        source: Where the data come from, for messages.
    """
    unknown = sorted(set(data) - set(SETTING_NAMES) - _TRANSFORMERS_FIELDS)
    if unknown:
        logger.warning(
            "%s: unknown StepFlow settings %s are ignored; they may come from a newer hf-stepflow: "
            "upgrade with `pip install -U hf-stepflow`",
            source,
            unknown,
        )
    return StepFlowSettings().replace(**{name: data[name] for name in SETTING_NAMES if name in data})


# Fields of the base's config that a preset carries over.
BASE_FIELDS = (
    "bos_token_id", "eos_token_id", "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id", "vocab_size",
)  # fmt: skip
_TRANSFORMERS_FIELDS = set(PretrainedConfig().to_dict()) | {
    *BASE_FIELDS, "architectures", "auto_map", "dtype", "model_type", "stepflow_code_revision", "stepflow_preset",
    "torch_dtype", "transformers_version",
}  # fmt: skip


# How files are fetched: the same for the preset's repository and for the base's.
_FETCHING = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# Where in the preset's repository they are, and what transformers hands along for itself.
_OF_THE_REPOSITORY = ("revision", "subfolder", "code_revision", "_commit_hash", "_from_auto", "_from_pipeline")
# Fields of a preset's config that say nothing of the base.
_OF_THE_PRESET = {
    *SETTING_NAMES, "_name_or_path", "architectures", "auto_map", "model_type", "stepflow_code_revision",
    "stepflow_preset", "transformers_version",
}  # fmt: skip


def read_repository_file(path: Any, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Reads the JSON object in a file of a folder or Hub repository; empty where there is no such file.

    Args:
        path: Folder or Hub id.
        name: Name of the file.
        kwargs: Arguments of the call to answer; those that say where files are and how to fetch them count.

    Raises:
        OSError: The repository cannot be reached, or the file holds no JSON object or is too long.
    """
    where = {key: kwargs[key] for key in (*_FETCHING, "revision", "subfolder") if kwargs.get(key) is not None}
    file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **where)
    return {} if file is None else read_object(Path(file), f"{name} of {str(path)!r}")


def commit_of(path: Any, kwargs: dict[str, Any]) -> str | None:
    """The commit whose files a call reads of a Hub repository; None for a folder.

    Args:
        path: Folder or Hub id.
        kwargs: As for `read_repository_file`.
    """
    where = {key: kwargs[key] for key in (*_FETCHING, "revision") if kwargs.get(key) is not None}
    file = cached_file(str(path), "config.json", _raise_exceptions_for_missing_entries=False, **where)
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", file or "")
    return None if found is None else found[1]


def fetching(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that say how files are fetched."""
    return {name: kwargs[name] for name in _FETCHING if kwargs.get(name) is not None}


def meant_for_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call on a preset's repository that are meant for the base: its revision is not."""
    kept = {name: value for name, value in kwargs.items() if name not in _OF_THE_REPOSITORY}
    adapter = kept.pop("adapter_kwargs", None) or {}
    if "_adapter_model_path" not in adapter:  # else there is an adapter in the repository, of that very revision
        adapter = {name: value for name, value in adapter.items() if name != "revision"}
    return kept | {"adapter_kwargs": adapter} if adapter else kept


def changed_fields(config: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The changes to a preset's config that only the base can honour, as arguments for it.

    Transformers puts arguments into the config wherever it has such a field: attention implementation, dtype, and
    every field that the preset carries over from its base.

    Args:
        config: The config of the call.
        data: The config as it is stored.
    """
    before, after = type(config).from_dict(dict(data)).to_dict(), config.to_dict()
    changed = {
        name: value
        for name, value in after.items()
        if name not in _OF_THE_PRESET and not name.startswith("_") and value != before.get(name)
    }
    for name in ("attn_implementation", "experts_implementation"):
        value = getattr(config, f"_{name}", None)
        if value is not None:
            changed[name] = value
    return changed


def base_of(config: Any, source: Any) -> tuple[str, str | None]:
    """The base model that a preset names, and its revision.

    Raises:
        StepFlowConfigError: The preset names none.
    """
    base = getattr(config, "base_model_name_or_path", None)
    if not base:
        raise StepFlowConfigError(
            f"the preset {str(source)!r} names no base model, so there is nothing to put StepFlow on",
            hint="set base_model_name_or_path in its config.json, or load the base model and attach the preset to it",
        )
    return base, getattr(config, "base_model_revision", None)


def adapter_base(path: Any, kwargs: dict[str, Any]) -> str | None:
    """The model that the adapter in a repository is for; None where there is no adapter."""
    return read_repository_file(path, "adapter_config.json", kwargs).get("base_model_name_or_path")


def trust_for(path: Any, trust: Any, kwargs: dict[str, Any]) -> Any:
    """Whether code of a base model's own may run: never where transformers has code for it.

    Args:
        path: Folder or Hub id of the base.
        trust: `trust_remote_code` of the call.
        kwargs: Arguments for loading the base.

    Raises:
        StepFlowConfigError: The base is a preset itself.
    """
    data = read_repository_file(path, "config.json", kwargs)
    if not data:
        adapted = adapter_base(path, kwargs)
        return trust if adapted is None else trust_for(adapted, trust, fetching(kwargs))
    if data.get("model_type") == "stepflow":
        raise StepFlowConfigError(
            f"the base model {str(path)!r} is a StepFlow preset itself",
            hint="name the model that the preset is for as base_model_name_or_path",
        )
    return False if data.get("model_type") in CONFIG_MAPPING else trust
