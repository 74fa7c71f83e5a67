"""Arguments that several subcommands share, and the model, settings and sampling that they name."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError

_TEMPERATURE = 0.7  # where sampling is asked for without a temperature


def add_model_arguments(parser: argparse.ArgumentParser, positional: bool = False, is_needed: bool = True) -> None:
    """Adds the arguments that choose the model.

    Args:
        parser: The parser of a subcommand.
        positional: Whether the model is a positional argument rather than the option `--model`.
        is_needed: Whether a positional model must be given.
    """
    text = "folder or Hub id of the base model, or `reasoner`"
    if positional:
        parser.add_argument("model", metavar="MODEL", help=text, nargs=None if is_needed else "?")
    else:
        parser.add_argument("--model", required=True, help=text)
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of the weights (default: float32; rounding can flip results)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ..., or auto (needs accelerate)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that set the length of responses and how they are sampled."""
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="tokens of a response (default: 2048)")
    parser.add_argument("--temperature", type=float, help="sample at this temperature (default: 0, greedy decoding)")
    parser.add_argument("--top-p", type=float, help=f"sample from this nucleus (default temperature: {_TEMPERATURE})")
    parser.add_argument("--seed", type=read_seed, default=0, help="seed of everything random (default: 0)")


def add_run_arguments(parser: argparse.ArgumentParser, batch_size: int | None = 16) -> None:
    """Adds the arguments of a run over many problems.

    Args:
        parser: The parser of a subcommand.
        batch_size: The default of `--batch-size`; None for a command that finds it.
    """
    parser.add_argument("--limit", type=int, help="take only the first N problems")
    parser.add_argument(
        "--samples", type=int, default=1, help="responses to each problem (default: 1); more are sampled"
    )
    size = "the fastest" if batch_size is None else batch_size
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"problems in a batch (default: {size})")
    parser.add_argument("--run-code", action="store_true", help="run programs that the model writes, to judge them")
    parser.add_argument("--report", type=Path, help="write the result as an HTML page")


def read_seed(text: str) -> int:
    """Reads the value of `--seed`: a whole number from 0 on, below 2^63.

    Raises:
        argparse.ArgumentTypeError: The text is no such number. argparse then ends the command before any work is done.
    """
    try:
        number = int(text)
    except ValueError:
        number = -1
    if 0 <= number < 2**63:
        return number
    raise argparse.ArgumentTypeError(
        f"a seed is a whole number from 0 on, below 2^63, got {text!r}: pass for instance 0"
    )


def demand_folders(*paths: Path | None) -> None:
    """Checks that files can be written before any work is done.

    Args:
        *paths: The files to write; None for those that were not asked for.

    Raises:
        StepFlowInputError: The folder of a file does not exist.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise StepFlowInputError(
                f"there is no folder {str(path.parent)!r}", hint="make it, or choose another path"
            )


def sampling_of(args: argparse.Namespace, is_needed: bool = False) -> dict[str, Any]:
    """Reads the sampling arguments.

    Args:
        args: The arguments of the command.
        is_needed: Whether to sample unless a temperature of 0 is given, because several responses are wanted.

    Returns:
        The sampling arguments of `generate`; empty for greedy decoding.

    Raises:
        StepFlowInputError: A value is out of range.
    """
    if args.max_new_tokens < 1:
        raise StepFlowInputError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        raise StepFlowInputError(f"--temperature must be 0 or more, got {args.temperature}", hint="0 is greedy")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise StepFlowInputError(f"--top-p must be above 0 and at most 1, got {args.top_p}", hint="for instance 0.95")
    if args.temperature == 0 or not (is_needed or args.temperature is not None or args.top_p is not None):
        return {}
    sampling = {"do_sample": True, "temperature": _TEMPERATURE if args.temperature is None else args.temperature}
    return sampling if args.top_p is None else sampling | {"top_p": args.top_p}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose what generates."""
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what generates, see docs/serving.md",
    )
    parser.add_argument(
        "--engine-args",
        metavar="KEY=VALUE,...",
        help="arguments of vllm.LLM, such as tensor_parallel_size=2,max_model_len=8192",
    )


def load_engine(args: argparse.Namespace, stepflow: Any = None) -> Any:
    """Starts the engine that `--engine vllm` asks for.

    Args:
        args: The arguments that `add_model_arguments` and `add_engine_arguments` add.
        stepflow: The settings that arms start from, or None.

    Raises:
        StepFlowInputError: An argument is not for vLLM, or vLLM refuses one.
        StepFlowError: As `VllmEngine`.
    """
    from hf_stepflow.evaluation.arms import read_pairs
    from hf_stepflow.reasoner import FOLDER
    from hf_stepflow.vllm.offline import VllmEngine

    if args.device != "cpu":
        raise StepFlowInputError(
            f"--device {args.device} is for the engine transformers", hint="vLLM finds its devices: leave --device out"
        )
    given = dict(read_pairs(args.engine_args)) if args.engine_args else {}
    name = str(FOLDER) if args.model == "reasoner" else args.model
    try:
        return VllmEngine(name, stepflow, **{"dtype": args.dtype, "revision": args.revision} | given)
    except StepFlowError:
        raise
    except (ValueError, TypeError) as error:
        raise StepFlowInputError(f"vLLM could not start with {name!r}: {error}", hint="see --engine-args") from error


def demand_no_engine_args(args: argparse.Namespace) -> None:
    """Refuses `--engine-args` where no engine takes them.

    Raises:
        StepFlowInputError: They are given for transformers.
    """
    if args.engine == "transformers" and args.engine_args:
        raise StepFlowInputError("--engine-args are for --engine vllm", hint="add --engine vllm")


def find_stepflow(text: str | None) -> Any:
    """Finds the settings that `--stepflow` names, before any weights are loaded.

    Args:
        text: A preset (name, base model, path or Hub id), the path of a JSON file or folder with settings, `auto`, or
            `KEY=VALUE,...` with the paper's constants for the rest; None if the option is absent.

    Returns:
        The `config` for `StepFlowModelForCausalLM.attach`.

    Raises:
        StepFlowError: The name is unknown, or a setting is wrong.
    """
    from hf_stepflow.runtime.configuration_stepflow import read_settings
    from hf_stepflow.runtime.repository import find_preset

    if text is None or text == "auto":
        return text
    if "=" in text and not os.path.exists(text):  # Path.exists raises for names that no file can have
        from hf_stepflow.evaluation.arms import read_pairs

        return read_settings(dict(read_pairs(text)))
    found = find_preset(text)
    return read_settings(found) if isinstance(found, str) else found


def load(args: argparse.Namespace, stepflow: Any = None) -> tuple[Any, Any]:
    """Loads the model that the arguments name, and its tokenizer.

    Args:
        args: The arguments that `add_model_arguments` adds.
        stepflow: The settings to attach; None leaves the model without StepFlow.

    Raises:
        StepFlowInputError: The dtype, the model or the device does not exist, or the model is a preset.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_stepflow.runtime.configuration_stepflow import read_repository_file
    from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM

    def make(name: str, **options: Any) -> tuple[Any, Any]:
        data = read_repository_file(name, "config.json", {"revision": args.revision})
        if data.get("model_type") == "stepflow":
            base = data.get("base_model_name_or_path") or "BASE"
            raise StepFlowInputError(
                f"{name!r} is a preset, which holds settings and no weights", hint=f"--model {base} --stepflow {name}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=args.revision)
        return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer

    model, tokenizer = _placed(args, make)
    if stepflow is not None:
        StepFlowModelForCausalLM.attach(model, stepflow, tokenizer=tokenizer)
    return model, tokenizer


def load_with_stepflow(args: argparse.Namespace, stepflow: Any = None) -> tuple[Any, Any]:
    """Loads the model that the arguments name with StepFlow, and its tokenizer.

    Args:
        args: The arguments that `add_model_arguments` adds. The model may be a preset's repository.
        stepflow: The settings; None takes those of the repository, or else `auto`.

    Raises:
        StepFlowError: As `load`, or as `StepFlowModelForCausalLM.from_pretrained`.
    """
    from hf_stepflow.runtime.configuration_stepflow import read_repository_file
    from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
    from hf_stepflow.runtime.repository import is_saved_with_stepflow

    def make(name: str, **options: Any) -> tuple[Any, Any]:
        settings = stepflow
        if settings is None:
            config, generation = (
                read_repository_file(name, f"{kind}.json", {"revision": args.revision})
                for kind in ("config", "generation_config")
            )
            is_preset = config.get("model_type") == "stepflow"
            settings = None if is_preset or is_saved_with_stepflow(config) or "stepflow" in generation else "auto"
        model = StepFlowModelForCausalLM.from_pretrained(name, stepflow=settings, **options)
        return model, model.stepflow_runtime.tokenizer

    return _placed(args, make)


def _placed(args: argparse.Namespace, make: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    """Makes a model and its tokenizer from the name and the options of loading, and moves the model to its device."""
    import torch

    from hf_stepflow.reasoner import FOLDER

    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise StepFlowInputError(
            f"--dtype must be a torch dtype or auto, got {args.dtype!r}", hint="float32 or bfloat16"
        )
    name = str(FOLDER) if args.model == "reasoner" else args.model
    placing = {"device_map": "auto"} if args.device == "auto" else {}
    try:
        model, tokenizer = make(name, revision=args.revision, dtype=args.dtype, **placing)
    except StepFlowError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:  # KeyError: a tokenizer.json that lacks a part
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        # transformers goes on with the names of all model types.
        reason = reason.partition("Model type should be one of")[0].strip()
        raise StepFlowInputError(
            f"the model {name!r} could not be loaded: {reason}",
            hint="give a folder, a Hub id, or `reasoner`; `hf-stepflow doctor` says whether StepFlow runs on it",
        ) from error
    try:
        if args.device != "auto":
            torch.nn.Module.to(model, args.device)
    except (RuntimeError, AssertionError) as error:
        raise StepFlowInputError(
            f"the model could not be moved to --device {args.device}: {error}", hint="cpu always works"
        ) from error
    return model, tokenizer
