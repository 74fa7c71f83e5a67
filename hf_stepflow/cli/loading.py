"""Loading the model that a subcommand is asked to work on."""

import argparse
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError


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


def load(name: str, dtype: str, device: str, revision: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        name: folder or Hub id, or `reasoner`.
        dtype: of the weights.
        device: where to put it; `auto` leaves that to accelerate.
        revision: on the Hub.

    Raises:
        StepFlowInputError: no such dtype, nothing that could be loaded by this name, or no such device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise StepFlowInputError(f"--dtype must be a torch dtype or auto, got {dtype!r}", hint="float32 or bfloat16")
    if name == "reasoner":
        from hf_stepflow.reasoner import FOLDER

        name = str(FOLDER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        where = {"device_map": "auto"} if device == "auto" else {}
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, **where)
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
