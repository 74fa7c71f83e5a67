"""Writes the README's table of what helps and harms, and tables of docs/evidence.md, from outputs of benchmarks.

`python -m scripts.evidence`, which `make docs` runs.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import qwen_coder, reasoner_rivals
from hf_stepflow.evaluation.result import amount, percent
from hf_stepflow.evaluation.statistics import Estimate, adjust
from hf_stepflow.reasoner.levels import LEVELS

from .pages import write_pages
from .performance import ROOT, table

BENCHMARKS = ROOT / "benchmarks"
RIVAL_LEVELS = [level for level in LEVELS if (BENCHMARKS / "reasoner_rivals" / f"{level}.json").exists()]
REASONER, SMOLLM2, QWEN = "reasoner", "SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct"

# Model, problems and settings of the README's rows, which stand for those of docs/evidence.md and docs/calibration.md.
SHOWN = (
    (REASONER, "chains-7", "paper"),
    (f"{REASONER}, seed 1", "chains-7", "paper"),
    (f"{REASONER}, seed 2", "chains-7", "paper"),
    (REASONER, "errands-30", "paper"),
    (REASONER, "errands-180", "paper"),
    (f"{REASONER}, seed 1", "errands-60", "paper"),
    (f"{REASONER}, seed 2", "errands-60", "paper"),
    (REASONER, "held-out chains", "calibrated"),
    (REASONER, "chains-7", "calibrated"),
    (REASONER, "errands-120", "calibrated"),
    (SMOLLM2, "GSM8K", "paper"),
    *((QWEN, "GSM8K", settings) for settings in ("paper", "OEB only", "sink_tokens 4")),
)

Found = tuple[int, float, list[float], float]
"""n, the base's share, the difference with its interval, and the p-value, adjusted over the table that it is from."""


def results() -> str:
    """The README's table."""
    rows = []
    for model, problems, settings in SHOWN:
        n, base, delta, p_value = found_in(model, problems, settings)
        verdict = ("helps" if delta[0] > 0 else "harms") if p_value < 0.05 else "not measurable"
        name = problems if problems in ("GSM8K", "held-out chains") else f"`{problems}`"
        rows.append((model, name, settings, f"{n:,}", f"{100 * base:.1f}", points(delta), verdict))
    return table("model | problems | settings | n | base, % | difference, points | verdict", rows)


def found_in(model: str, problems: str, settings: str) -> Found:
    """Finds a row of the README in the outputs."""
    if model == QWEN:
        compared = [(run, one) for run in qwen_coder.gsm8k_runs() for one in run["comparisons"]]
        p_values = adjust([one["paired"]["p_value"] for _, one in compared])
        (place,) = [place for place, (_, one) in enumerate(compared) if one["name"] == settings]
        run, one = compared[place]
        return _of_comparison(one["paired"], run["arms"][0]["accuracy"]["value"], p_values[place])
    if model == SMOLLM2:
        run = read("smollm2_gsm8k.json")
        paired = run["comparisons"][0]["paired"]
        return _of_comparison(paired, run["arms"][0]["accuracy"]["value"], paired["p_value"])
    if problems == "held-out chains":
        measured = read("reasoner_calibration/result.json")["measured"]
        return _of_comparison(measured, measured["base"]["value"], measured["p_value"])
    if settings == "calibrated":
        rows = [(one["level"], one, one) for one in read("reasoner_calibration/difficulties.json")["levels"]]
    elif "seed" in model:
        row = read(f"reasoner_evidence/{model.partition(', ')[2].replace(' ', '-')}/traces-{problems}.json")
        rows = [(problems, row, row["arms"]["paper"])]
    else:
        files = sorted((BENCHMARKS / "reasoner_evidence").glob("traces-*.json"))
        levels = [json.loads(file.read_text()) for file in files]
        rows = [
            (one["level"] if name == "paper" else name, one, arm)
            for one in levels
            for name, arm in one["arms"].items()
        ]
    adjusted = adjust([arm["p_value"] for _, _, arm in rows])
    (place,) = [place for place, (name, _, _) in enumerate(rows) if name == problems]
    _, row, arm = rows[place]
    return row["n"], row["base"][0], arm["delta"], adjusted[place]


def _of_comparison(paired: dict[str, Any], base: float, p_value: float) -> Found:
    return paired["problems"], base, [paired["delta"][name] for name in ("value", "low", "high")], p_value


def read(name: str) -> dict[str, Any]:
    """An output of a benchmark."""
    found: dict[str, Any] = json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))
    return found


def helps() -> str:
    """The paper's settings on every model."""
    rows = [row for row in SHOWN if row[2] == "paper"]
    lines = []
    for model, problems, settings in rows:
        n, base, delta, p_value = found_in(model, problems, settings)
        lines.append((model, problems, f"{n:,}", f"{100 * base:.1f}", points(delta), f"{p_value:.2g}"))
    return table("model | problems | n | base, % | difference, points | p (Holm)", lines)


def where() -> str:
    """The paper's settings on the reasoner, level by level."""
    lines = []
    for level in LEVELS:
        traces = read(f"reasoner_evidence/traces-{level}.json")
        answers = read(f"reasoner_evidence/generation-{level}.json")
        delta = answers["comparisons"][0]["paired"]["delta"]
        lines.append(
            (
                f"`{level}`",
                f"{traces['tokens']:.0f}",
                f"{100 * traces['base'][0]:.1f}",
                points(traces["arms"]["paper"]["delta"]),
                points([delta[name] for name in ("value", "low", "high")]),
            )
        )
    return table("level | tokens of a trace | base, % | exact traces, points | answers, points", lines)


def damage() -> str:
    """Damage of the paper's settings, on every model where it was measured."""
    runs = [(REASONER, level, read(f"reasoner_rivals/{level}.json")) for level in RIVAL_LEVELS]
    runs += [(QWEN, "GSM8K", read("qwen_coder/gsm8k.json"))]
    moved = qwen_coder.read("kl")["arms"]["paper"]
    lines = []
    for model, problems, run in runs:
        base, one = run["damage"][0], next(arm for arm in run["damage"] if arm["name"] == "paper")
        kl = one["kl"] if model == REASONER else moved
        shares = (
            f"{100 * base[name]['value']:.1f} / {100 * one[name]['value']:.1f}" for name in ("loop_rate", "unfinished")
        )
        lines.append(
            (
                model,
                problems,
                "" if one["harm_rate"] is None else percent(Estimate(**one["harm_rate"])),
                f"x{amount(Estimate(**one['length']), 2)}",
                *shares,
                f"{kl['median']:.1g} / {kl['high']:.1g}",
            )
        )
    head = "model | problems | breaks, % | length | loops, base / paper, % | unfinished, base / paper, %"
    return table(f"{head} | KL, median / p95", lines)


def against() -> str:
    """StepFlow and its rivals, in points, on the problems that both have answered."""
    runs = {level: [read(f"reasoner_rivals/{level}.json")] for level in RIVAL_LEVELS}
    runs["GSM8K, 1.5B"] = qwen_coder.gsm8k_runs()
    found = {
        name: {one["name"]: one["paired"]["delta"] for run in some for one in run["comparisons"]}
        for name, some in runs.items()
    }
    arms = ("paper", "instaboost", "length temperature", "spotlight", "pasta")
    cells = ((arm, *(_points_of(own.get(arm)) for own in found.values())) for arm in arms)
    return table(" | ".join(["arm", *found]), cells)


def _points_of(delta: dict[str, float] | None) -> str:
    return "" if delta is None else points([delta[name] for name in ("value", "low", "high")])


def mechanism() -> str:
    """One part of the method at a time, on two levels of the reasoner."""
    levels = ("chains-7", "errands-180")
    runs = [read(f"reasoner_evidence/traces-{level}.json")["arms"] for level in levels]
    arms = ("paper", "OEB only", "SMI only", 'scope "step"', "OEB in the middle", "SMI in the middle")
    cells = ((arm, *(points(run[arm]["delta"]) for run in runs)) for arm in arms)
    return table(" | ".join(["arm", *(f"`{level}`" for level in levels)]), cells)


def points(delta: list[float]) -> str:
    """A difference with its interval, in points."""
    value, low, high = (100 * one for one in delta)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def rivals() -> str:
    """The rivals on the reasoner."""
    return reasoner_rivals.table(read(f"reasoner_rivals/{level}.json") for level in RIVAL_LEVELS)


PAGES: dict[Path, dict[str, Any]] = {
    ROOT / "README.md": {"results": results},
    ROOT / "docs" / "evidence.md": {
        "helps": helps,
        "where": where,
        "damage": damage,
        "against": against,
        "mechanism": mechanism,
        "rivals": rivals,
        "qwen gsm8k": qwen_coder.gsm8k_table,
        "rounding": lambda: textwrap.fill(qwen_coder.rounding(), 119),
    },
}


if __name__ == "__main__":
    write_pages(PAGES)
