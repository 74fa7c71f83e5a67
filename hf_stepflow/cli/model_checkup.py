"""What `hf-stepflow doctor MODEL` finds out: whether StepFlow runs on a model, where, and with which markers.

Only config and tokenizer are loaded; the model is built on the meta device, without weights.
"""

from typing import Any

from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowError, StepFlowFileError, StepFlowUnsupportedError

KERNELS = ("sdpa", "eager", "flex_attention")


def examine_model(name: str, revision: str | None = None) -> dict[str, Any]:
    """Collects the report of a model.

    Args:
        name: folder or Hub id, or `reasoner`.
        revision: on the Hub.

    Returns:
        `model`, `model_type`, `supported` and, where it is not, `reason` and `hint`. Where it is: `architecture`;
        `kernels`: for each attention implementation None or the reason why it cannot be taken here; `layers`: those
        with softmax attention, with a sliding window, learned sinks or latent attention; `preset`: its name, kind,
        claim and the layers that its bands come to; `fitting_presets`: names of all for this architecture; `markers`.

    Raises:
        StepFlowFileError: nothing that can be read under this name.
    """
    from hf_stepflow.hub.base_facts import facts_of
    from hf_stepflow.reasoner import FOLDER

    path = str(FOLDER) if name == "reasoner" else name
    facts = facts_of(path, revision)
    if facts.config is None:
        raise StepFlowFileError(
            f"the config of {name!r} cannot be read: {facts.problem}", hint="give a folder, a Hub id, or `reasoner`"
        )
    report = {"model": name, "model_type": facts.config.model_type}
    try:
        settings, found = _of_model(_without_weights(facts.config), path)
    except StepFlowError as error:
        return report | {"supported": False, "reason": error.message, "hint": error.hint}
    return report | {"supported": True} | found | {"markers": _markers(path, revision, settings)}


def render_model(report: dict[str, Any]) -> str:
    """Returns the report as text, one finding a line."""
    lines = [_line("model", f"{report['model']} ({report['model_type']})")]
    if not report["supported"]:
        lines += [_line("supported", "NO"), _line("reason", report["reason"])]
        return "\n".join([*lines, *([_line("hint", report["hint"])] if report["hint"] else [])])
    layers, preset = report["layers"], report["preset"]
    lines += [_line("supported", "yes"), _line("architecture", report["architecture"])]
    lines += [_line(kernel, reason or "usable") for kernel, reason in report["kernels"].items()]
    lines.append(_line("attention in", _ranges(layers["softmax_attention"])))
    for label, key in (("sliding window", "sliding_window"), ("learned sinks", "sinks"), ("latent (MLA)", "latent")):
        if layers[key]:
            lines.append(_line(label, _ranges(layers[key])))
    lines += [_line("preset", f"{preset['name']}: {preset['claim']}"),
              _line("  bridge in", _ranges(preset["oeb_layers"])),
              _line("  injection in", _ranges(preset["smi_layers"])),
              _line("others fit", ", ".join(report["fitting_presets"]) or "none")]  # fmt: skip
    return "\n".join(lines + _told_markers(report["markers"]))


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


def _of_model(model: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """The settings of its preset, or of the rule, and what is found out without a tokenizer."""
    from hf_stepflow.presets.architecture import architecture_of
    from hf_stepflow.presets.preset import list_presets, rule_preset
    from hf_stepflow.runtime.attention_interface import attention_modules
    from hf_stepflow.runtime.configuration_stepflow import resolve_layers

    modules = attention_modules(model)
    fitting = [preset for preset in list_presets() if _fits(preset, model)]
    own = [preset for preset in fitting if preset.base_model and preset.base_model.casefold() == path.casefold()]
    preset = own[0] if own else rule_preset(model)
    layers, bands = list(modules), ("oeb_layers", "smi_layers")
    return preset.settings, {
        "architecture": str(architecture_of(model)),
        "kernels": {kernel: _reason_against(model, kernel) for kernel in KERNELS},
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


def _reason_against(model: Any, kernel: str) -> str | None:
    """Why a model cannot take an attention implementation here, or None."""
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        return str(error).splitlines()[0].split(". ")[0]
    taken = model.config.get_text_config(decoder=True)._attn_implementation
    return None if taken == kernel else f"the model stays with {taken}"


def _markers(path: str, revision: str | None, settings: Any) -> dict[str, Any]:
    """The markers of the settings, and others that presets know, where tokenizer or chat template have them."""
    from transformers import AutoTokenizer

    from hf_stepflow.presets.preset import list_presets

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return {"problem": f"no tokenizer could be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"}
    template = str(tokenizer.chat_template or "")
    vocabulary = tokenizer.get_vocab()

    def found(text: str) -> dict[str, Any]:
        return {"text": text, "single_token": text in vocabulary, "in_template": text in template}

    kinds = ("thinking_start", "summary_start")
    own = {kind: [found(text) for text in settings.markers(kind)] for kind in kinds}
    others = {}
    for kind in kinds:
        known = {text for each in list_presets() for text in each.settings.markers(kind)}
        seen = map(found, sorted(known - set(settings.markers(kind))))
        others[kind] = [each for each in seen if each["single_token"] or each["in_template"]]
    opens, problem = _opens_thinking(tokenizer, settings.markers("thinking_start"))
    problem = _spelling_problem(tokenizer, settings) or problem
    return own | {"others_found": others, "template_opens_thinking": opens, "problem": problem}


def _spelling_problem(tokenizer: Any, settings: Any) -> str | None:
    from hf_stepflow.runtime.step_detector import StepVocabulary

    try:
        StepVocabulary.from_tokenizer(tokenizer, settings)
    except StepFlowConfigError as error:
        return f"{error.message}: {error.hint}"
    return None


def _opens_thinking(tokenizer: Any, markers: list[str]) -> tuple[bool | None, str | None]:
    """Whether the chat template ends the prompt with a marker, None where it cannot be told; and why not."""
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


def _told_markers(markers: dict[str, Any]) -> list[str]:
    lines, missing = [], []
    for kind in ("thinking_start", "summary_start"):
        for each in markers.get(kind, []):
            places = [words for words, is_so in (("a single token", each["single_token"]),
                                                 ("in the chat template", each["in_template"])) if is_so]  # fmt: skip
            lines.append(_line(kind, f"{each['text']}: {', '.join(places) or 'text, not in the chat template'}"))
            missing += [] if places else [each["text"]]
        for each in markers.get("others_found", {}).get(kind, []):
            lines.append(_line("", f"also found: {each['text']}"))
    opens = markers.get("template_opens_thinking")
    if opens is not None:
        lines.append(_line("thinking", "starts at the end of the prompt" if opens else "is started by the model"))
    if markers.get("problem"):
        lines.append(_line("problem", markers["problem"]))
    if missing:
        lines.append(_line("hint", "set thinking_start and summary_start to what the model writes; implicit_thinking="
                                   "True if it marks nothing"))  # fmt: skip
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<16}{text}".rstrip()


def _ranges(layers: list[int]) -> str:
    """Layers in words: "layers 0 to 5 (6)"."""
    if not layers:
        return "no layer"
    whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"layers {layers[0]} to {layers[-1]} ({len(layers)})" if whole else f"layers {', '.join(map(str, layers))}"
