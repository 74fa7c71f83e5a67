"""StepFlowConfig: every setting of StepFlow, checked when it is made."""

import dataclasses
import difflib
import json
import math
import operator
import os
import sys
from pathlib import Path
from typing import Any, cast

from transformers import PretrainedConfig
from transformers.utils import logging

from .errors import StepFlowConfigError, StepFlowFileError, shown

logger = logging.get_logger(__name__)

Layers = str | list[int]
STEP_RULES = ("sentence", "paragraph", "cue")

# More than any settings need, and little enough that no file or marker holds up the program.
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_COUNT = 10**9
MAX_MARKER, MAX_MARKERS = 200, 1000


@dataclasses.dataclass(frozen=True)
class StepFlowSettings:
    """The settings of StepFlow as plain data (the fields of `StepFlowConfig` that are not Transformers' own).

    Attributes:
        base_model_name_or_path: the model that StepFlow is put on, and where its tokenizer is found.
        base_model_revision: its revision.
        oeb_layers: layers of the Odds-Equal Bridge: a list of layer indices, "bottom:0.25", "top:0.25", "all" or
            "none"; fractions count the layers that have softmax attention (METHOD section 2, "Layer bands").
        oeb_heads: {layer: [query heads]} to restrict the bridge to, None for all heads (the paper).
        tau_max: largest floor under the bridge's attention mass, in [0, 1]; 0 turns the bridge off.
        bridge_scope: "segment" (the paper) or "step": what counts as the current segment while thinking.
        bridge_floor: "share" (a share of the mass of segment and bridge) or "absolute" (the paper).
        sink_tokens: the first n tokens of a row are taken out of the bridge.
        oeb_span: only the first n tokens of each step are bridged, None for all (the paper).
        smi_layers: layers of Step Momentum Injection, as `oeb_layers`.
        alpha: weight of the previous step's mean value; 0 turns the injection off.
        smi_window: only the last n tokens of the previous step count, None for all (the paper).
        length_temperature: gamma of the log-length temperature, 0 for off, 10 at most (METHOD section 4b).
        length_temperature_base: n0, the context length up to which it does nothing; no default.
        length_temperature_layers: layers of the temperature, as `oeb_layers`.
        length_temperature_heads: {layer: [query heads]}, None for all heads.
        tool_start: marker(s) that open a tool result inside thinking; its tokens count as question.
        tool_end: marker(s) that close it.
        thinking_start: marker(s) after which thinking starts.
        summary_start: marker(s) after which the summary starts.
        implicit_thinking: for models without markers: thinking starts at the end of the prompt.
        step_rule: "sentence", "paragraph" or "cue": where thinking is split into steps.
        min_step_chars: the end of a sentence shorter than this is no step boundary.
    """

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    oeb_layers: Layers = "bottom:0.25"
    oeb_heads: dict[int, list[int]] | None = None
    tau_max: float = 0.15
    bridge_scope: str = "segment"
    bridge_floor: str = "share"
    sink_tokens: int = 0
    oeb_span: int | None = None
    smi_layers: Layers = "top:0.25"
    alpha: float = 0.06
    smi_window: int | None = None
    length_temperature: float = 0.0
    length_temperature_base: float | None = None
    length_temperature_layers: Layers = "all"
    length_temperature_heads: dict[int, list[int]] | None = None
    tool_start: str | list[str] | None = None
    tool_end: str | list[str] | None = None
    thinking_start: str | list[str] | None = "<think>"
    summary_start: str | list[str] | None = "</think>"
    implicit_thinking: bool = False
    step_rule: str = "sentence"
    min_step_chars: int = 15

    def __post_init__(self) -> None:
        for name in ("base_model_name_or_path", "base_model_revision"):
            if not isinstance(getattr(self, name), str | None):
                raise StepFlowConfigError(f"{name} must be a text or null, got {shown(getattr(self, name))}")
        _check_number("tau_max", self.tau_max, 0.0, 1.0)
        _check_number("alpha", self.alpha)
        _check_number("length_temperature", self.length_temperature, 0.0, 10.0)
        _check_choice("bridge_scope", self.bridge_scope, ("segment", "step"))
        _check_choice("bridge_floor", self.bridge_floor, ("share", "absolute"))
        _check_choice("step_rule", self.step_rule, STEP_RULES)
        _check_count("sink_tokens", self.sink_tokens, 0)
        _check_count("min_step_chars", self.min_step_chars, 0)
        for name in ("oeb_span", "smi_window"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        if not isinstance(self.implicit_thinking, bool):
            raise StepFlowConfigError(f"implicit_thinking must be true or false, got {shown(self.implicit_thinking)}")
        for name in ("oeb_layers", "smi_layers", "length_temperature_layers"):
            _check_layers(name, getattr(self, name))
        for name in ("oeb_heads", "length_temperature_heads"):
            object.__setattr__(self, name, _checked_heads(name, getattr(self, name)))
        for name in _MARKERS:
            _check_markers(name, getattr(self, name))
        length = sum(len(marker) for name in _MARKERS for marker in self.markers(name))
        if length > MAX_MARKERS:
            raise StepFlowConfigError(f"the markers must have {MAX_MARKERS} characters at most together, got {length}")
        if self.length_temperature_base is not None:
            _check_number("length_temperature_base", self.length_temperature_base, 2.0)
        elif self.length_temperature > 0:
            raise StepFlowConfigError(
                f"length_temperature is {self.length_temperature} but length_temperature_base is not set",
                hint="give the context length up to which the model needs no sharpening, e.g. its trained length",
            )
        if not self.implicit_thinking and not self.thinking_start:
            raise StepFlowConfigError(
                "thinking_start is empty and implicit_thinking is off, so thinking could never start",
                hint='set thinking_start (e.g. "<think>"), or implicit_thinking=True for a model without markers',
            )
        if bool(self.tool_start) != bool(self.tool_end):
            raise StepFlowConfigError(
                f"tool_start ({self.tool_start!r}) and tool_end ({self.tool_end!r}) must be given together"
            )
        shallow, deep = _fraction(self.oeb_layers), _fraction(self.smi_layers)
        if shallow and deep and shallow[0] != deep[0] and shallow[1] + deep[1] > 1:
            raise StepFlowConfigError(
                f"oeb_layers ({self.oeb_layers!r}) and smi_layers ({self.smi_layers!r}) overlap: "
                "the shallow and the deep band may cover the layers once at most",
                hint="choose smaller fractions, or give explicit lists of layers",
            )

    def replace(self, **changes: Any) -> "StepFlowSettings":
        """These settings with some changed.

        Raises:
            StepFlowConfigError: an unknown name or a bad value.
        """
        for name in changes:
            if name not in SETTING_NAMES:
                raise _unknown(name)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready data (head tables get text keys)."""
        data = dataclasses.asdict(self)
        for name in ("oeb_heads", "length_temperature_heads"):
            if data[name] is not None:
                data[name] = {str(layer): heads for layer, heads in data[name].items()}
        return data

    def markers(self, name: str) -> list[str]:
        """The markers of one kind as a list."""
        value = getattr(self, name)
        return [value] if isinstance(value, str) else list(value or [])


_MARKERS = ("tool_start", "tool_end", "thinking_start", "summary_start")
SETTING_NAMES = tuple(field.name for field in dataclasses.fields(StepFlowSettings))
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(StepFlowSettings)}


def _unknown(name: str) -> StepFlowConfigError:
    close = difflib.get_close_matches(name, SETTING_NAMES, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known settings: {', '.join(SETTING_NAMES)}"
    return StepFlowConfigError(f"unknown StepFlow setting {name!r}", hint=hint)


class StepFlowConfig(PretrainedConfig):
    """The configuration of a StepFlow model: the settings of `StepFlowSettings` as flat fields of a config.json.

    Other names are Transformers' own.

    Raises:
        StepFlowConfigError: a value that no model could use, or the misspelt name of a setting; the message names it
            and what is expected.
    """

    model_type = "stepflow"

    def __init__(self, **kwargs: Any):
        given = {name: kwargs.pop(name) for name in SETTING_NAMES if name in kwargs}
        for name in kwargs:
            if name not in _TRANSFORMERS_FIELDS and difflib.get_close_matches(name, SETTING_NAMES, 1, 0.85):
                raise _unknown(name)
        settings = StepFlowSettings(**given)
        for name in SETTING_NAMES:
            setattr(self, name, getattr(settings, name))
        super().__init__(**kwargs)

    @property
    def settings(self) -> StepFlowSettings:
        """The settings alone, checked again (fields may have been changed since)."""
        return StepFlowSettings(**{name: getattr(self, name) for name in SETTING_NAMES})


def read_settings(
    source: "StepFlowConfig | StepFlowSettings | dict[str, Any] | str | Path | None",
) -> StepFlowSettings:
    """Settings from whatever a user has at hand.

    Args:
        source: a config, settings, a dict, the path of a JSON file or of a folder with a config.json; None gives the
            defaults (the paper's constants).

    Raises:
        StepFlowConfigError: unknown names in a dict, or bad values.
        StepFlowFileError: a path that cannot be read, or broken JSON.
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
        return StepFlowSettings(**{name: getattr(source, name, _DEFAULTS[name]) for name in SETTING_NAMES})
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
    """The JSON object in a file or in the config.json of a folder, and the file that it was in.

    Raises:
        StepFlowFileError: nothing there, or something else.
    """
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):  # unlike Path's own, these take a name that no file can have
        raise StepFlowFileError(
            f"no StepFlow settings at {shown(str(path))}",
            hint="give the path of a JSON file or of a folder with a config.json, a dict, or a StepFlowConfig",
        )
    return file, read_object(file, repr(str(file)))


def read_object(file: Path, name: str, longest: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in a file that nobody vouches for.

    Args:
        file: the file.
        name: what messages call it.
        longest: bytes that it may have.

    Raises:
        StepFlowFileError: a file that cannot be read, is too long, or holds something else.
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
    """Settings from stored data, which may have been written by a newer release: unknown names are told, not refused.

    Args:
        data: the stored names and values; those of Transformers' own config fields are passed over.
        source: where they come from, for messages.
    """
    unknown = sorted(set(data) - set(SETTING_NAMES) - _TRANSFORMERS_FIELDS)
    if unknown:
        logger.warning(
            "%s: unknown StepFlow settings %s are ignored; they may come from a newer hf-stepflow: "
            "upgrade with `pip install -U hf-stepflow`",
            source,
            unknown,
        )
    return StepFlowSettings(**{name: data[name] for name in SETTING_NAMES if name in data})


# Fields of the base's config that a preset carries over.
BASE_FIELDS = (
    "bos_token_id", "eos_token_id", "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id", "vocab_size",
)  # fmt: skip
_TRANSFORMERS_FIELDS = set(PretrainedConfig().to_dict()) | {
    *BASE_FIELDS, "architectures", "auto_map", "dtype", "model_type", "stepflow_preset", "torch_dtype",
    "transformers_version",
}  # fmt: skip


def resolve_layers(name: str, spec: Layers, layers: list[int]) -> list[int]:
    """The layers that a setting names, on a model with softmax attention in `layers`.

    Args:
        name: the setting, for messages.
        spec: a list of layer indices, "bottom:F", "top:F", "all" or "none". A band holds floor(F * n) of the n
            attention layers, at least one (METHOD section 2).
        layers: the indices of the model's softmax attention layers, ascending.

    Raises:
        StepFlowConfigError: a listed layer that is not one of them.
    """
    if isinstance(spec, str):
        band = _fraction(spec)
        if band is None:
            return list(layers) if spec == "all" else []
        count = max(1, math.floor(band[1] * len(layers) + 1e-9))
        return layers[:count] if band[0] == "bottom" else layers[-count:]
    wrong = [layer for layer in spec if layer not in layers]
    if wrong:
        raise StepFlowConfigError(
            f"{name} names layers {shown(wrong)}, which this model does not have as softmax attention layers",
            hint=f"its attention layers are {_ranges(layers)}",
        )
    return sorted(spec)


def _ranges(layers: list[int]) -> str:
    contiguous = layers == list(range(layers[0], layers[-1] + 1)) if layers else False
    return f"{layers[0]} to {layers[-1]}" if contiguous else str(layers)


def _fraction(spec: Layers) -> tuple[str, float] | None:
    """("bottom" or "top", fraction) of a band, None for everything else."""
    if not isinstance(spec, str) or ":" not in spec:
        return None
    side, _, fraction = spec.partition(":")
    try:
        return (side, float(fraction)) if side in ("bottom", "top") else None
    except ValueError:
        return None


def _check_layers(name: str, spec: Any) -> None:
    expected = 'a list of layer indices, "bottom:F" or "top:F" with 0 < F <= 1, "all" or "none"'
    if isinstance(spec, str):
        band = _fraction(spec)
        if spec in ("all", "none") or (band and 0 < band[1] <= 1):
            return
    elif isinstance(spec, list | tuple) and all(type(layer) is int and layer >= 0 for layer in spec):
        if len(set(spec)) == len(spec):
            return
        expected = "each layer once"
    raise StepFlowConfigError(f"{name} must be {expected}, got {shown(spec)}")


def _checked_heads(name: str, heads: Any) -> dict[int, list[int]] | None:
    """Head tables with integer keys: JSON turns them into text."""
    if heads is None:
        return None
    try:
        table = {_index(layer, is_key=True): list(map(_index, chosen)) for layer, chosen in heads.items()}
    except (AttributeError, TypeError, ValueError):
        table = {-1: []}
    if any(
        layer < 0 or min(chosen, default=0) < 0 or len(set(chosen)) < len(chosen) for layer, chosen in table.items()
    ):
        raise StepFlowConfigError(
            f"{name} must be null or {{layer: [query heads]}} with each head once, got {shown(heads)}"
        )
    return table


def _index(value: Any, is_key: bool = False) -> int:
    if isinstance(value, bool):
        raise TypeError("true and false are no indices")
    return int(value) if is_key and isinstance(value, str) else operator.index(value)


def _check_markers(name: str, value: Any) -> None:
    markers = [value] if isinstance(value, str) else value
    if markers is None:
        return
    if not isinstance(markers, list | tuple) or not all(isinstance(marker, str) and marker for marker in markers):
        raise StepFlowConfigError(f"{name} must be a non-empty string, a list of such, or null, got {shown(value)}")
    longest = max(map(len, markers), default=0)
    if longest > MAX_MARKER:
        raise StepFlowConfigError(f"{name} must have {MAX_MARKER} characters at most, got {longest}")


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before anything else: an integer may be beyond a float.
    if not is_number or not abs(value) <= sys.float_info.max or not low <= value <= high:
        bounds = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else "a finite number"
        bounds += f" >= {low:g}" if math.isfinite(low) and not math.isfinite(high) else ""
        raise StepFlowConfigError(f"{name} must be {bounds}, got {shown(value)}")


def _check_count(name: str, value: Any, low: int) -> None:
    if type(value) is not int or not low <= value <= MAX_COUNT:
        bounds = f">= {low}" if type(value) is not int or value < low else f"<= {MAX_COUNT}"
        raise StepFlowConfigError(f"{name} must be a whole number {bounds}, got {shown(value)}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise StepFlowConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
