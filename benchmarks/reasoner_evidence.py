"""Measures what StepFlow does to the embedded reasoner, at every difficulty of both families of its problems.

Part "traces": teacher-forced scoring of exact traces on the test split, in float32, every arm on the same problems. An
arm gains a problem if greedy decoding would write the whole right trace under the arm but not under the base.
Part "mass": the attention mass that thinking tokens put on the question in the shallow quarter of the layers, by
level, separately for traces that the base gets right and traces that it gets wrong.
Part "rounding": the base in bfloat16 compared with the base in float32, by exact traces on the same problems.
Part "generation": greedy generation at the paper's settings with `evaluate`. Responses are cut at twice the length of
the level's longest right trace; a response that has not ended by then never ends.

The script keeps the results of each part and level in benchmarks/reasoner_evidence/ and does not compute them again.
With `--model` it measures a model of another seed, as `python -m hf_stepflow.reasoner.release RUN --out FOLDER` writes
it, and keeps the results in a subfolder.

Run: python -m benchmarks.reasoner_evidence [traces|mass|rounding|generation|table] [--levels ...] [--problems 1000]
    [--model FOLDER]
"""

import argparse
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.scoring import TraceScore, score_traces
from hf_stepflow.evaluation.statistics import adjust, compare, mean, proportion
from hf_stepflow.evaluation.store import machine, model_digest
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import FOLDER as SHIPPED
from hf_stepflow.reasoner.levels import LEVELS, problems_of
from hf_stepflow.reasoner.prompts import encode_problem
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM

FOLDER = Path(__file__).with_suffix("")
NO_OEB, NO_SMI = {"tau_max": 0.0}, {"alpha": 0.0}
PAPER = {"tau_max": 0.15, "alpha": 0.06}
FEWEST = 5  # traces for a published mean mass
BATCH_TOKENS = 2048  # larger batches hold more padding, which takes longer on a CPU
MIDDLE = [3, 4]  # of eight layers: the band without a mechanism in the paper
ARMS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "OEB only": PAPER | NO_SMI,
    "SMI only": PAPER | NO_OEB,
    'scope "step"': PAPER | {"bridge_scope": "step"},
    "sink_tokens 1": PAPER | {"sink_tokens": 1},
    "sink_tokens 4": PAPER | {"sink_tokens": 4},
    "OEB in the middle": PAPER | NO_SMI | {"oeb_layers": MIDDLE},
    "SMI in the middle": PAPER | NO_OEB | {"smi_layers": MIDDLE},
    "length temperature": NO_OEB | NO_SMI | {"length_temperature": 1.0, "length_temperature_base": 300},
}
HEADLINE = {"base": False, "paper": PAPER}


def about(model: Any) -> dict[str, Any]:
    """Returns the dtype and the machine, on which a result depends."""
    return {"dtype": str(model.dtype), **machine()}


@cache
def right_traces(tokenizer: Any, level: str, number: int) -> list[tuple[list[int], list[int]]]:
    """Encodes the prompt and the right response of each problem."""
    return [encode_problem(tokenizer, problem) for problem in problems_of(level, "test", number)]


@cache
def base_scores(model: Any, tokenizer: Any, level: str, number: int) -> list[TraceScore]:
    """Scores the right traces under the base."""
    return score_traces(model, right_traces(tokenizer, level, number), batch_tokens=BATCH_TOKENS)


def traces(model: Any, tokenizer: Any, level: str, number: int) -> dict[str, Any]:
    """Counts the exact traces of every arm on one level."""
    rows = right_traces(tokenizer, level, number)
    exact = {"base": [score.exact for score in base_scores(model, tokenizer, level, number)]}
    for name, settings in ARMS.items():
        exact[name] = [score.exact for score in score_traces(model, rows, settings, batch_tokens=BATCH_TOKENS)]
    base = [[one] for one in exact["base"]]
    arms = {}
    for name in ARMS:
        found = compare(base, [[one] for one in exact[name]])
        arms[name] = {
            "delta": [found.delta.value, found.delta.low, found.delta.high],
            "gained": found.gained,
            "lost": found.lost,
            "p_value": found.p_value,
            "smallest_delta": found.smallest_delta,
        }
    accuracy = proportion(sum(exact["base"]), number)
    return {
        "level": level,
        "n": number,
        "tokens": sum(len(response) for _, response in rows) / number,
        "base": [accuracy.value, accuracy.low, accuracy.high],
        "arms": arms,
    }


def mass(model: Any, tokenizer: Any, level: str, number: int) -> dict[str, Any]:
    """Measures the mass on the question in the shallow quarter, for traces that the base gets right and wrong."""
    rows = right_traces(tokenizer, level, number)
    scores = base_scores(model, tokenizer, level, number)
    end = tokenizer.convert_tokens_to_ids("</think>")
    # A floor below rounding raises nothing, so the report holds the base's own masses.
    by_trace: dict[bool, list[list[float]]] = {True: [], False: []}
    with model.use_stepflow({"tau_max": 1e-30, "alpha": 0.0}), torch.no_grad():
        for (prompt, response), score in zip(rows, scores, strict=True):
            thinking = response[: response.index(end)]
            model(torch.tensor([prompt + thinking]), use_cache=False, logits_to_keep=1)
            layers = model.stepflow_report().rows[0].layers
            by_trace[score.exact].append([layer.mass_before for layer in layers if layer.mass_before is not None])
    found: dict[str, Any] = {"level": level, "n": number, "tokens": sum(score.tokens for score in scores) / number}
    for is_right, name in ((True, "right"), (False, "wrong")):
        group = by_trace[is_right]
        layers = [mean(values) for values in zip(*group, strict=True)] if group else []
        found[name] = {"n": len(group), "layers": [[one.value, one.low, one.high] for one in layers]}
    return found


def rounding(model: Any, tokenizer: Any, level: str, number: int) -> dict[str, Any]:
    """Compares the base in bfloat16 with the base in float32."""
    rounded = StepFlowModelForCausalLM.from_pretrained(model.name_or_path, tokenizer=tokenizer, dtype="bfloat16")
    scores = base_scores(model, tokenizer, level, number), base_scores(rounded, tokenizer, level, number)
    exact, inexact = ([[score.exact] for score in found] for found in scores)
    found = compare(exact, inexact)
    delta = [found.delta.value, found.delta.low, found.delta.high]
    return {"level": level, "n": number, "delta": delta, "gained": found.gained, "lost": found.lost}


def generation(model: Any, tokenizer: Any, level: str, number: int, folder: Path) -> dict[str, Any]:
    """Generates greedily with the headline arms; continues from the responses in the folder."""
    problems = load_problems(f"reasoner:{level}", number)
    longest = max(len(response) for _, response in right_traces(tokenizer, level, number))
    out = folder / f"generation-{level}.jsonl"
    result = evaluate(model, problems, HEADLINE, batch_size=50, max_new_tokens=2 * longest, out=out)
    summary = result.to_dict()
    summary.pop("run")
    return {"level": level, "n": number, "max_new_tokens": 2 * longest, **summary}


def table(folder: Path) -> str:
    """Makes the tables of docs/evidence.md from the results in the folder."""
    known = {
        part: [_read(folder, part, level) for level in LEVELS] for part in ("traces", "mass", "rounding", "generation")
    }
    parts = []
    rows = [one for one in known["traces"] if one]
    if rows:
        parts.append(traces_table(rows))
    rows = [one for one in known["mass"] if one]
    if rows:
        lines = ["| level | tokens | right traces | layer 0 | layer 1 | wrong traces | layer 0 | layer 1 |"]
        lines.append("|---" * 8 + "|")
        for one in rows:
            cells = [one["level"], f"{one['tokens']:.0f}"]
            for name in ("right", "wrong"):
                texts = [f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in one[name]["layers"]]
                texts = texts if one[name]["n"] >= FEWEST else ["-", "-"]
                cells += [str(one[name]["n"]), *texts]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    rows = [one for one in known["rounding"] if one]
    if rows:
        lines = ["| level | n | bfloat16 against float32 | gained | lost |", "|---" * 5 + "|"]
        for one in rows:
            low, high = (100 * value for value in one["delta"][1:])
            delta = f"{100 * one['delta'][0]:+.1f} [{low:+.1f}, {high:+.1f}]"
            lines.append(f"| {one['level']} | {one['n']} | {delta} | {one['gained']} | {one['lost']} |")
        parts.append("\n".join(lines))
    rows = [one for one in known["generation"] if one]
    if rows:
        # Each arm on each level is one comparison, as in `traces_table`.
        values = adjust([arm["paired"]["p_value"] for one in rows for arm in one["comparisons"]])
        by_place = iter(values)
        lines = ["| level | n | base, % | arm | difference | gained | lost | p (Holm) | tokens | time |"]
        lines.append("|---" * 10 + "|")
        for one in rows:
            base = one["arms"][0]["accuracy"]
            for arm in one["comparisons"]:
                delta, paired = arm["paired"]["delta"], arm["paired"]
                lines.append(
                    f"| {one['level']} | {one['n']} | {_percent([base['value'], base['low'], base['high']])} | "
                    f"{arm['name']} | {100 * delta['value']:+.1f} [{100 * delta['low']:+.1f}, "
                    f"{100 * delta['high']:+.1f}] | {paired['gained']} | {paired['lost']} | "
                    f"{next(by_place):.2g} | x{arm['tokens_ratio']['value']:.2f} | "
                    f"x{arm['seconds_ratio']['value']:.2f} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def traces_table(rows: list[dict[str, Any]]) -> str:
    """Makes the table of part "traces", one row for each level.

    Each arm on each level is one comparison; Holm's adjustment covers all of them.
    """
    adjusted = iter(adjust([one["arms"][name]["p_value"] for one in rows for name in ARMS]))
    heads = ["level", "n", "tokens", "base, %", *ARMS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for one in rows:
        cells = [one["level"], str(one["n"]), f"{one['tokens']:.0f}", _percent(one["base"])]
        for name in ARMS:
            mark = "**" if next(adjusted) < 0.05 else ""
            low, high = (100 * value for value in one["arms"][name]["delta"][1:])
            cells.append(f"{mark}{100 * one['arms'][name]['delta'][0]:+.1f}{mark} [{low:+.1f}, {high:+.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f} [{100 * interval[1]:.1f}, {100 * interval[2]:.1f}]"


def _read(folder: Path, part: str, level: str) -> dict[str, Any] | None:
    path = folder / f"{part}-{level}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts",
        nargs="*",
        default=["traces", "mass", "rounding", "generation", "table"],
        help="parts to run (default: all)",
    )
    parser.add_argument("--levels", nargs="*", default=list(LEVELS), help="levels of the problems (default: all)")
    parser.add_argument("--problems", type=int, default=1000, help="problems of each level (default: 1000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the model (default: the package's)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = StepFlowModelForCausalLM.from_pretrained(args.model, tokenizer=tokenizer, dtype="float32").eval()
    seed = json.loads((args.model / "accuracy.json").read_text())["seed"]
    folder = FOLDER if args.model == SHIPPED else FOLDER / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    for part in args.parts:
        if part == "table":
            print(table(folder))
            continue
        for level in args.levels:
            known = _read(folder, part, level)
            asked = {"n": args.problems, "model": model_digest(model), "settings": ARMS}
            if known is not None and {name: known[name] for name in asked} == json.loads(json.dumps(asked)):
                continue
            kept = partial(generation, folder=folder)
            part_of = {"traces": traces, "mass": mass, "rounding": rounding, "generation": kept}[part]
            found = part_of(model, tokenizer, level, args.problems)
            text = json.dumps({**found, **asked, "about": about(model)}, indent=1)
            (folder / f"{part}-{level}.json").write_text(text + "\n")
            print(f"{part} {level} done", flush=True)


if __name__ == "__main__":
    main()
