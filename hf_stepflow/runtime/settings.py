"""The one table of StepFlow's settings, settings as an object, and settings resolved against a model.

Nothing here needs torch or transformers, so settings and presets are read in no time.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import sys
from typing import Any

from .errors import StepFlowConfigError, shown

Layers = str | list[int]
MAX_COUNT = 10**9
# No list of layers or heads is longer, no layer or head has a greater number.
MAX_LISTED, MAX_NUMBER = 1000, 9999
# Characters of one marker, and of all together.
MAX_MARKER, MAX_MARKERS = 200, 1000
BAND = r"all|none|(bottom|top):(0?\.[0-9]{1,6}|1(\.0{1,6})?)"
NUMBER = r"0|[1-9][0-9]{0,3}"

# What models without markers write before their final answer, the likeliest first.
ANSWER_PHRASES = (
    "The answer is", "the answer is", "Final answer", "Final Answer", "final answer is", "\\boxed{", "<answer>",
)  # fmt: skip

BASE, BRIDGE, INJECTION, TEMPERATURE, SEGMENTS = (
    "base model", "Odds-Equal Bridge", "Step Momentum Injection", "length temperature", "segments and steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the settings table.

    Attributes:
        kind: "number", "count", "choice", "switch", "layers", "heads", "markers" or "text".
        group: The part of StepFlow that the setting belongs to.
        meaning: What it does, in a sentence.
        low: The least value of a number or count.
        high: The greatest value of a number or count.
        choices: The values of a choice.
        optional: Whether null is a value.
        labels: Whether the labels of tokens depend on it.
        is_new: Whether it is newer than presets of schema version 1, which then leave it at its default.
        search: The range, or the values, that calibration searches; empty for settings that it leaves alone.
    """

    kind: str
    group: str
    meaning: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    optional: bool = False
    labels: bool = False
    is_new: bool = False
    search: tuple[Any, ...] = ()

    @property
    def expected(self) -> str:
        """The values that the setting takes, for messages and tables."""
        text = {
            "number": f"a number in [{self.low:g}, {self.high:g}]",
            "count": f"a whole number in [{self.low:g}, {self.high:.10g}]",
            "choice": " or ".join(map(json.dumps, self.choices)),
            "switch": "true or false",
            "layers": 'a list of layer numbers, each once, "bottom:F" or "top:F" with 0 < F <= 1, "all" or "none"',
            "heads": "an object {layer: [query heads]} with each head once",
            "markers": f"a text of 1 to {MAX_MARKER} characters, or a list of such texts",
            "text": "a text of 1 to 500 characters",
        }[self.kind]
        return f"{text}, or null" if self.optional else text

    def problem(self, value: Any) -> tuple[str, Any, str] | None:
        """Finds the fault of a value by itself.

        Returns:
            The place inside the value ("" for all of it), the value there and the expectation; None if it is right.
        """
        if value is None and self.optional:
            return None
        if self.kind == "number":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # Compared before anything else: an integer may be beyond a float.
            is_right = is_number and abs(value) <= sys.float_info.max and self.low <= value <= self.high
        elif self.kind == "count":
            is_right = type(value) is int and self.low <= value <= self.high
        elif self.kind == "choice":
            is_right = isinstance(value, str) and value in self.choices
        elif self.kind == "switch":
            is_right = isinstance(value, bool)
        elif self.kind == "text":
            is_right = isinstance(value, str) and 0 < len(value) <= 500
        elif self.kind == "layers":
            if not isinstance(value, str):
                return _numbers_problem(value, self.expected, "layer")
            is_right = re.fullmatch(BAND, value) is not None and (_fraction(value) or ("", 1.0))[1] > 0
        elif self.kind == "heads":
            return _heads_problem(value, self.expected)
        else:
            return _markers_problem(value, self.expected)
        return None if is_right else ("", value, self.expected)


def _numbers_problem(value: Any, expected: str, item: str) -> tuple[str, Any, str] | None:
    if not isinstance(value, list | tuple) or len(value) > MAX_LISTED:
        return "", value, expected
    for place, number in enumerate(value):
        if type(number) is not int or not 0 <= number <= MAX_NUMBER:
            return f"[{place}]", number, f"a whole number in [0, {MAX_NUMBER}]"
    return ("", value, f"each {item} once") if len(set(value)) < len(value) else None


def _heads_problem(value: Any, expected: str) -> tuple[str, Any, str] | None:
    if not isinstance(value, dict) or len(value) > MAX_LISTED:
        return "", value, expected
    for layer, chosen in value.items():
        if isinstance(layer, bool) or re.fullmatch(NUMBER, str(layer)) is None:
            return f".{str(layer)[:60]}", layer, "a layer number such as 12 as the key"
        problem = _numbers_problem(chosen, "a list of query heads, each once", "head")
        if problem is not None:
            return f".{layer}{problem[0]}", *problem[1:]
    return None


def _markers_problem(value: Any, expected: str) -> tuple[str, Any, str] | None:
    markers = [value] if isinstance(value, str) else value
    if not isinstance(markers, list | tuple) or len(markers) > MAX_LISTED:
        return "", value, expected
    for place, marker in enumerate(markers):
        if not isinstance(marker, str) or not marker or len(marker) > MAX_MARKER:
            return "" if isinstance(value, str) else f"[{place}]", marker, f"a text of 1 to {MAX_MARKER} characters"
    return None


def _setting(default: Any, kind: str, group: str, meaning: str, **rest: Any) -> Any:
    return dataclasses.field(default=default, metadata={"setting": Setting(kind, group, meaning, **rest)})


@dataclasses.dataclass(frozen=True)
class StepFlowSettings:
    """The settings of StepFlow as plain data: the table that checks, schema, cards and search are derived from.

    Bands ("bottom:0.25", "top:0.25") count the layers that have softmax attention (docs/method.md, "Layers").

    Raises:
        StepFlowConfigError: A value is wrong by itself or beside another; the message names it and what is expected.

    Example:
        >>> from hf_stepflow.runtime.settings import StepFlowSettings
        >>> StepFlowSettings(tau_max=0.1).replace(alpha=0.0).alpha
        0.0
    """

    base_model_name_or_path: str | None = _setting(
        None, "text", BASE, "The model that the settings are for; its tokenizer finds the steps.", optional=True
    )
    base_model_revision: str | None = _setting(None, "text", BASE, "The model's revision.", optional=True)
    oeb_layers: Layers = _setting("bottom:0.25", "layers", BRIDGE, "The layers of the bridge.")
    oeb_heads: dict[int, list[int]] | None = _setting(
        None, "heads", BRIDGE, "The query heads to restrict the bridge to; null for all (the paper).", optional=True
    )
    tau_max: float = _setting(
        0.15, "number", BRIDGE, "The largest floor under the bridge's attention mass; 0 turns the bridge off.",
        low=0, high=1, search=(0.02, 0.5),
    )  # fmt: skip
    bridge_scope: str = _setting(
        "segment", "choice", BRIDGE,
        "The current segment while thinking: all of the thinking (the paper), or the current step.",
        choices=("segment", "step"), search=("segment", "step"),
    )  # fmt: skip
    bridge_floor: str = _setting(
        "share", "choice", BRIDGE,
        "The floor is a share of the mass of segment and bridge, or of all mass (the paper).",
        choices=("share", "absolute"),
    )  # fmt: skip
    sink_tokens: int = _setting(
        0, "count", BRIDGE, "The number of first tokens of a row to take out of the bridge.",
        high=MAX_COUNT, search=(0, 1, 4),
    )  # fmt: skip
    oeb_span: int | None = _setting(
        None, "count", BRIDGE, "The number of first tokens of each step to bridge; null for all (the paper).",
        low=1, high=MAX_COUNT, optional=True, labels=True,
    )  # fmt: skip
    smi_layers: Layers = _setting("top:0.25", "layers", INJECTION, "The layers of the injection.")
    alpha: float = _setting(
        0.06, "number", INJECTION, "The weight of the previous step's mean value; 0 turns the injection off.",
        low=-100, high=100, search=(0.01, 0.5),
    )  # fmt: skip
    smi_window: int | None = _setting(
        None, "count", INJECTION, "The number of last tokens of the previous step to use; null for all (the paper).",
        low=1, high=MAX_COUNT, optional=True, search=(None, 4),
    )  # fmt: skip
    length_temperature: float = _setting(
        0.0, "number", TEMPERATURE, "The exponent gamma of the log-length temperature; 0 turns it off.",
        low=0, high=10, search=(0.1, 3.0),
    )  # fmt: skip
    length_temperature_base: float | None = _setting(
        None, "number", TEMPERATURE, "The context length n0 up to which the temperature does nothing; no default.",
        low=2, high=MAX_COUNT, optional=True,
    )  # fmt: skip
    length_temperature_layers: Layers = _setting("all", "layers", TEMPERATURE, "The layers of the temperature.")
    length_temperature_heads: dict[int, list[int]] | None = _setting(
        None, "heads", TEMPERATURE, "The query heads of the temperature; null for all.", optional=True
    )
    tool_start: str | list[str] | None = _setting(
        None, "markers", SEGMENTS, "The marker(s) that open a tool result inside thinking, which counts as question.",
        optional=True, labels=True,
    )  # fmt: skip
    tool_end: str | list[str] | None = _setting(
        None, "markers", SEGMENTS, "The marker(s) that close a tool result.", optional=True, labels=True
    )
    thinking_start: str | list[str] | None = _setting(
        "<think>", "markers", SEGMENTS, "The marker(s) after which thinking starts.", optional=True, labels=True
    )
    summary_start: str | list[str] | None = _setting(
        "</think>",
        "markers",
        SEGMENTS,
        "The marker(s) after which the summary starts; if implicit_thinking is set and this is not, phrases such as "
        "`The answer is`.",
        optional=True,
        labels=True,
    )
    implicit_thinking: bool = _setting(
        False, "switch", SEGMENTS, "Thinking starts at the end of the prompt, for models without markers.", labels=True
    )
    step_rule: str = _setting(
        "sentence", "choice", SEGMENTS, "Where thinking is split into steps.",
        choices=("sentence", "paragraph", "cue"), labels=True,
    )  # fmt: skip
    min_step_chars: int = _setting(
        15, "count", SEGMENTS, "The end of a sentence with fewer characters is no step boundary.",
        high=MAX_COUNT, labels=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            problem = setting.problem(getattr(self, name))
            if problem is not None:
                place, part, expected = problem
                raise StepFlowConfigError(f"{name}{place} must be {expected}, got {shown(part)}")
            if setting.kind == "heads" and getattr(self, name) is not None:
                table = {int(layer): list(heads) for layer, heads in getattr(self, name).items()}
                object.__setattr__(self, name, table)
        length = sum(len(marker) for name in _MARKERS for marker in self.markers(name))
        if length > MAX_MARKERS:
            raise StepFlowConfigError(f"the markers must have {MAX_MARKERS} characters at most together, got {length}")
        if self.length_temperature > 0 and self.length_temperature_base is None:
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

        Turning implicit thinking on or off takes `summary_start` along if it is at its default and not given.

        Raises:
            StepFlowConfigError: An unknown name or a bad value.
        """
        for name in changes:
            if name not in SETTING_NAMES:
                raise unknown_setting(name)
        return dataclasses.replace(self, **with_summary_start(changes, self.summary_start))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready data: head tables get text keys.

        A newer setting at its default is left out, so that earlier releases read the data.
        """
        data = dataclasses.asdict(self)
        for name, setting in SETTINGS.items():
            if setting.is_new and data[name] == DEFAULTS[name]:
                del data[name]
            elif setting.kind == "heads" and data[name] is not None:
                data[name] = {str(layer): heads for layer, heads in data[name].items()}
        return data

    def markers(self, name: str) -> list[str]:
        """The markers of one kind as a list."""
        value = getattr(self, name)
        return [value] if isinstance(value, str) else list(value or [])


SETTINGS: dict[str, Setting] = {
    field.name: field.metadata["setting"] for field in dataclasses.fields(StepFlowSettings)
}
SETTING_NAMES = tuple(SETTINGS)
_MARKERS = tuple(name for name, setting in SETTINGS.items() if setting.kind == "markers")
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(StepFlowSettings)}


def with_summary_start(given: dict[str, Any], current: Any) -> dict[str, Any]:
    """Adds the default start of the summary to settings that switch implicit thinking and do not give it.

    Args:
        given: Settings by name.
        current: The value of `summary_start` before them.
    """
    implicit = given.get("implicit_thinking")
    if "summary_start" in given or not isinstance(implicit, bool):
        return given
    defaults = {False: DEFAULTS["summary_start"], True: list(ANSWER_PHRASES)}
    return given | {"summary_start": defaults[implicit]} if current == defaults[not implicit] else given


def unknown_setting(name: str) -> StepFlowConfigError:
    """The error for a name that no setting has."""
    close = difflib.get_close_matches(name, SETTING_NAMES, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known settings: {', '.join(SETTING_NAMES)}"
    return StepFlowConfigError(f"unknown StepFlow setting {name!r}", hint=hint)


def resolve_layers(name: str, spec: Layers, layers: list[int]) -> list[int]:
    """Returns the layers that a setting names, on a model with softmax attention in `layers`.

    Args:
        name: The setting, for messages.
        spec: A list of layer indices, "bottom:F", "top:F", "all" or "none". A band holds floor(F * n) of the n
            attention layers, at least one (docs/method.md, "Layers").
        layers: The indices of the model's softmax attention layers, ascending.

    Raises:
        StepFlowConfigError: A listed layer is not one of them.
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


@dataclasses.dataclass(frozen=True)
class FlowPlan:
    """Settings resolved against one model: what happens in which layer.

    Attributes:
        settings: The settings.
        layers: The softmax attention layers of the model.
        tau: {layer: tau_max, or one value a query head} of the bridged layers.
        inject: The layers of the injection.
        gamma: {layer: length temperature, or one value a query head}.
    """

    settings: StepFlowSettings
    layers: tuple[int, ...]
    tau: dict[int, float | tuple[float, ...]]
    inject: frozenset[int]
    gamma: dict[int, float | tuple[float, ...]]

    @functools.cached_property
    def changed(self) -> frozenset[int]:
        """All layers in which anything is done."""
        return self.inject | self.tau.keys() | self.gamma.keys()

    @classmethod
    def resolve(cls, settings: StepFlowSettings, heads: dict[int, int]) -> "FlowPlan":
        """Resolves settings against the attention layers of a model.

        Args:
            settings: The settings.
            heads: {layer: number of query heads} of the softmax attention layers.

        Raises:
            StepFlowConfigError: The settings name layers or heads that the model does not have.
        """
        layers = sorted(heads)

        def chosen(name: str, value: float) -> list[int]:
            return resolve_layers(name, getattr(settings, name), layers) if value != 0 else []

        return cls(
            settings,
            tuple(layers),
            _by_head("oeb_heads", settings, float(settings.tau_max), chosen("oeb_layers", settings.tau_max), heads),
            frozenset(chosen("smi_layers", settings.alpha)),
            _by_head(
                "length_temperature_heads",
                settings,
                float(settings.length_temperature),
                chosen("length_temperature_layers", settings.length_temperature),
                heads,
            ),
        )

    @functools.cached_property
    def is_idle(self) -> bool:
        """Whether nothing is ever to be done."""
        return not self.changed


def _by_head(
    name: str, settings: StepFlowSettings, value: float, layers: list[int], heads: dict[int, int]
) -> dict[int, float | tuple[float, ...]]:
    table: dict[int, list[int]] | None = getattr(settings, name)
    if table is None:
        return dict.fromkeys(layers, value)
    for layer, chosen in table.items():
        if layer not in heads or max(chosen, default=0) >= heads[layer]:
            raise StepFlowConfigError(
                f"{name} names heads {chosen} of layer {layer}, which this model does not have",
                hint=f"query heads by attention layer: {heads}",
            )
        if layers and chosen and layer not in layers:
            raise StepFlowConfigError(
                f"{name} names heads of layer {layer}, but only layers {layers} are asked for",
                hint=f"name the layers of the table in {name.replace('heads', 'layers')}",
            )
    return {
        layer: tuple(value if head in table[layer] else 0.0 for head in range(heads[layer]))
        for layer in layers
        if table.get(layer)
    }
