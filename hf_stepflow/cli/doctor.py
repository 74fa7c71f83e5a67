"""`hf-stepflow doctor`: what is installed here and what of it StepFlow can use."""

import argparse
import json
import platform
from importlib import metadata
from typing import Any

FLASH_IMPLEMENTATIONS = {
    "flash_attention_2": "is_flash_attn_2_available",
    "flash_attention_3": "is_flash_attn_3_available",
}
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", *FLASH_IMPLEMENTATIONS)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Shows the versions of python, torch and transformers, whether transformers is inside the supported range,\n"
        "and which attention implementations it can load here. With MODEL also whether StepFlow runs on that model,\n"
        "from its config and tokenizer alone. Exit status 0: all is well. 1: transformers is outside the range, or\n"
        "the model is not supported. 2: the model cannot be read."
    )
    parser.epilog = "example: hf-stepflow doctor Qwen/Qwen3-8B"
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub id of a model, or `reasoner`")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0 if transformers is inside the supported range and the model supported, else 1."""
    from .model_checkup import examine_model, render_model

    about_model = None if args.model is None else examine_model(args.model, args.revision)
    report = examine()
    if args.json:
        told = report if about_model is None else report | {"model": about_model}
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        print(render(report))
        if about_model is not None:
            print(f"\n{render_model(about_model)}")
    is_well = report["transformers_supported"] and (about_model is None or about_model["supported"])
    return 0 if is_well else 1


def examine() -> dict[str, Any]:
    """Collects the report of this machine.

    Returns:
        The versions `hf_stepflow`, `python`, `torch`, `transformers`; `device`, where tensors go by default; the
        requirement `transformers_range` and whether it is met, `transformers_supported`; `attention`: for each
        implementation of transformers None if a model loads with it, else the reason why not.
    """
    import torch

    from hf_stepflow.hub.custom_generate import transformers_range

    version, supported_range = metadata.version("transformers"), transformers_range()
    return {
        "hf_stepflow": metadata.version("hf-stepflow"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu",
        "transformers": version,
        "transformers_range": str(supported_range),
        "transformers_supported": supported_range.contains(version, prereleases=True),
        "attention": {name: reason_against(name) for name in IMPLEMENTATIONS},
    }


def reason_against(implementation: str) -> str | None:
    """Returns None if a model loads here with this attention implementation, else the reason why not."""
    import transformers.utils
    from transformers import AutoModelForCausalLM, LlamaConfig

    # Asked first, because loading may otherwise fetch a kernel from the Hub.
    available = FLASH_IMPLEMENTATIONS.get(implementation)
    if available is not None and not getattr(transformers.utils, available)():
        return "its package is not installed or finds no GPU"
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    try:
        AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    except (ImportError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def render(report: dict[str, Any]) -> str:
    """Returns the report as text, one finding a line."""
    verdict = "supported" if report["transformers_supported"] else "NOT supported"
    lines = [f"{name:<14}{report[name]}" for name in ("hf_stepflow", "python", "torch", "device")]
    lines.append(f"{'transformers':<14}{report['transformers']} ({verdict}: {report['transformers_range']})")
    lines.append("attention implementations:")
    lines += [f"  {name:<19}{reason or 'usable'}" for name, reason in report["attention"].items()]
    return "\n".join(lines)
