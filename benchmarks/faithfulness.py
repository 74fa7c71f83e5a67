"""Measures which step maps name the steps that a model needs, on right and wrong traces of its own.

A model answers problems greedily; right and wrong answers that ended are taken in turn. In each trace every thinking
step is suppressed, and maps are compared with what that costs the later steps and the summary
(hf_stepflow/saliency/faithfulness.py). StepFlow is off, in float32.

Responses are kept in build/faithfulness/, and the output is written after each trace: the same command, also with more
traces, goes on where it was stopped.

Run: python -m benchmarks.faithfulness [run|table] [--traces 500]
     python -m benchmarks.faithfulness run --name NAME --model FOLDER --problems FILE --implicit-thinking --traces 50
"""

import argparse
import json
import math
import os
import statistics
import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.evaluation.result import amount
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.statistics import Estimate
from hf_stepflow.evaluation.store import machine
from hf_stepflow.problems import load_problems
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.saliency.faithfulness import RANDOM, TRUTH, Faithfulness, measure_faithfulness

FOLDER = Path(__file__).resolve().with_suffix("")
RESPONSES = FOLDER.parents[1] / "build" / FOLDER.name
LEVELS = ("reasoner:chains-7",)
KINDS = ("thinking", "summary", "thinking_size", "summary_size")
AREAS = ("deletion", "insertion")
NAMES = {
    "saliency": "Step-Saliency",
    "saliency_sum": "Step-Saliency, sum",
    "attention": "attention",
    "attention_sum": "attention, sum",
    "signed": "signed",
    "signed_sum": "signed, sum",
    RANDOM: "random order",
    TRUTH: "suppression itself",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--name", default="reasoner", help="name of the output (default: reasoner)")
    parser.add_argument("--model", help="folder or Hub id (default: the embedded reasoner)")
    parser.add_argument("--problems", nargs="+", default=list(LEVELS), help="as for `hf-stepflow eval`")
    parser.add_argument("--limit", type=int, default=800, help="problems of each source (default: 800)")
    parser.add_argument("--implicit-thinking", action="store_true", help="the model marks no thinking")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--traces", type=int, default=500, help="traces (default: 500)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = FOLDER / f"{args.name}.json"
    if args.action == "run":
        run(args, path)
    print(table(json.loads(path.read_text(encoding="utf-8"))))


def run(args: argparse.Namespace, path: Path) -> None:
    """Measures the traces that the output lacks."""
    if args.model is None:
        model, tokenizer = load_reasoner()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        settings = {"implicit_thinking": args.implicit_thinking}
        StepFlowModelForCausalLM.attach(model, settings, tokenizer=tokenizer)
    asked = {
        name: getattr(args, name) for name in ("model", "problems", "limit", "implicit_thinking", "max_new_tokens")
    }
    found: dict[str, Any] = {"run": asked | {"model": args.model or "the embedded reasoner"}, "traces": []}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["run"] != found["run"]:
            sys.exit(f"{path} holds another run, {known['run']}: choose another --name")
        found = known
    traces = answers(args, model, tokenizer)
    done = {one["id"] for one in found["traces"]}
    for number, (result, prompt) in enumerate(traces[: args.traces]):
        if result["problem"] in done:
            continue
        with model.disable_stepflow():
            judged = measure_faithfulness(
                model,
                prompt + result["ids"],
                tokenizer=tokenizer,
                config=model.stepflow_runtime.rules.vocabulary,
                prompt_length=len(prompt),
                seed=number,
            )
        row = {"id": result["problem"], "right": result["right"], "tokens": len(prompt) + len(result["ids"])}
        found["traces"].append(row | numbers(judged))
        found["layers"], found["about"] = judged.layers, machine()
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text("{" + ",\n".join(f"{json.dumps(key)}: {lines(value)}" for key, value in found.items()) + "}\n")
        os.replace(part, path)
        print(f"{number + 1} of {min(args.traces, len(traces))}", file=sys.stderr, flush=True)


def lines(value: Any) -> str:
    """JSON with a line for each trace."""
    return "[\n" + ",\n".join(map(json.dumps, value)) + "]" if isinstance(value, list) else json.dumps(value)


def answers(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[tuple[dict[str, Any], list[int]]]:
    """Answers the problems; returns results with their prompts, right and wrong ones in turn."""
    groups: dict[bool, list[tuple[dict[str, Any], list[int]]]] = {True: [], False: []}
    for source in args.problems:
        problems = load_problems(source, args.limit)
        out = RESPONSES / f"{args.name}-{Path(source).stem.replace(':', '-')}.jsonl"
        result = evaluate(
            model,
            problems,
            {"base": False},
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            out=out,
            keep_ids=True,
        )
        prompts = {problem.id: encode_prompt(tokenizer, problem.prompt) for problem in problems}
        for (problem, _), one in result.responses("base").items():
            if one["outcome"] in ("correct", "wrong"):
                groups[one["right"]].append((one, prompts[problem]))
    pairs = chain.from_iterable(zip_longest(groups[True], groups[False]))
    return [one for one in pairs if one is not None]


def numbers(judged: Faithfulness) -> dict[str, Any]:
    """The result of one trace as JSON-ready data, NaN as None."""

    def short(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 3)

    return {
        "steps": len(judged.effects),
        **{kind: {name: [short(one) for one in row] for name, row in getattr(judged, kind).items()} for kind in KINDS},
        **{kind: {name: short(one) for name, one in getattr(judged, kind).items()} for kind in AREAS},
    }


def table(found: dict[str, Any]) -> str:
    """Makes the tables for docs/saliency.md."""
    return "\n\n".join([by_map(found["traces"]), by_layer(found["traces"], found["layers"])])


def by_map(traces: list[dict[str, Any]]) -> str:
    """One line for each map: rank correlations and areas."""
    heads = "map,thinking,summary,thinking: size,summary: size,deletion,insertion".split(",")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, title in NAMES.items():
        cells = ["" if name == TRUTH else cell([one[kind][name][-1] for one in traces]) for kind in KINDS]
        cells += [cell([one[kind][name] for one in traces]) for kind in AREAS]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    cells = [cell([difference(one[kind], -1) for one in traces]) for kind in KINDS]
    cells += [cell([difference(one[kind]) for one in traces]) for kind in AREAS]
    rows.append(f"| attention - Step-Saliency, paired | {' | '.join(cells)} |")
    return "\n".join(rows)


def difference(row: dict[str, Any], place: int | None = None) -> float | None:
    """Attention minus Step-Saliency, where both are known."""
    both = [row[name] if place is None else row[name][place] for name in ("attention", "saliency")]
    return None if None in both else both[0] - both[1]


def by_layer(traces: list[dict[str, Any]], layers: list[int]) -> str:
    """One line for each layer: the mean correlations of Step-Saliency and of attention."""
    columns = [(kind, name) for kind in KINDS for name in ("saliency", "attention")]
    heads = [f"{kind.replace('_', ': ')}, {NAMES[name]}" for kind, name in columns]
    rows = [f"| layer | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for place, layer in enumerate(layers):
        known = [[one[kind][name][place] for one in traces] for kind, name in columns]
        means = [[value for value in values if value is not None] for values in known]
        rows.append(f"| {layer} | {' | '.join(f'{sum(one) / len(one):.2f}' if one else '' for one in means)} |")
    return "\n".join(rows)


def cell(values: list[float | None]) -> str:
    """A mean over traces with its interval by the t distribution."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return ", ".join(f"{value:.2f}" for value in known)
    mean, error = statistics.mean(known), statistics.stdev(known) / math.sqrt(len(known))
    half = float(stats.t.ppf(0.975, len(known) - 1)) * error
    return amount(Estimate(mean, mean - half, mean + half), 2)


if __name__ == "__main__":
    main()
