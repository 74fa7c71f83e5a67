"""The HTML page of Step-Saliency: interactive, self-contained, in light and dark."""

import base64
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.report import scripted_page, write_page
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.trace import TraceStep

from .maps import INDICES, StepMaps, step_of_token

# In the order in which data flows: numbers, map, charts, the selected step, the page.
_SCRIPTS = ("data", "map", "charts", "panel", "page")

# The most map entries that are packed in two bytes each; more take one byte each.
_WIDE_UP_TO = 500_000

# {bytes of an entry: largest relative error of an entry on the page}
PRECISION = {2: 0.001, 1: 0.03}

# The most characters of a step's text on the page.
_TEXT_LENGTH = 4000

# The settings that the facts name even where they are the defaults.
_NAMED = ("oeb_layers", "tau_max", "smi_layers", "alpha")


def write_report(saliency: StepMaps, path: str | Path) -> None:
    """Writes the page.

    Map entries are within 0.1 % of their value, or within 3 % where the maps have more than 500,000 entries (300 steps
    and 64 layers then take 4.2 MB); there, entries some millions of times smaller than the largest of their row appear
    as "below" a bound and count as zero in shares. Indices are those of the exact maps. Texts are cut after 4,000
    characters, and heads are averaged.

    Args:
        saliency: The maps.
        path: The file to write.

    Raises:
        StepFlowInputError: If the maps have no steps, or entries that are negative or not finite.
        StepFlowFileError: If the file cannot be written.
    """
    write_page(path, render_report(saliency))


def render_report(saliency: StepMaps) -> str:
    """Renders the page that `write_report` writes.

    Raises:
        StepFlowInputError: If the maps have no steps, or entries that are negative or not finite.
    """
    return scripted_page(Path(__file__).parent / "assets", _SCRIPTS, _content(saliency))


def _content(saliency: StepMaps) -> dict[str, Any]:
    """All data of the page."""
    steps, maps = saliency.steps, saliency.mean_maps
    if not steps:
        raise StepFlowInputError("the trace has no steps to show", hint="give a trace with at least one token")
    rows, columns = torch.tril_indices(len(steps), len(steps))
    entries = maps.double()[:, rows, columns]
    if not (torch.isfinite(entries) & (entries >= 0)).all():
        raise StepFlowInputError("the maps hold entries that are negative or no numbers")
    place = step_of_token(saliency.trace)
    tokens = torch.bincount(place[place >= 0], minlength=len(steps)).tolist()
    packed = pack_maps(maps)
    return {
        "facts": _facts(saliency),
        "settings": [[name, _words(value)] for name, value in (saliency.about.get("stepflow") or {}).items()],
        "layers": saliency.layers,
        "heads": saliency.sums.shape[1] if saliency.sums.ndim == 4 else 1,
        "pooling": saliency.pooling,
        "steps": [_step(step, size) for step, size in zip(steps, tokens, strict=True)],
        "indices": {
            name: {"about": INDICES[name], "values": [_number(value) for value in values.tolist()]}
            for name, values in saliency.indices.items()
        },
        "precision": PRECISION[packed["bytes"]],
        "scale": _scale(entries),
        "maps": packed,
    }


def pack_maps(maps: torch.Tensor) -> dict[str, Any]:
    """Packs the lower triangles of [L, S, S] on logarithmic grids, one a row.

    Returns:
        `bytes` of an entry; `step`, the natural log of the ratio of neighbouring grid values; `codes`, base64 of the
        triangles, layer by layer and row by row; `peaks`, base64 of the natural log of each row's largest entry,
        float32 [L, S]. Code 0 is zero, 1 is above zero but below the grid, and c >= 2 is exp(peak - (top - c) * step)
        with top = 256 ** bytes - 1. Numbers are little-endian.
    """
    rows, columns = torch.tril_indices(maps.shape[1], maps.shape[1])
    logs = maps.double().log()
    peaks = logs.amax(2).float()
    entries = logs[:, rows, columns]
    size = 2 if entries.numel() <= _WIDE_UP_TO else 1
    # A little finer than twice the error, which leaves room for rounding.
    step, top = 1.999 * math.log1p(PRECISION[size]), 256**size - 1
    codes = top - ((peaks.double()[:, rows] - entries) / step).nan_to_num(posinf=float(top)).round().clamp(0, top - 1)
    codes[entries.isneginf()] = 0
    return {
        "bytes": size,
        "step": step,
        "codes": _base64(codes, f"<u{size}"),
        "peaks": _base64(peaks.nan_to_num(neginf=0.0), "<f4"),
    }


def _base64(values: torch.Tensor, kind: str) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def _scale(entries: torch.Tensor) -> dict[str, float]:
    """The ends of the colour scales of all layers; few entries lie below the log or above the linear one."""
    some = entries[entries > 0].sort().values
    if len(some) == 0:
        return {"low": 0.0, "high": 0.0, "linear": 0.0}
    low, linear = (float(some[int(share * (len(some) - 1))]) for share in (0.02, 0.995))
    return {"low": low, "high": float(some[-1]), "linear": linear}


def _step(step: TraceStep, tokens: int) -> dict[str, Any]:
    text = step.text
    if text is not None and len(text) > _TEXT_LENGTH:
        text = f"{text[:_TEXT_LENGTH]}… ({len(text) - _TEXT_LENGTH} more characters)"
    return asdict(step) | {"tokens": tokens, "text": text}


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _facts(saliency: StepMaps) -> list[str]:
    """The origin of the maps, a few words each."""
    about = saliency.about
    revision = about.get("revision")
    facts = [
        about.get("model") or "model without a name",
        f"revision {str(revision)[:12]}" if revision else None,
        about.get("dtype"),
        _loss(about),
        _stepflow(about.get("stepflow")),
        f"{len(saliency.trace)} tokens",
        f"{len(saliency.steps)} step{'s' * (len(saliency.steps) > 1)}",
        f"{len(saliency.layers)} layer{'s' * (len(saliency.layers) > 1)}",
        f"{saliency.pooling} pooling",
        *(f"{name} {about[name]}" for name in ("hf_stepflow", "torch", "transformers") if about.get(name)),
    ]
    return [str(fact) for fact in facts if fact]


def _loss(about: dict[str, Any]) -> str | None:
    loss, value = about.get("loss"), about.get("loss_value")
    if loss is None:
        return None
    is_logit = not isinstance(loss, str)
    name = f"logit of token {loss[1]} at position {loss[0]}" if is_logit else f"cross-entropy of the {loss}"
    return f"loss: {name}" if value is None else f"loss: {name}, {value:.4g}"


def _stepflow(settings: dict[str, Any] | None) -> str:
    """Whether StepFlow was on, with its main settings and those that differ from the defaults."""
    if settings is None:
        return "StepFlow off"
    defaults = StepFlowSettings().to_dict()
    own = ("base_model_name_or_path", "base_model_revision")
    named = [name for name in settings if name in _NAMED or (name not in own and settings[name] != defaults.get(name))]
    return "StepFlow on: " + ", ".join(f"{name} {_words(settings[name])}" for name in named)
