"""`hf-stepflow diagnose`: Step-Saliency of one trace, or of right traces compared with wrong ones."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_stepflow.prompts import encode_prompt
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .arguments import add_model_arguments, demand_folders, find_stepflow, load, read_seed


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Shows which steps of a trace draw on which, layer by layer (Step-Saliency), and how far it shows Shallow\n"
        "Lock-in and Deep Decay.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "A trace is a text file with all of it, markers included, or one line of a JSONL file with `prompt` and\n"
        "`response`; with --prompt the model writes one. --compare takes two JSONL files with many traces each."
    )
    parser.epilog = (
        "example: hf-stepflow diagnose --model reasoner --trace trace.txt --out report.html\n"
        "         hf-stepflow diagnose --model M --compare correct.jsonl wrong.jsonl --out profile.png --json"
    )
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="a file with a trace")
    source.add_argument("--prompt", metavar="TEXT", help="a question that the model answers greedily")
    source.add_argument("--compare", nargs=2, type=Path, metavar=("CORRECT", "WRONG"), help="two JSONL files")
    parser.add_argument("--paired", action="store_true", help="the two files hold the same problems, line by line")
    parser.add_argument(
        "--stepflow",
        metavar="CONFIG",
        help="turn StepFlow on: a preset, JSON file, folder, or settings KEY=VALUE,... of `presets settings`",
    )
    parser.add_argument("--steps", metavar="CONFIG", help="JSON file or folder with markers and step rules alone")
    parser.add_argument("--implicit-thinking", action="store_true", help="thinking starts where the prompt ends")
    parser.add_argument(
        "--loss", default="trace", choices=("trace", "summary"), help="tokens whose loss is traced (default: trace)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="tokens of the answer (default: 2048)")
    parser.add_argument("--seed", type=read_seed, default=0, help="seed of the resampling (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        help=".png, .svg or .pdf: a picture; for one trace also .html: the report, or .safetensors: the maps",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Computes the maps and prints the result."""
    _check_out(args)
    from hf_stepflow.runtime.configuration_stepflow import read_settings
    from hf_stepflow.saliency.api import step_saliency

    groups = [read_traces(path) for path in args.compare or ([args.trace] if args.trace else [])]
    _check(args, groups)
    stepflow = find_stepflow(args.stepflow)
    settings = read_settings(args.steps)
    model, tokenizer = load(args, stepflow)
    if stepflow is not None:
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
    maps: list[Any] = []
    for group in rows:
        ids, lengths = [ids for ids, _ in group], [length for _, length in group]
        maps.append(
            step_saliency(model, ids, tokenizer=tokenizer, config=settings, prompt_length=lengths, loss=args.loss)
        )
    return _single(args, maps[0][0]) if args.compare is None else _compare(args, *maps)


@dataclass(frozen=True)
class WrittenTrace:
    """A trace as text.

    Attributes:
        prompt: The question, which goes through the chat template; None where `response` is the whole trace, markers
            included.
        response: The text after the prompt.
    """

    prompt: str | None
    response: str

    def encode(self, tokenizer: Any) -> tuple[list[int], int | None]:
        """Returns the token ids and the length of the prompt (None if unknown)."""
        response = tokenizer.encode(self.response, add_special_tokens=False)
        if self.prompt is None:
            return response, None
        prompt = encode_prompt(tokenizer, self.prompt)
        return prompt + response, len(prompt)


def read_traces(path: str | Path) -> list[WrittenTrace]:
    """Reads traces: JSONL with `prompt` and `response`, or `text`, in each line; any other file is one whole trace.

    Args:
        path: The file to read.

    Raises:
        StepFlowFileError: If the file is missing or empty, or a line is not a trace.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StepFlowFileError(f"{str(path)!r} cannot be read: {error}") from error
    if path.suffix.lower() != ".jsonl":
        if not content.strip():
            raise StepFlowFileError(f"{str(path)!r} is empty", hint="give a file that holds a trace")
        return [WrittenTrace(None, content)]
    traces = [_read_line(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not traces:
        raise StepFlowFileError(f"{str(path)!r} holds no trace", hint="one JSON object a line: prompt, response")
    return traces


def _read_line(path: Path, number: int, line: str) -> WrittenTrace:
    where = f"line {number} of {str(path)!r}"
    try:
        data = json.loads(line)
    except ValueError as error:
        raise StepFlowFileError(f"{where} is no JSON: {error}") from error
    if not isinstance(data, dict) or not ({"prompt", "response"} if "response" in data else {"text"}) <= data.keys():
        raise StepFlowFileError(
            f"{where} must be an object with `prompt` and `response`, or `text`",
            hint='for instance {"prompt": "How many?", "response": "Two and two.</think>Four."}',
        )
    prompt, response = (data["prompt"], data["response"]) if "response" in data else (None, data["text"])
    if not isinstance(response, str) or not response or not (prompt is None or isinstance(prompt, str)):
        raise StepFlowFileError(f"{where} must hold texts that are not empty")
    return WrittenTrace(prompt, response)


def _check(args: argparse.Namespace, groups: list[list[Any]]) -> None:
    """Refuses arguments that contradict each other."""
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
    """Returns the token ids of the prompt and its answer, and the length of the prompt.

    The ids are the model's own: encoding the text again can give other ids, which would be another trace.
    """
    import torch

    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return output[0].tolist(), ids.shape[1]


def _single(args: argparse.Namespace, maps: Any) -> int:
    if args.out is not None:
        writers = {".html": maps.to_html, ".safetensors": maps.save}
        writers.get(args.out.suffix.lower(), lambda path: maps.plot(path=path))(args.out)
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
