"""`hf-stepflow diagnose`: Step-Saliency of a trace, or of right traces against wrong ones."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .loading import add_model_arguments, find_stepflow, load
from .paths import demand_folders
from .seeds import read_seed


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Shows which steps of a trace draw on which, layer by layer (Step-Saliency), and how far it shows Shallow\n"
        "Lock-in and Deep Decay.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "A trace is a text file that holds all of it, markers included, or one line of a JSONL file with `prompt`\n"
        "and `response`; with --prompt the model writes one. --compare takes two JSONL files of many."
    )
    parser.epilog = (
        "example: hf-stepflow diagnose --model reasoner --trace trace.txt --out report.html\n"
        "         hf-stepflow diagnose --model M --compare correct.jsonl wrong.jsonl --out profile.png --json"
    )
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="a trace that was written before")
    source.add_argument("--prompt", metavar="TEXT", help="a question that the model answers greedily")
    source.add_argument("--compare", nargs=2, type=Path, metavar=("CORRECT", "WRONG"), help="two JSONL files")
    parser.add_argument("--paired", action="store_true", help="the two files hold the same problems, line by line")
    parser.add_argument(
        "--stepflow", metavar="CONFIG", help="preset, JSON file, folder or KEY=VALUE,...: look at it with StepFlow on"
    )
    parser.add_argument("--steps", metavar="CONFIG", help="JSON file or folder with markers and step rules alone")
    parser.add_argument("--implicit-thinking", action="store_true", help="thinking starts where the prompt ends")
    parser.add_argument("--loss", default="trace", choices=("trace", "summary"), help="default: trace")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="of a trace that is written (default: 2048)")
    parser.add_argument("--seed", type=read_seed, default=0, help="of the resampling (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        help=".png, .svg or .pdf: a picture; of one trace also .html: the report, .safetensors: the maps",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Diagnoses and prints the result."""
    _check_out(args)
    from hf_stepflow.runtime.configuration_stepflow import read_settings
    from hf_stepflow.saliency.traces import read_traces

    groups = [read_traces(path) for path in args.compare or ([args.trace] if args.trace else [])]
    _check(args, groups)
    stepflow = find_stepflow(args.stepflow)
    settings = read_settings(args.steps)
    model, tokenizer = load(args.model, args.dtype, args.device, args.revision)
    if stepflow is not None:
        from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM

        StepFlowModelForCausalLM.attach(model, stepflow, tokenizer=tokenizer)
        settings = model.stepflow_runtime.settings
    if args.implicit_thinking:
        settings = settings.replace(implicit_thinking=True)
        if stepflow is not None:
            model.stepflow_config = settings
    rows = [[trace.encode(tokenizer) for trace in group] for group in groups]
    if args.prompt is not None:
        rows = [[_answer(model, tokenizer, args.prompt, args.max_new_tokens)]]
    if settings.implicit_thinking and any(length is None for group in rows for _, length in group):
        raise StepFlowInputError(
            "implicit thinking starts where the prompt ends, and a trace that is one text does not say where",
            hint="give JSONL with `prompt` and `response`",
        )
    maps = [_maps(model, tokenizer, group, settings, args.loss) for group in rows]
    return _single(args, maps[0][0]) if args.compare is None else _compare(args, *maps)


def _check(args: argparse.Namespace, groups: list[list[Any]]) -> None:
    """Refuses arguments that do not go together."""
    if args.stepflow is not None and args.steps is not None:
        raise StepFlowInputError("--stepflow and --steps both say where steps end", hint="leave one of them out")
    if args.trace is not None and len(groups[0]) > 1:
        raise StepFlowInputError(
            f"{str(args.trace)!r} holds {len(groups[0])} traces, and --trace takes one", hint="--compare takes many"
        )
    if args.paired and args.compare is None:
        raise StepFlowInputError("--paired needs --compare", hint="leave it out")
    if args.max_new_tokens < 1:
        raise StepFlowInputError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    if args.prompt is not None and not args.prompt.strip():
        raise StepFlowInputError("--prompt is empty", hint="ask something")
    if args.paired and len({len(group) for group in groups}) > 1:
        raise StepFlowInputError(
            f"--paired needs files of the same length, got {len(groups[0])} and {len(groups[1])} traces"
        )


def _check_out(args: argparse.Namespace) -> None:
    if args.out is None:
        return
    kinds = (".png", ".svg", ".pdf", *(() if args.compare else (".html", ".safetensors")))
    if args.out.suffix.lower() not in kinds:
        raise StepFlowInputError(f"--out must end in one of {', '.join(kinds)}, got {str(args.out)!r}")
    demand_folders(args.out)


def _answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> tuple[list[int], int]:
    """Token ids of the prompt and of what the model writes, and where the prompt ends.

    The ids stay those of the model: its text, encoded again, may be other ones, and another trace.
    """
    import torch

    from hf_stepflow.prompts import encode_prompt

    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return output[0].tolist(), ids.shape[1]


def _maps(model: Any, tokenizer: Any, rows: list[tuple[list[int], int | None]], settings: Any, loss: str) -> list[Any]:
    from hf_stepflow import step_saliency

    return step_saliency(  # type: ignore[return-value] # a list went in
        model,
        [ids for ids, _ in rows],
        tokenizer=tokenizer,
        config=settings,
        prompt_length=[length for _, length in rows],
        loss=loss,
    )


def _single(args: argparse.Namespace, maps: Any) -> int:
    if args.out is not None:
        {".html": maps.to_html, ".safetensors": maps.save}.get(
            args.out.suffix.lower(), lambda path: maps.plot(path=path)
        )(args.out)
    print(json.dumps(maps.to_dict(), indent=2) if args.json else maps)
    return 0


def _compare(args: argparse.Namespace, correct: list[Any], wrong: list[Any]) -> int:
    from hf_stepflow.saliency.compare import compare

    result = compare(correct, wrong, paired=args.paired, seed=args.seed)
    if args.out is not None:
        from hf_stepflow.saliency.plot import plot_profile

        plot_profile(correct, wrong, comparison=result, path=args.out)
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
    return 0
