"""`hf-stepflow generate`: one answer of a model with StepFlow, printed as it is written."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .arguments import add_model_arguments, add_sampling_arguments, find_stepflow, load, sampling_of

if TYPE_CHECKING:
    from .terminal import Answer

_NAMES = {"base": "Base model", "stepflow": "With StepFlow"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Asks a model, prints its answer step by step as it is written, and then what StepFlow did. Decoding is\n"
        "greedy unless --temperature or --top-p is given.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "CONFIG is a preset (name, base model, path, or Hub id), a JSON file or folder with settings, settings as\n"
        "KEY=VALUE,... (`hf-stepflow presets settings` lists them; the rest are the paper's), `auto` for MODEL's\n"
        "preset or else the rule, or `off`. Without it, MODEL's saved settings apply, or else the paper's."
    )
    parser.epilog = (
        "examples:\n"
        "  hf-stepflow generate --model reasoner --prompt 'Ben has 4 points. Ann has 3 more than Ben. "
        "How many points does Ann have?'\n"
        "  hf-stepflow generate --model Qwen/Qwen3-0.6B --stepflow tau_max=0.3,alpha=0 --prompt-file question.txt\n"
        "  echo 'What is 17 times 23?' | hf-stepflow generate --model Qwen/Qwen3-0.6B --prompt - --json"
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="the question; - reads it from the standard input")
    parser.add_argument("--prompt-file", metavar="FILE", help="a file with the question")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the question")
    parser.add_argument("--no-chat-template", action="store_true", help="pass the prompt on without the chat template")
    parser.add_argument("--stepflow", metavar="CONFIG", help="the settings, or `off`: see above")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--compare", action="store_true", help="answer without StepFlow first, and show where the answers part"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the answer, and what StepFlow did."""
    is_on = args.stepflow != "off"
    sampling = sampling_of(args)
    _check(args, is_on)
    stepflow = find_stepflow(args.stepflow) if is_on else None
    prompt = _read_prompt(args)
    if args.model == "reasoner" and not args.no_chat_template:
        from hf_stepflow.reasoner.language import check_readable

        check_readable(prompt)
    from hf_stepflow.evaluation.sampler import Sampler
    from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
    from hf_stepflow.runtime.repository import settings_on
    from hf_stepflow.runtime.step_detector import StepVocabulary
    from hf_stepflow.runtime.tokenization_stepflow import end_of_turn_ids

    from .terminal import StepPrinter, answer, first_difference

    model, tokenizer = load(args)
    ids = _encode(model, tokenizer, prompt, args)
    ends = end_of_turn_ids(model, tokenizer)
    if is_on:
        StepFlowModelForCausalLM.attach(model, stepflow, tokenizer=tokenizer)
        vocabulary = model.stepflow_runtime.rules.vocabulary
    else:
        vocabulary = StepVocabulary.from_tokenizer(tokenizer, settings_on(model, None)[0], end_of_turn_ids=ends)
    if not args.json:
        sampling["streamer"] = StepPrinter(tokenizer, vocabulary, ends)
    sampler = Sampler(model, tokenizer, vocabulary, args.max_new_tokens, sampling)
    answers = {}
    for name in _NAMES if args.compare else ["stepflow" if is_on else "base"]:
        if args.compare and not args.json:
            print(_NAMES[name])
        answers[name] = last = answer(sampler, ids, name == "stepflow", args.seed)
        if not args.json:
            print(f"\n{_length(last)}\n")
    lines = [one.lines for one in answers.values()]
    first = first_difference(*lines) if args.compare else None
    if args.json:
        settings = model.stepflow_runtime.settings.to_dict() if is_on else None
        data = {"model": args.model, "prompt": prompt, "settings": settings}
        found = {name: _data(one, tokenizer, ends) for name, one in answers.items()}
        data |= {**found, "first_difference": first} if args.compare else found[name]
        print(json.dumps(data, indent=2))
        return 0
    if args.compare:
        print(f"{_difference(first, *lines)}\n")
    print(_effect(last, args.model) if is_on else "StepFlow was off.")
    return 0


def _check(args: argparse.Namespace, is_on: bool) -> None:
    """Refuses arguments that contradict each other."""
    if (args.prompt is None) == (args.prompt_file is None):
        raise StepFlowInputError(
            "expected one of --prompt and --prompt-file, got " + ("neither" if args.prompt is None else "both"),
            hint="--prompt TEXT, --prompt-file FILE, or --prompt - for the standard input",
        )
    if args.system is not None and args.no_chat_template:
        raise StepFlowInputError("--system needs the chat template", hint="leave out --no-chat-template or --system")
    if args.compare and not is_on:
        raise StepFlowInputError("--compare needs StepFlow, and --stepflow is off", hint="leave one of them out")


def _read_prompt(args: argparse.Namespace) -> str:
    """Reads the prompt, without the line ends after it."""
    source = "--prompt"
    try:
        if "-" in (args.prompt, args.prompt_file):
            source, prompt = "the standard input", sys.stdin.read()
        elif args.prompt_file is not None:
            source, prompt = repr(args.prompt_file), Path(args.prompt_file).read_text(encoding="utf-8-sig")
        else:
            prompt = args.prompt
        prompt.encode()  # fails if an argument was not UTF-8
    except (OSError, UnicodeError) as error:
        raise StepFlowFileError(
            f"the prompt cannot be read from {source}: {error}", hint="it has to be text in UTF-8"
        ) from error
    if not prompt.strip():
        raise StepFlowInputError(f"the prompt is empty: {source} holds no text", hint="ask something")
    return prompt.rstrip("\n")


def _encode(model: Any, tokenizer: Any, prompt: str, args: argparse.Namespace) -> list[int]:
    """Encodes the prompt, and checks that the model has positions for it and the answer."""
    from jinja2 import TemplateError

    from hf_stepflow.prompts import encode_prompt

    try:
        if args.no_chat_template:
            ids = tokenizer.encode(prompt)
        else:
            ids = encode_prompt(tokenizer, prompt, system=args.system)
    except TemplateError as error:
        hint = "leave out --system" if args.system is not None else "--no-chat-template passes the prompt on as it is"
        raise StepFlowInputError(f"the chat template of {args.model!r} refuses: {error}", hint=hint) from error
    if not ids:
        raise StepFlowInputError("the prompt has no tokens", hint="ask something")
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is not None and len(ids) + args.max_new_tokens > room:
        raise StepFlowInputError(
            f"the prompt has {len(ids)} tokens and --max-new-tokens allows {args.max_new_tokens} more; this model has "
            f"{room} positions",
            hint=f"--max-new-tokens {room - len(ids)}" if room > len(ids) else "a shorter prompt",
        )
    return ids


def _data(answer: "Answer", tokenizer: Any, ends: list[int]) -> dict[str, Any]:
    """Returns an answer as JSON-ready data; its text ends before the end of the turn."""
    from hf_stepflow.runtime.report import FlowReport

    response = answer.response
    ids = response.ids[:-1] if response.ids[-1] in ends else response.ids
    return {
        "text": tokenizer.decode(ids),
        "summary": response.summary.strip(),
        "steps": [{"label": step.label, "index": step.index, "text": step.text} for step in answer.steps],
        "tokens": len(response.ids),
        "seconds": round(answer.seconds, 3),
        "is_finished": response.is_finished,
        "report": None if response.report is None else FlowReport([response.report]).to_dict(),
    }


def _length(answer: "Answer") -> str:
    """Says how long an answer is, and whether it is complete."""
    tokens = len(answer.response.ids)
    text = f"{tokens} tokens in {answer.seconds:.1f} s"
    if not answer.response.is_finished:
        return f"{text}; cut off by --max-new-tokens"
    return text if answer.response.is_closed else f"{text}; ended before its summary"


def _difference(first: int | None, base: list[str], other: list[str]) -> str:
    if first is None:
        return f"No difference: {len(base)} steps, all the same."
    sides = [steps[first] if first < len(steps) else "(has ended)" for steps in (base, other)]
    lines = [f"  {name:<13}  {step}" for name, step in zip(_NAMES.values(), sides, strict=True)]
    return "\n".join([f"First difference: step {first + 1}", *lines])


def _effect(answer: "Answer", model: str) -> str:
    """Says what StepFlow did, or why it did nothing."""
    from hf_stepflow.runtime.report import FlowReport

    from .terminal import effect_of

    report = answer.response.report
    if report is None:
        return "StepFlow had nothing to do: its settings ask for nothing."
    if any(step.label == "thinking" for step in report.steps):
        return effect_of(FlowReport([report]))
    return (
        "StepFlow had nothing to do: no thinking was found.\n"
        f"`hf-stepflow doctor {model}` shows the markers of thinking; implicit_thinking=true is for models without."
    )
