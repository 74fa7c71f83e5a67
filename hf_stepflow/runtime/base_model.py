"""The base model of a StepFlow repository: how it is named, which arguments of a call it gets, and its tokenizer.

A call such as `AutoModelForCausalLM.from_pretrained("org/preset", revision="v2", dtype="bfloat16")` names a revision
of the preset's repository, but a dtype of the base's weights.
"""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer
from transformers.utils.hub import cached_file

from .configuration_stepflow import SETTING_NAMES, read_object
from .errors import StepFlowConfigError, StepFlowError

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


def load_base_tokenizer(path: Any, revision: str | None, *args: Any, **kwargs: Any) -> Any:
    """Loads the tokenizer of a model.

    Args:
        path: Folder or Hub id of the model; an adapter without a tokenizer has that of its model.
        revision: Revision of the model.
        *args: Passed on to `AutoTokenizer.from_pretrained`.
        **kwargs: Passed on, but code of the model's own runs only where transformers has none for it.

    Raises:
        StepFlowConfigError: The tokenizer cannot be loaded.
    """
    where = fetching(kwargs) | {"revision": revision}
    try:
        if not read_repository_file(path, "tokenizer_config.json", where):
            adapted = adapter_base(path, where)
            if adapted is not None:
                return load_base_tokenizer(adapted, None, *args, **kwargs)
        kwargs["trust_remote_code"] = trust_for(path, kwargs.get("trust_remote_code"), where)
        return AutoTokenizer.from_pretrained(path, *args, revision=revision, **kwargs)
    except StepFlowError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise StepFlowConfigError(
            f"StepFlow finds steps by the model's tokenizer, and none could be loaded from {str(path)!r}: {error}",
            hint="where the model is private or gated, pass token=...; to put StepFlow on it, pass tokenizer=...",
        ) from error
