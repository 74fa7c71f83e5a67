"""`hf-stepflow doctor`: reports what is installed here, and whether StepFlow runs on a model.

The report on a model needs only its config and tokenizer: the model is built on the meta device, without weights.
"""

import argparse
import json
import platform
from importlib import metadata
from typing import Any

from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowError, StepFlowFileError, StepFlowUnsupportedError

_FLASH = {
    "flash_attention_2": "is_flash_attn_2_available",
    "flash_attention_3": "is_flash_attn_3_available",
}
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", *_FLASH)
# Those that need no further package, in the order in which they are worth trying.
_KERNELS = ("sdpa", "eager", "flex_attention")
_MARKERS = ("thinking_start", "summary_start")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Reports the versions of python, torch and transformers, whether transformers is in the supported range, and\n"
        "which attention implementations it can load here. With MODEL, also reports whether StepFlow runs on that\n"
        "model, from its config and tokenizer alone. Exit status 0: all is well. 1: transformers is outside the\n"
        "range, or the model is not supported. 2: the model cannot be read."
    )
    parser.epilog = "example: hf-stepflow doctor Qwen/Qwen3-8B"
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub id of a model, or `reasoner`")
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0 if transformers is in the supported range and the model supported, else 1."""
    model = None if args.model is None else examine_model(args.model, args.revision)
    report = examine_machine()
    if args.json:
        print(json.dumps(report if model is None else report | {"model": model}, indent=2, ensure_ascii=False))
    else:
        print(_render_machine(report) + ("" if model is None else f"\n\n{render_model(model)}"))
    return 0 if report["transformers_supported"] and (model is None or model["supported"]) else 1


def examine_machine() -> dict[str, Any]:
    """Reports on this machine.

    Returns:
        The versions `hf_stepflow`, `python`, `torch`, `transformers`; `device`, the default place of tensors; the
        requirement `transformers_range`, and whether it is met, `transformers_supported`; and `attention`: for each
        implementation of transformers None if a model loads with it, else the reason why not.
    """
    import torch

    from hf_stepflow.hub.export import transformers_range

    version, supported_range = metadata.version("transformers"), transformers_range()
    return {
        "hf_stepflow": metadata.version("hf-stepflow"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu",
        "transformers": version,
        "transformers_range": str(supported_range),
        "transformers_supported": supported_range.contains(version, prereleases=True),
        "attention": {name: _reason_against(name) for name in _IMPLEMENTATIONS},
    }


def _reason_against(implementation: str) -> str | None:
    """Returns why no model can be loaded here with an attention implementation, or None if one can."""
    import transformers.utils
    from transformers import AutoModelForCausalLM, LlamaConfig

    # Asked first, because loading may otherwise fetch a kernel from the Hub.
    available = _FLASH.get(implementation)
    if available is not None and not getattr(transformers.utils, available)():
        return "its package is not installed or finds no GPU"
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    try:
        AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    except (ImportError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def _render_machine(report: dict[str, Any]) -> str:
    verdict = "supported" if report["transformers_supported"] else "NOT supported"
    lines = [f"{name:<14}{report[name]}" for name in ("hf_stepflow", "python", "torch", "device")]
    lines.append(f"{'transformers':<14}{report['transformers']} ({verdict}: {report['transformers_range']})")
    lines.append("attention implementations:")
    lines += [f"  {name:<19}{reason or 'usable'}" for name, reason in report["attention"].items()]
    return "\n".join(lines)


def examine_model(name: str, revision: str | None = None) -> dict[str, Any]:
    """Reports on a model.

    Args:
        name: A folder, a Hub id, or `reasoner`.
        revision: The revision on the Hub.

    Returns:
        `model`, `model_type` and `supported`. If it is not supported: `reason` and `hint`. If it is: `architecture`;
        `kernels`: for each attention implementation None, or the reason why the model cannot take it here; `layers`:
        those with softmax attention, a sliding window, learned sinks or latent attention; `preset`: its name, kind,
        claim and the layers of its bands; `fitting_presets`: the names of the others for this architecture; `markers`.

    Raises:
        StepFlowFileError: There is no readable config under this name.
    """
    from hf_stepflow.hub.base import facts_of
    from hf_stepflow.reasoner import FOLDER

    path = str(FOLDER) if name == "reasoner" else name
    facts = facts_of(path, revision)
    if facts.config is None:
        raise StepFlowFileError(
            f"the config of {name!r} cannot be read: {facts.problem}", hint="give a folder, a Hub id, or `reasoner`"
        )
    report = {"model": name, "model_type": facts.config.model_type}
    try:
        settings, found = _examine(_without_weights(facts.config), path)
    except StepFlowError as error:
        return report | {"supported": False, "reason": error.message, "hint": error.hint}
    return report | {"supported": True} | found | {"markers": _markers(path, revision, settings)}


def _without_weights(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise StepFlowUnsupportedError(
            f"transformers has no causal language model for it: {str(error).splitlines()[0][:300]}",
            hint="docs/architectures.md lists the model types that StepFlow runs on",
        ) from error


def _examine(model: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """Returns the settings of the model's preset, or of the rule, and the report that needs no tokenizer."""
    from hf_stepflow.presets.architecture import architecture_of
    from hf_stepflow.presets.preset import list_presets, rule_preset
    from hf_stepflow.runtime.attention_interface import attention_modules
    from hf_stepflow.runtime.settings import resolve_layers

    modules = attention_modules(model)
    fitting = [preset for preset in list_presets() if _fits(preset, model)]
    own = [preset for preset in fitting if preset.base_model and preset.base_model.casefold() == path.casefold()]
    preset = own[0] if own else rule_preset(model)
    layers, bands = list(modules), ("oeb_layers", "smi_layers")
    return preset.settings, {
        "architecture": str(architecture_of(model)),
        "kernels": {kernel: _kernel_problem(model, kernel) for kernel in _KERNELS},
        "layers": {
            "softmax_attention": layers,
            "sliding_window": [layer for layer, each in modules.items() if getattr(each, "sliding_window", None)],
            "sinks": [layer for layer, each in modules.items() if getattr(each, "sinks", None) is not None],
            "latent": [layer for layer, each in modules.items() if getattr(each, "kv_lora_rank", None)],
        },
        "preset": {"name": preset.name, "kind": preset.kind, "claim": preset.claim}
        | {band: resolve_layers(band, getattr(preset.settings, band), layers) for band in bands},
        "fitting_presets": [each.name for each in fitting if each.name != preset.name],
    }


def _fits(preset: Any, model: Any) -> bool:
    try:
        preset.check_model(model)
    except StepFlowConfigError:
        return False
    return True


def _kernel_problem(model: Any, kernel: str) -> str | None:
    """Returns why a model cannot take an attention implementation here, or None if it can."""
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        return str(error).splitlines()[0].split(". ")[0]
    taken = model.config.get_text_config(decoder=True)._attn_implementation
    return None if taken == kernel else f"the model stays with {taken}"


def _markers(path: str, revision: str | None, settings: Any) -> dict[str, Any]:
    """Finds the markers of the settings, and those of presets, in the tokenizer and in the chat template."""
    from transformers import AutoTokenizer

    from hf_stepflow.evaluation.markers import describe_markers, find_marker, unknown_markers
    from hf_stepflow.presets.preset import list_presets
    from hf_stepflow.runtime.step_detector import StepVocabulary

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return {"problem": f"no tokenizer could be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"}
    own = {kind: [find_marker(tokenizer, text) for text in settings.markers(kind)] for kind in _MARKERS}
    others = {}
    for kind in _MARKERS:
        known = {text for each in list_presets() for text in each.settings.markers(kind)}
        candidates = [find_marker(tokenizer, text) for text in sorted(known - set(settings.markers(kind)))]
        others[kind] = [each for each in candidates if each["single_token"] or each["in_template"]]
    opens, problem = _opens_thinking(tokenizer, settings.markers("thinking_start"))
    try:
        StepVocabulary.from_tokenizer(tokenizer, settings)
    except StepFlowConfigError as error:
        problem = f"{error.message}: {error.hint}"
    return own | {
        "others_found": others,
        "template_opens_thinking": opens,
        "problem": problem,
        "judged_by": describe_markers(settings),
        "unknown": unknown_markers(tokenizer, settings),
    }


def _opens_thinking(tokenizer: Any, markers: list[str]) -> tuple[bool | None, str | None]:
    """Returns whether the chat template ends the prompt with a marker, or None and the reason why it is unknown."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None, "the tokenizer has no chat template"
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        return None, f"the chat template cannot be filled in: {error}"
    return any(prompt.rstrip().endswith(marker) for marker in markers), None


def render_model(report: dict[str, Any]) -> str:
    """Returns the report on a model as text, one finding a line."""
    rows = [("model", f"{report['model']} ({report['model_type']})")]
    if report["supported"]:
        layers, preset = report["layers"], report["preset"]
        rows += [("supported", "yes"), ("architecture", report["architecture"])]
        rows += [(kernel, reason or "usable") for kernel, reason in report["kernels"].items()]
        rows.append(("attention in", _ranges(layers["softmax_attention"])))
        kinds = {"sliding_window": "sliding window", "sinks": "learned sinks", "latent": "latent (MLA)"}
        rows += [(label, _ranges(layers[key])) for key, label in kinds.items() if layers[key]]
        rows.append(("preset", f"{preset['name']}: {preset['claim']}"))
        rows.append(("  bridge in", _ranges(preset["oeb_layers"])))
        rows.append(("  injection in", _ranges(preset["smi_layers"])))
        rows.append(("others fit", ", ".join(report["fitting_presets"]) or "none"))
        rows += _marker_rows(report["markers"])
    else:
        rows += [("supported", "NO"), ("reason", report["reason"])]
        rows += [("hint", report["hint"])] if report["hint"] else []
    return "\n".join(f"{label:<16}{text}".rstrip() for label, text in rows)


def _marker_rows(markers: dict[str, Any]) -> list[tuple[str, str]]:
    rows, is_missing = [], False
    for kind in _MARKERS:
        for each in markers.get(kind, []):
            words = {"single_token": "a single token", "in_template": "in the chat template"}
            places = ", ".join(text for key, text in words.items() if each[key])
            rows.append((kind, f"{each['text']}: {places or 'text, not in the chat template'}"))
            is_missing |= not places
        rows += [("", f"also found: {each['text']}") for each in markers.get("others_found", {}).get(kind, [])]
    labels = iter(["eval judges by"])
    rows += [(next(labels, ""), text) for text in markers.get("judged_by", "").split("; ") if text]
    if markers.get("unknown"):
        unknown = " or ".join(map(repr, markers["unknown"]))
        rows.append(("warning", f"neither the vocabulary nor the chat template has {unknown}: no steps, no effect"))
    opens = markers.get("template_opens_thinking")
    if opens is not None:
        rows.append(("thinking", "starts at the end of the prompt" if opens else "is started by the model"))
    if markers.get("problem"):
        rows.append(("problem", markers["problem"]))
    if is_missing:
        hint = (
            "set thinking_start and summary_start to what the model writes; implicit_thinking=True if it marks nothing"
        )
        rows.append(("hint", hint))
    return rows


def _ranges(layers: list[int]) -> str:
    """Returns layers as text, such as "layers 0 to 5 (6)"."""
    if not layers:
        return "no layer"
    is_range = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return (
        f"layers {layers[0]} to {layers[-1]} ({len(layers)})" if is_range else f"layers {', '.join(map(str, layers))}"
    )
