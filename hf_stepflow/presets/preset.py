"""Presets: the settings for a model and their provenance as data, found by name, base model, path or Hub id.

A preset is a JSON file that can be read, reviewed and contributed like code, and is never executed. Its provenance is
of one kind: "paper" (published settings), "rule" (the paper's constants, not calibrated for the model) or "measured"
(an evaluation of these settings on the model, whatever its outcome).

A preset's own file is read without torch and transformers, so commands that list and show presets answer at once.
"""

import difflib
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowError, StepFlowFileError, shown
from hf_stepflow.runtime.settings import SETTING_NAMES, StepFlowSettings

from .architecture import Architecture, architecture_of, is_model
from .checks import (
    BASE_SETTINGS,
    KINDS,
    PRESET_SETTINGS,
    SCHEMA_VERSION,
    Problem,
    fitting_problems,
    preset_block_problems,
    preset_problems,
    schema_problems,
    settings_problems,
)
from .lock import FORMAT as LOCK_FORMAT
from .lock import Lock
from .strict_json import calibrations_folder, read_json_object

if TYPE_CHECKING:
    from hf_stepflow.runtime.configuration_stepflow import StepFlowConfig

logger = logging.getLogger(__name__)

RULE_STATEMENT = (
    "The bridge acts in the bottom quarter of the attention layers and the injection in the top quarter, with the "
    "paper's constants tau_max = 0.15 and alpha = 0.06. NOT calibrated for this model; no result on it is claimed."
)
# Model types that write one format, which fixes their markers.
_MARKERS = {"gpt_oss": ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
# The record of the calibration that measured a preset, in its repository; NAME.reproduce.json beside NAME.json.
RECORD = "reproduce.json"
_LIST_HINT = "`hf-stepflow presets list` shows the names; a path or the Hub id of a preset repository also works"


@dataclass(frozen=True)
class Preset:
    """Settings for one model, and their provenance.

    Attributes:
        name: The name of the preset.
        base_model: The Hub id of its model, or None if unknown.
        base_model_revision: The model's revision, or None for any.
        architecture: The architecture that a model must have, or None if the file does not say.
        settings: The settings, including the base model.
        provenance: The origin of the settings; `kind` is "paper", "rule", "measured", or "unstated" for a config.json
            without provenance.
        path: The file, or None for a preset that was not read from a file.
        notes: Notes for users, or None.
        lock: The lock file that the preset was read by, or None.

    Example:
        >>> preset = load_preset("qwen3-8b")
        >>> preset.kind, preset.settings.replace(tau_max=0.1).tau_max
        ('rule', 0.1)
    """

    name: str
    base_model: str | None
    base_model_revision: str | None
    architecture: Architecture | None
    settings: StepFlowSettings
    provenance: dict[str, Any]
    path: Path | None
    notes: str | None = None
    lock: Lock | None = None

    @property
    def kind(self) -> str:
        """The kind of provenance."""
        return self.provenance["kind"]

    @property
    def claim(self) -> str:
        """The kind of provenance and its meaning, in one line."""
        stated = self.provenance
        if self.kind == "paper":
            return f"paper (arXiv {stated['arxiv']}; its figures are the paper's, not measured by this project)"
        if self.kind == "measured":
            return f"measured ({stated['verdict']}; {stated['dataset']}, n = {stated['n']}, {stated['date']})"
        if self.kind == "rule":
            return "rule (NOT calibrated for this model)"
        return "unstated (the file does not say where its settings come from)"

    def __str__(self) -> str:
        base = "" if self.base_model is None else f" for {self.base_model}"
        architecture = "" if self.architecture is None else f", {self.architecture}"
        return f"{self.claim}: {self.name}{base}{architecture}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready data of a preset file."""
        settings = self.settings.to_dict()
        data = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "base_model": self.base_model,
            "base_model_revision": self.base_model_revision,
            "architecture": None if self.architecture is None else self.architecture.to_dict(),
            "settings": {name: settings[name] for name in PRESET_SETTINGS if name in settings},
            "provenance": self.provenance,
        }
        return data if self.notes is None else data | {"notes": self.notes}

    def to_config(self) -> "StepFlowConfig":
        """Returns the config of a preset repository, with name, architecture and provenance in `stepflow_preset`."""
        from hf_stepflow.runtime.configuration_stepflow import StepFlowConfig

        data, block = self.to_dict(), {}
        if self.architecture is not None and self.kind in KINDS:
            block = {key: data[key] for key in ("name", "architecture", "provenance", "notes") if key in data}
        return StepFlowConfig(**self.settings.to_dict(), **({"stepflow_preset": block} if block else {}))

    def check_model(self, model: Any) -> None:
        """Refuses a model that this preset is not for.

        Args:
            model: A causal language model or its config.

        Raises:
            StepFlowConfigError: The architecture, or the number of layers or heads, differs.
            StepFlowUnsupportedError: StepFlow does not support the model.
        """
        if self.architecture is None:
            return
        found = architecture_of(model)
        if not self.architecture.is_met_by(found, compare_layers=is_model(model)):
            raise StepFlowConfigError(
                f"the preset {self.name!r} is for {self.architecture}, but this model is {found}",
                hint='`hf-stepflow presets list` shows the presets; "auto" selects the one that fits, or the rule',
            )

    def for_model(self, model: Any) -> StepFlowSettings:
        """Checks a model and returns the settings for it.

        If the model is not the base model itself but, for instance, fine-tuned from it, the settings omit the base:
        the tokenizer must be the model's own.

        Raises:
            StepFlowConfigError: As for `check_model`.
        """
        self.check_model(model)
        path = _path_of(model)
        if not path or _same(path, self.base_model):
            return self.settings
        return self.settings.replace(**dict.fromkeys(BASE_SETTINGS))


def list_presets(base_model: str | None = None) -> list[Preset]:
    """Lists the presets that come with the package, by name; `hf_stepflow.hub.search` looks on the Hub too.

    Args:
        base_model: The Hub id of a base model, in any case, to list the presets for it alone.

    Raises:
        StepFlowError: A file of the collection is invalid.

    Example:
        >>> [preset.name for preset in list_presets() if preset.kind == "measured"]
        ['smollm2-135m-instruct', 'stepflow-tiny-reasoner']
    """
    presets = (_read(file) for file in _preset_files())
    return [preset for preset in presets if base_model is None or _same(base_model, preset.base_model)]


def load_preset(
    name_or_path_or_hub_id: "str | Path | Preset", *, revision: str | None = None, token: str | bool | None = None
) -> Preset:
    """Loads a preset from the package, a file, a folder or the Hub.

    Args:
        name_or_path_or_hub_id: The name of a preset that comes with the package; a base model's Hub id, in any case;
            the path of a JSON file (a lock file too), or of a folder with a preset.json or a config.json of model type
            "stepflow"; or the Hub id of a preset repository, of which only the config.json is fetched.
        revision: The revision of the preset repository.
        token: The token for the preset repository, as in huggingface_hub.

    Raises:
        StepFlowFileError: There is no such preset, or its file cannot be read.
        StepFlowConfigError: The file is not a valid preset, the message names file, field and value; or the preset or
            the code is not what a lock file pins.

    Example:
        >>> print(load_preset("Qwen/Qwen3-8B"))
        rule (NOT calibrated for this model): qwen3-8b for Qwen/Qwen3-8B, ...
    """
    if isinstance(name_or_path_or_hub_id, Preset):
        return name_or_path_or_hub_id
    name = str(name_or_path_or_hub_id)
    if isinstance(name_or_path_or_hub_id, str):
        known = {file.stem: file for file in _preset_files()}
        if name in known:
            return _read(known[name])
        preset = _of_base_model(name)
        if preset is not None:
            return preset
    if name and os.path.exists(name):  # unlike Path's own, it takes a name that no file can have
        return _read(_file_in(Path(name)), token)
    if isinstance(name_or_path_or_hub_id, str) and HUB_ID.fullmatch(name) and ".." not in name:
        return _fetch(name, revision, token)
    close = difflib.get_close_matches(name.lower(), [file.stem for file in _preset_files()], 1)
    raise StepFlowFileError(
        f"there is no preset {shown(name)}: no such name, base model or path",
        hint=f"did you mean {close[0]!r}? {_LIST_HINT}" if close else _LIST_HINT,
    )


def record_beside(preset: Path) -> Path:
    """The place of the record of the calibration that measured a preset.

    Args:
        preset: The preset's file.
    """
    in_repository = preset.name in ("preset.json", "config.json")
    return preset.with_name(RECORD if in_repository else f"{preset.stem}.{RECORD}")


def find_problems(path: str | Path) -> list[StepFlowError]:
    """Lists everything that is wrong with a preset's file.

    The package's own checks apply, and then the JSON schema if the package jsonschema is installed.

    Args:
        path: The path of the file, or of a folder as for `load_preset`.
    """
    try:
        file = _file_in(Path(path))
        data = read_json_object(file)
        if data.get("model_type") == "stepflow":
            _from_config(data, file, file.parent.resolve().name, file)
            return []
    except StepFlowError as error:
        return [error]
    problems = preset_problems(data, _stem(file)) or schema_problems(data)
    return [_error(file, problem) for problem in problems]


def validate_preset(path: str | Path) -> Preset:
    """Checks a preset's file, for instance before it is contributed, and returns the preset.

    Args:
        path: As for `find_problems`.

    Raises:
        StepFlowFileError: The file cannot be read.
        StepFlowConfigError: The preset is invalid; the message names file, field, value and expectation.
    """
    problems = find_problems(path)
    if problems:
        raise problems[0]
    return _read(_file_in(Path(path)))


def rule_preset(model: Any) -> Preset:
    """Makes the rule for a model without a preset: bottom and top quarter, the paper's constants, not calibrated.

    Args:
        model: A causal language model or its config.

    Raises:
        StepFlowUnsupportedError: StepFlow does not support the model.
    """
    architecture = architecture_of(model)
    settings = StepFlowSettings()
    if architecture.model_type in _MARKERS:
        thinking, summary = _MARKERS[architecture.model_type]
        settings = settings.replace(thinking_start=thinking, summary_start=summary)
    provenance = {"kind": "rule", "calibrated": False, "statement": RULE_STATEMENT}
    return Preset("rule", _path_of(model) or None, None, architecture, settings, provenance, None)


def preset_for(model: Any) -> Preset:
    """Returns the preset that "auto" selects: the one for this base model, else the rule, with a warning.

    "auto" skips a preset that was measured to harm; such a preset must be requested by name.

    Args:
        model: A causal language model or its config.

    Raises:
        StepFlowUnsupportedError: StepFlow does not support the model.
    """
    path = _path_of(model)
    known = _of_base_model(path)
    if known is not None and known.provenance.get("verdict") not in ("harm", "trade"):
        return known
    preset = rule_preset(model)
    name = path or type(model).__name__
    logger.warning(
        "%s; taking the rule for its architecture (%s): bottom and top quarter with the paper's constants, NOT "
        "calibrated for this model.",
        f"There is no StepFlow preset for {name!r}"
        if known is None
        else f"The StepFlow preset {known.name!r} for {name!r} was measured to harm",
        preset.architecture,
    )
    return preset


def _preset_files() -> list[Path]:
    files = calibrations_folder().glob("*.json")
    return sorted(file for file in files if file.name != "schema.json" and not file.name.endswith(f".{RECORD}"))


def _path_of(model: Any) -> str:
    return getattr(getattr(model, "config", model), "_name_or_path", None) or ""


def _same(one: str, other: str | None) -> bool:
    return other is not None and one.casefold() == other.casefold()


def _of_base_model(name: str) -> Preset | None:
    return next(iter(list_presets(name)), None) if name else None


def _file_in(path: Path) -> Path:
    """Returns the preset's file in a folder, or the file itself."""
    if not path.is_dir():
        return path
    file = next((path / name for name in ("preset.json", "config.json") if (path / name).is_file()), None)
    if file is None:
        raise StepFlowFileError(
            f"the folder {str(path)!r} holds neither a preset.json nor a config.json", hint=_LIST_HINT
        )
    return file


def _stem(file: Path) -> str | None:
    """Returns the name that a preset must have to match its file, or None for any."""
    return None if file.name in ("preset.json", "config.json") else file.stem


def _read(file: Path, token: str | bool | None = None) -> Preset:
    """Reads the preset in a local file, or the one that a lock file pins."""
    data = read_json_object(file)
    if data.get("format") == LOCK_FORMAT:
        return _locked(Lock.read(data, file), token)
    if data.get("model_type") == "stepflow":
        return _from_config(data, file, file.parent.resolve().name, file)
    if "model_type" in data:
        raise _not_stepflow(str(file), data)
    problems = preset_problems(data, _stem(file))
    if problems:
        raise _error(file, problems[0])
    base, revision = data["base_model"], data.get("base_model_revision")
    settings = StepFlowSettings(base_model_name_or_path=base, base_model_revision=revision, **data["settings"])
    architecture = Architecture.from_dict(data["architecture"])
    return Preset(data["name"], base, revision, architecture, settings, data["provenance"], file, data.get("notes"))


def _locked(lock: Lock, token: str | bool | None) -> Preset:
    """The preset that a lock file pins, with the revision of its base; what is pinned has been checked."""
    lock.check_code()
    preset = load_preset(lock.source, revision=lock.revision, token=token)
    lock.check_preset(preset.to_dict())
    settings = preset.settings.replace(base_model_revision=lock.base_revision)
    return replace(preset, base_model_revision=lock.base_revision, settings=settings, lock=lock)


def _from_config(data: dict[str, Any], file: Path, name: str, source: Path | str) -> Preset:
    """Reads the preset in a config.json of model type "stepflow", which a newer release may have written."""
    from hf_stepflow.runtime.configuration_stepflow import settings_from_data

    given = {key: data[key] for key in SETTING_NAMES if key in data}
    block = data.get("stepflow_preset", {})
    problems = list(settings_problems(given, ""))
    if "stepflow_preset" in data:
        problems += preset_block_problems(block, "stepflow_preset")
        if not problems:
            problems += fitting_problems(given, block["architecture"], block["provenance"])
    if problems:
        raise _error(source, problems[0])
    try:
        settings = settings_from_data(data, str(source))
    except StepFlowConfigError as error:
        raise StepFlowConfigError(f"{str(source)!r}: {error.message}", hint=error.hint) from error
    name, notes = block.get("name", name), block.get("notes")
    base, revision = settings.base_model_name_or_path, settings.base_model_revision
    architecture = Architecture.from_dict(block["architecture"]) if block else None
    provenance = block.get("provenance", {"kind": "unstated"})
    return Preset(name, base, revision, architecture, settings, provenance, file, notes)


def _fetch(repository: str, revision: str | None, token: str | bool | None) -> Preset:
    """Fetches and reads the preset in a repository on the Hub."""
    from huggingface_hub import constants, hf_hub_download

    try:
        fetched = hf_hub_download(repository, "config.json", revision=revision, token=token)
    except (OSError, ValueError) as error:
        # If the Hub answered, the first line is the status and the next one the reason.
        reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
        raise StepFlowFileError(
            f"there is no preset {shown(repository)}: no such name, base model or path, and no config.json could be "
            f"fetched from the Hub: {reason[:300]}",
            hint=f"{_LIST_HINT}; a private repository needs a token: `hf auth login`, or token=...",
        ) from error
    # The link belongs to the cache itself, so it may be followed.
    file = Path(fetched)
    data = read_json_object(file.resolve())
    if data.get("model_type") != "stepflow":
        raise _not_stepflow(f"{constants.ENDPOINT}/{repository}", data)
    return _from_config(data, file, repository, repository)


def _not_stepflow(source: str, data: dict[str, Any]) -> StepFlowConfigError:
    return StepFlowConfigError(
        f"{source!r} holds the config of a model of type {str(data.get('model_type'))[:60]!r}, expected a preset",
        hint='for a model without a preset, "auto" selects the rule for its architecture',
    )


def _error(source: Path | str, problem: Problem) -> StepFlowConfigError:
    return StepFlowConfigError(f"{str(source)!r}: {problem}", hint=problem.hint)
