"""Pushes repositories to the Hub: an export to a temporary folder, uploaded as one commit."""

import contextlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from hf_stepflow.presets.preset import Preset, load_preset
from hf_stepflow.presets.strict_json import read_json_object
from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.repository import is_saved_with_stepflow

from .base import INDEX, current_commit, first_line
from .export import (
    CUSTOM_GENERATE,
    Export,
    export_code,
    export_custom_generate,
    export_preset,
    is_local,
    with_base,
)
from .verify import code_hashes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.get_logger(__name__)

_LOGIN = "`hf auth login`, or a token that may write there in the environment variable HF_TOKEN"
_ANYWHERE = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class Push:
    """An upload to the Hub, or the plan of one.

    Attributes:
        repo_id: Id of the repository.
        revision: The branch, None for the main one.
        url: Address of the repository; None for a dry run.
        commit: The commit that the branch is at; None for a dry run.
        export: The files.
    """

    repo_id: str
    revision: str | None
    url: str | None
    commit: str | None
    export: Export

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        data = self.export.to_dict()
        del data["folder"]
        own = {"repo_id": self.repo_id, "revision": self.revision, "url": self.url, "commit": self.commit}
        return own | {"dry_run": self.commit is None} | data


def push_preset(
    preset: "str | Path | Preset",
    repo_id: str,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    merge_weights: bool = False,
    code_repo: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Push:
    """Pushes the repository of a preset; running it again completes a push that was interrupted.

    Args:
        preset: The preset, as for `load_preset`.
        repo_id: Id of the repository, which is made where there is none.
        base: Hub id of another base model than the preset's.
        base_revision: Revision of the base; None records the commit that it is at now, if the Hub can be asked.
        merge_weights: Push the base's weights too.
        code_repo: As for `export_preset`; without a revision, the commit that it is at now is recorded.
        private: Whether a new repository is private; None leaves that to the Hub.
        revision: The branch, which is made where there is none.
        token: Token, as in huggingface_hub; None takes the one of the environment or of `hf auth login`.
        dry_run: Only export, and return what would be uploaded; nothing is asked about the repository.

    Raises:
        StepFlowInputError: The base is a folder of this machine, or the Hub would refuse the id.
        StepFlowFileError: The repository holds something else, or the Hub cannot be reached or refuses.
        StepFlowError: As `export_preset`.

    Example:
        >>> from hf_stepflow.hub.push import push_preset
        >>> push = push_preset("qwen3-8b", "your-name/qwen3-8b-stepflow", dry_run=True)  # doctest: +SKIP
    """
    preset = with_base(load_preset(preset, token=token), base, base_revision)
    assert preset.base_model is not None
    if is_local(preset.base_model):
        raise StepFlowInputError(
            f"the base model {preset.base_model!r} is a folder of this machine, which nobody else can load",
            hint="push the base model first, and give its Hub id with --base",
        )
    warnings = []
    if preset.base_model_revision is None:
        commit, problem = current_commit(preset.base_model, token)
        preset = with_base(preset, None, commit)
        if problem is not None:
            warnings = [f"the revision of {preset.base_model!r} is not recorded, since it cannot be had: {problem}"]
            logger.warning("%s", warnings[0])
    with tempfile.TemporaryDirectory() as folder:
        export = export_preset(
            preset,
            Path(folder) / "export",
            merge_weights=merge_weights,
            code_repo=code_repo,
            repo_id=repo_id,
            token=token,
        )
        export = replace(export, warnings=(*warnings, *export.warnings))
        return _push(export, repo_id, private, revision, token, dry_run)


def push_custom_generate(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Push:
    """Pushes the repository for `generate(custom_generate=...)`.

    The arguments and errors are those of `push_preset`.
    """
    with tempfile.TemporaryDirectory() as folder:
        export = export_custom_generate(Path(folder) / "export", repo_id=repo_id)
        return _push(export, repo_id, private, revision, token, dry_run)


def push_code(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Push:
    """Pushes the repository with the code that presets without code name (`push_preset(code_repo=...)`).

    The arguments and errors are those of `push_preset`.
    """
    with tempfile.TemporaryDirectory() as folder:
        export = export_code(Path(folder) / "export", repo_id=repo_id)
        return _push(export, repo_id, private, revision, token, dry_run)


def _push(export: Export, repo_id: str, private: bool | None, revision: str | None, token: Any, dry_run: bool) -> Push:
    if dry_run:
        return Push(repo_id, revision, None, None, export)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError  # of the transport too

    api = HfApi(token=token)
    name = export.kind if export.preset is None else f"the StepFlow preset {export.preset.name}"
    try:
        _check_repository(api, repo_id, export.kind, private, revision)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        stale = _leftovers(api, url.repo_id, export, revision)
        # Not upload_folder: where the Hub is in trouble, that makes several commits, and shows half a preset.
        commit = api.create_commit(
            url.repo_id,
            [CommitOperationDelete(path) for path in stale]
            + [CommitOperationAdd(path, export.folder / path) for path in export.files],
            commit_message=f"hf-stepflow: {name}",
            revision=revision,
        )
    except StepFlowError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise StepFlowFileError(
            f"{repo_id!r} could not be pushed: {first_line(error)}",
            hint=f"{_LOGIN}, if it asks for one; running the same again completes an interrupted push",
        ) from error
    return Push(url.repo_id, revision, str(url), commit.oid, export)


def _leftovers(api: "HfApi", repo_id: str, export: Export, revision: str | None) -> list[str]:
    """Files of an earlier push that this one does not bring: code, and the weights of a model with other shards."""
    code = {name for files in code_hashes().values() for name in files}
    there = set(api.list_repo_files(repo_id, revision=revision)) - set(export.files)
    weights = [path for path in there if path.endswith(".safetensors") or path == INDEX]
    own = [path for path in there if path.removeprefix(f"{CUSTOM_GENERATE}/") in code]
    return sorted(own + (weights if export.kind == "merged" else []))


def _check_repository(api: "HfApi", repo_id: str, kind: str, private: bool | None, revision: str | None) -> None:
    """Refuses a repository that holds something else, or that others can see where it should be private."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return
    if private and not info.private:
        raise StepFlowInputError(
            f"{repo_id!r} is there already and is public, but --private was asked for",
            hint="make it private in its settings on the Hub first, or push to another one",
        )
    if revision is not None:
        with contextlib.suppress(RevisionNotFoundError):  # it is made from the main branch, which is looked at then
            info = api.model_info(repo_id, revision=revision)
    names = {sibling.rfilename for sibling in info.siblings or []} - _ANYWHERE
    foreign = _foreign(api, repo_id, info.sha, names, kind)
    if foreign is not None:
        raise StepFlowFileError(
            f"{repo_id!r} holds something else already ({foreign})",
            hint="push to a repository of its own, which is made where there is none",
        )


def _foreign(api: "HfApi", repo_id: str, sha: str | None, names: set[str], kind: str) -> str | None:
    """A file that this kind of repository does not hold, by the names that are there; None where there is none."""
    of_generate = next((name for name in sorted(names) if name.startswith(f"{CUSTOM_GENERATE}/")), None)
    if kind == "code":
        other = {name for name in names if "/" in name or not name.endswith(".py")}
        return min(other or names) if other or (names and "modeling_stepflow.py" not in names) else None
    if kind == "custom_generate":
        return next((name for name in sorted(names) if not name.startswith(f"{CUSTOM_GENERATE}/")), None)
    weights = next((name for name in sorted(names) if name.endswith((".safetensors", ".bin", ".gguf"))), None)
    if not names:
        return None
    if "config.json" not in names:
        return of_generate or min(names)
    config = read_json_object(Path(os.path.realpath(api.hf_hub_download(repo_id, "config.json", revision=sha))))
    if config.get("model_type") == "stepflow" and weights is None:
        return of_generate
    if kind == "merged" and is_saved_with_stepflow(config):
        return None
    return weights or f"the config of a model of type {str(config.get('model_type'))[:60]!r}"
