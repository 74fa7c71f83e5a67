"""The cards of the repositories on the Hub: what they hold, how to use it, and what stands behind the settings.

A card says no more than the preset's provenance does: only settings that were measured on the model get evaluation
results in the metadata, the paper's figures appear in the text as the paper's, and a rule says that it is one. Texts
from outside are escaped, so that they stay text: no markup, no HTML, no new lines or table cells.
"""

import json
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_stepflow.presets.preset import Preset
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.settings import SETTINGS, resolve_layers

Kind = Literal["preset", "merged"]

_TEMPLATE, _CODE_TEMPLATE = Path(__file__).with_name("card.md"), Path(__file__).with_name("code_card.md")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
# What Markdown, HTML and the Hub's formulas read as markup inside a line; an underscore inside a word is none.
_MARKUP = re.compile(r"[&<>\\`*\[\]{}|~$#^@]|(?<![^\W_])_|_(?![^\W_])")
_PLAIN_CODE = re.compile(r"[\w .,:;/<>()\[\]{}\"'=+-]+", re.ASCII)
_NOTHING_COMPARED = (
    "Nothing was compared with the base: no candidate of the calibration got that far. These settings switch "
    "everything off, so the model is the base model."
)
_TRADE = "**A TRADE: on this model these settings gain on some kinds of problems and lose on others.**"
_VERDICTS = {
    "gain": "**Measured on this model: a gain.**",
    "gain, harm not excluded": "**Measured on this model: a gain; harm on some kinds of problems is NOT excluded.**",
    "trade": "**Measured on this model: a TRADE, a gain on some kinds of problems and a loss on others.**",
    "no measurable gain": "**Measured on this model: NO measurable gain.**",
    "harm": "**Measured on this model: HARM.**",
}


def preset_card(
    preset: Preset,
    repo_id: str | None = None,
    *,
    kind: Kind = "preset",
    code_repo: str | None = None,
    code_revision: str | None = None,
) -> ModelCard:
    """Makes the card of a repository with a preset.

    Args:
        preset: The preset; its texts come from outside and are escaped.
        repo_id: Id of the repository; None leaves a placeholder that the card explains.
        kind: "preset" for settings that point at the base model, "merged" for a repository with weights.
        code_repo: Id of the repository that holds the code, or None where it is in the repository itself.
        code_revision: The commit of `code_repo` that is recorded, or None.

    Raises:
        StepFlowInputError: The Hub would refuse the id, or the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise StepFlowInputError(
            f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}",
            hint="the repository of custom_generate belongs to no preset: custom_generate_card()",
        )
    name, revision = one_line(preset.name), preset.base_model_revision
    is_pinned = revision is not None and _REVISION.fullmatch(revision) is not None
    base = preset.base_model if preset.base_model and _HUB_ID.fullmatch(preset.base_model) else None
    results = (_eval_results(preset.provenance) or None) if preset.kind == "measured" else None
    data = ModelCardData(
        base_model=base,
        # Of the Hub's relations the only one that leaves the base's weights as they are and puts something on top;
        # without it the Hub takes the repository for a fine-tuned model.
        base_model_relation="adapter" if base else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["stepflow"],
        model_name=name if results else None,
        eval_results=results,
    )
    placeholder = f"YOUR-NAME/{name if _HUB_ID.fullmatch(f'o/{name}') else 'PRESET'}-stepflow"
    return _card(
        data,
        repo_id,
        placeholder,
        kind=kind,
        subject=inline_text(base or name),
        warning=_TRADE if preset.kind == "measured" and preset.provenance["verdict"] == "trade" else "",
        base_link=f"[{base}](https://huggingface.co/{base})" if base else "its base model",
        base_id=base or "ORGANISATION/BASE-MODEL",
        base_revision=f', revision="{revision}"' if is_pinned else "",
        base_at=f" at revision `{revision}`" if is_pinned else "",
        provenance_kind=preset.kind,
        in_use=_in_use(preset),
        provenance=_provenance(preset),
        notes=preset.notes and inline_text(preset.notes),
        settings=_settings(preset),
        code_repo=code_repo,
        code_revision=code_revision,
    )


def custom_generate_card(repo_id: str | None = None) -> ModelCard:
    """Makes the card of the repository for `generate(custom_generate=...)`.

    Args:
        repo_id: As for `preset_card`.

    Raises:
        StepFlowInputError: The Hub would refuse the id.
    """
    subject = "any model, as custom_generate"
    return _card(
        _code_data("custom_generate"), repo_id, "YOUR-NAME/stepflow-generate", kind="custom_generate", subject=subject
    )


def code_card(repo_id: str | None = None) -> ModelCard:
    """Makes the card of the repository whose code presets without code run.

    Args:
        repo_id: As for `preset_card`.

    Raises:
        StepFlowInputError: The Hub would refuse the id.
    """
    data = _code_data("stepflow-code")
    return _card(data, repo_id, "YOUR-NAME/stepflow-code", _CODE_TEMPLATE, version=metadata.version("hf-stepflow"))


def _code_data(tag: str) -> ModelCardData:
    return ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="text-generation", tags=[tag, "stepflow"]
    )


def _card(
    data: ModelCardData, repo_id: str | None, placeholder: str, template: Path = _TEMPLATE, **texts: Any
) -> ModelCard:
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise StepFlowInputError(
                f"repo_id is {repo_id!r}, which the Hub refuses: {error}",
                hint='an id looks like "your-name/qwen3-8b-stepflow"',
            ) from error
    text = template.read_text(encoding="utf-8")
    return ModelCard.from_template(
        data, template_str=text, repo_id=repo_id or placeholder, is_placeholder=repo_id is None, **texts
    )


def _eval_results(provenance: dict[str, Any]) -> list[EvalResult]:
    """Makes an entry for each measured difference, with n and interval, under a name that no model score has."""
    dataset = one_line(provenance["dataset"])
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"{dataset} (n = {provenance['n']})",
            metric_type=f"{metric}_difference",
            metric_name=f"{metric}, with StepFlow minus without in points, {_interval(each)}, n = {provenance['n']}",
            metric_value=each["delta"],
            metric_args={
                "n": provenance["n"],
                "low": each["low"],
                "high": each["high"],
                "confidence": each["confidence"],
                "p_value": provenance["p_value"],
            },
        )
        for each in provenance["deltas"]
        for metric in [one_line(each["metric"])]
    ]


def _interval(delta: dict[str, Any]) -> str:
    return f"{100 * delta['confidence']:g} % interval [{delta['low']:g}, {delta['high']:g}]"


def _provenance(preset: Preset) -> str:
    """Describes the provenance of the settings, so that nobody mistakes one kind for another."""
    stated = preset.provenance
    if preset.kind == "paper":
        headline = "**Published in the paper, NOT measured by this project.**"
        text = f"{headline} {inline_text(stated['statement'])} Source: {inline_text(stated['section'])}."
        rows = [(inline_text(each["benchmark"]), f"{each['base']:.1f}", f"{each['stepflow']:.1f}")
                for each in stated["figures"]]  # fmt: skip
        head = ("benchmark", "without, % (the paper's)", "with StepFlow, % (the paper's)")
        return f"{text}\n\n{table(head, rows)}" if rows else text
    if preset.kind == "rule":
        return (
            "**A rule, NOT calibrated for this model.** These are the paper's constants on a model that the paper did "
            f"not try. The preset says: {inline_text(stated['statement'])}"
        )
    if preset.kind == "measured":
        rows = [(inline_text(each["metric"]), f"{each['delta']:+g}", _interval(each)) for each in stated["deltas"]]
        facts = {"data set": "dataset", "problems": "n", "p-value": "p_value", "date": "date",
                 "hf-stepflow": "library_version", "seed": "seed", "machine": "machine"}  # fmt: skip
        known = {label: stated.get(key) for label, key in facts.items()}
        lines = [f"* {label}: {inline_text(value)}" for label, value in known.items() if value is not None]
        lines.append(f"* command: {inline_code(stated['command'])}")
        head = ("metric", "with StepFlow minus without, points", "how sure")
        found = table(head, rows) if rows else _NOTHING_COMPARED
        return f"{_VERDICTS[stated['verdict']]}\n\n{found}\n\n" + "\n".join(lines)
    return (
        "**Not stated.** Nobody says where these settings come from: take them for untested. No result on this "
        "model is claimed."
    )


def _in_use(preset: Preset) -> str:
    """Names the mechanisms that differ from the paper's two: those that are off, and the length temperature."""
    settings = preset.settings
    is_on = {
        "bridge": settings.tau_max > 0 and settings.oeb_layers not in ("none", []),
        "injection": settings.alpha != 0 and settings.smi_layers not in ("none", []),
    }
    off = [f"the {name}" for name in is_on if not is_on[name]]
    texts = [f"In this preset {' and '.join(off)} {'is' if len(off) == 1 else 'are'} switched off."] if off else []
    if settings.length_temperature > 0:
        texts.append(
            "It sets a length temperature, which is not the paper's: attention grows sharper with the logarithm of "
            f"the context's length, from {settings.length_temperature_base} tokens on."
        )
    return " ".join(texts)


def _settings(preset: Preset) -> str:
    """Makes the table of all settings, after the layers of the bands."""
    settings = preset.to_dict()["settings"]
    rows = [(SETTINGS[name].group, f"`{name}`", json_code(value)) for name, value in settings.items()]
    text = table(("part", "setting", "value"), rows)
    if preset.architecture is None:
        return text
    layers = preset.architecture.layers
    bridged, injected = (resolve_layers(name, settings[name], layers) for name in ("oeb_layers", "smi_layers"))
    return (
        f"Made for {inline_text(preset.architecture)}; hf-stepflow refuses it on another architecture. Layers of the "
        f"bridge: {_listed(bridged)}. Layers of the injection: {_listed(injected)}.\n\n{text}"
    )


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def inline_text(value: Any) -> str:
    """A value as one line of plain text, to stand after other text of its line.

    A bare web address may still become a link to what it shows.
    """
    return _escaped(one_line(value))


def inline_code(value: Any) -> str:
    """A value as one line of code."""
    text = one_line(value)
    # Backticks would not keep a pipe or a backslash inside a table's cell.
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{_escaped(text)}</code>"


def json_code(value: Any) -> str:
    """A JSON value as code; characters that would not be visible stand there as JSON escapes."""
    written = json.dumps(value, ensure_ascii=False)
    return inline_code(written if written.isprintable() else json.dumps(value))


def one_line(value: Any) -> str:
    """A value as text in one line, without control, formatting and other invisible characters."""
    visible = "".join(character if character.isprintable() else " " for character in str(value))
    return " ".join(visible.split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
