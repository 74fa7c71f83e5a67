"""The base model of a preset: facts from its repository, and its weights for a repository that loads on its own."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

from hf_stepflow.presets.strict_json import check_link
from hf_stepflow.runtime.configuration_stepflow import read_object
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowUnsupportedError
from hf_stepflow.runtime.repository import RepositoryFiles

INDEX = "model.safetensors.index.json"
# The weights, the tokenizer in all the forms that transformers reads, and the terms of use.
FILES = (
    "*.safetensors", INDEX, "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_NOT_COPIED = ("config.json", "generation_config.json")
# The index of the largest models has 10 MB.
_LONGEST = 64 * 1024 * 1024


@dataclass(frozen=True)
class BaseFacts:
    """Facts that a base model's repository states.

    Attributes:
        config: The model's config, or None if it cannot be read.
        generation_config: The generation config that the model loads with, or None if it cannot be read.
        problem: The reason why they cannot be read, or None.
    """

    config: Any = None
    generation_config: Any = None
    problem: str | None = None


def facts_of(base: str, revision: str | None = None, token: str | bool | None = None) -> BaseFacts:
    """Reads the configs of a base model from the Hub, its cache or a folder; runs none of its code.

    Args:
        base: A Hub id or folder.
        revision: The revision of the base.
        token: The token for it, as in huggingface_hub.
    """
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, token=token, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:  # older releases stumble over JSON that is no object
        return BaseFacts(problem=first_line(error))
    try:
        generation = GenerationConfig.from_pretrained(base, revision=revision or "main", token=token)
    except OSError:  # there is none: the model makes it from its config
        generation = GenerationConfig.from_model_config(config)
    return BaseFacts(config, generation)


def current_commit(
    repo_id: str, token: str | bool | None = None, revision: str | None = None
) -> tuple[str | None, str | None]:
    """Asks the Hub which commit a branch or tag points to; returns the commit, or None and the reason.

    Args:
        repo_id: The id of the repository.
        token: The token for it, as in huggingface_hub.
        revision: A branch or tag; None for the main branch.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the transport too

    try:
        return HfApi(token=token).model_info(repo_id, revision=revision).sha, None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        return None, first_line(error)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or the kind of error if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fetch_base(base: str, revision: str | None, token: str | bool | None) -> Path:
    """Returns the folder of a base model's files, fetched from the Hub unless `base` is a local folder.

    Raises:
        StepFlowFileError: The files cannot be fetched.
    """
    if os.path.isdir(base):
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        # Subfolders hold the same weights in other formats.
        return Path(
            snapshot_download(base, revision=revision, token=token, allow_patterns=list(FILES), ignore_patterns="*/*")
        )
    except (OSError, ValueError) as error:
        raise StepFlowFileError(
            f"the weights of {base!r} could not be fetched: {first_line(error)}",
            hint="export without --merge-weights needs none; or give a folder with --base",
        ) from error


def write_merged(folder: Path, source: Path, base: str, settings: Any, generation_config: Any) -> None:
    """Writes the files of a whole model with StepFlow to a folder.

    Args:
        folder: An empty folder.
        source: The folder of the base model.
        base: The name of the base model, for errors.
        settings: The settings of StepFlow.
        generation_config: The generation config that the base loads with.

    Raises:
        StepFlowFileError: A file of the base is a link out of its folder.
    """
    for pattern in FILES:
        for file in sorted(source.glob(pattern)):
            if file.name not in _NOT_COPIED and file.is_file():
                check_link(file)
                shutil.copyfile(file, folder / file.name)
    config = _read(source / "config.json", base)
    RepositoryFiles.of_model(config, generation_config, settings).save_pretrained(folder)


def check_base(source: Path, base: str) -> None:
    """Checks that the files of a base model suffice for a repository that loads on its own.

    Args:
        source: The folder of the base model.
        base: The name of the base model, for errors.

    Raises:
        StepFlowUnsupportedError: The base needs code of its own.
        StepFlowFileError: A file is missing, broken, or a link out of the folder.
    """
    config = _read(source / "config.json", base)
    if config.get("model_type") not in CONFIG_MAPPING:
        raise StepFlowUnsupportedError(
            f"{base!r} brings code of its own (model type {str(config.get('model_type'))[:60]!r}), not to be copied",
            hint="export without --merge-weights: the preset loads the base from where it is",
        )
    tokenizer = source / "tokenizer_config.json"
    if not tokenizer.is_file():
        raise StepFlowFileError(f"{base!r} has no tokenizer_config.json", hint="save the tokenizer beside the model")
    if _read(tokenizer, base).get("auto_map"):
        raise StepFlowUnsupportedError(
            f"the tokenizer of {base!r} brings code of its own, which is not copied",
            hint="export without --merge-weights: the preset loads the base from where it is",
        )
    present = {file.name for file in source.glob("*.safetensors")}
    index = source / INDEX
    wanted = set(_read(index, base).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(wanted - present)
    if missing or not wanted:
        raise StepFlowFileError(
            f"{base!r} lacks weights: {', '.join(map(repr, missing[:3])) or 'its index names none'}",
            hint="only safetensors are exported: load the model, save it, and give that folder with --base",
        )


def _read(file: Path, base: str) -> dict[str, Any]:
    if not file.is_file():
        adapter = " (it is an adapter)" if (file.parent / "adapter_config.json").is_file() else ""
        raise StepFlowFileError(
            f"{base!r} has no {file.name}{adapter}",
            hint="merge an adapter into its model first (merge_and_unload), and give that folder with --base",
        )
    check_link(file)
    return read_object(file, f"{file.name} of {base!r}", _LONGEST)
