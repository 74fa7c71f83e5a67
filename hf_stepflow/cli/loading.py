"""The model that a subcommand is asked to work on, and the StepFlow settings for it."""

import argparse
import os
from typing import Any

from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError


def add_model_arguments(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """The arguments that say which model; its name as an option, or as what the subcommand is about."""
    what = "folder or Hub id of the base model, or `reasoner`"
    if positional:
        parser.add_argument("model", metavar="MODEL", help=what)
    else:
        parser.add_argument("--model", required=True, help=what)
    parser.add_argument("--revision", help="revision on the Hub")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32: rounding flips results)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... or auto (needs accelerate)")


def find_stepflow(text: str | None) -> Any:
    """What `--stepflow` names, looked up before any weights are loaded.

    Args:
        text: a preset (its name, its base model's id, its path or its Hub id), the path of a JSON file or folder with
            settings, `auto`, or `KEY=VALUE,...` with the paper's constants for the rest; None where nothing was named.

    Returns:
        What `StepFlowModelForCausalLM.attach` takes.

    Raises:
        StepFlowError: nothing of this name, or settings that StepFlow does not take.
    """
    from hf_stepflow.runtime.configuration_stepflow import read_settings
    from hf_stepflow.runtime.repository import find_preset

    if text is None or text == "auto":
        return text
    if "=" in text and not os.path.exists(text):  # unlike Path's own, it takes a name that no file can have
        from hf_stepflow.evaluation.arms import read_pairs

        return read_settings(dict(read_pairs(text)))
    found = find_preset(text)
    return read_settings(found) if isinstance(found, str) else found


def load(name: str, dtype: str, device: str, revision: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        name: folder or Hub id, or `reasoner`.
        dtype: of the weights.
        device: where to put it; `auto` leaves that to accelerate.
        revision: on the Hub.

    Raises:
        StepFlowInputError: no such dtype, nothing that could be loaded by this name, a preset, or no such device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_stepflow.runtime.base_model import read_repository_file

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise StepFlowInputError(f"--dtype must be a torch dtype or auto, got {dtype!r}", hint="float32 or bfloat16")
    if name == "reasoner":
        from hf_stepflow.reasoner import FOLDER

        name = str(FOLDER)
    try:
        data = read_repository_file(name, "config.json", {"revision": revision})
        if data.get("model_type") == "stepflow":
            base = data.get("base_model_name_or_path") or "BASE"
            raise StepFlowInputError(
                f"{name!r} is a preset, which holds settings and no weights", hint=f"--model {base} --stepflow {name}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        where = {"device_map": "auto"} if device == "auto" else {}
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, **where)
    except StepFlowError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise StepFlowInputError(
            f"the model {name!r} could not be loaded: {error}", hint="give a folder, a Hub id, or `reasoner`"
        ) from error
    try:
        if device != "auto":
            torch.nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        raise StepFlowInputError(
            f"the model could not be moved to --device {device}: {error}", hint="cpu always works"
        ) from error
    return model, tokenizer
