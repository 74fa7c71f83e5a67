"""Writes the figures of docs/performance.md and of the README's costs from the outputs of the benchmarks.

`python -m scripts.performance`, which `make docs` runs.
"""

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .pages import write_pages

ROOT = Path(__file__).resolve().parents[1]


def rows_of(name: str, key: str) -> list[dict[str, Any]]:
    """The measurements of a benchmark; none where it has not run."""
    file = ROOT / "benchmarks" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))[key] if file.exists() else []


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ratio(row: dict[str, Any], name: str) -> str:
    """A ratio with its interval."""
    low, high = row[f"{name}_95"]
    return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"


def launches() -> str:
    """Operations of a decoded token."""
    routes = {"host": "CPU", "device": "accelerator"}
    inside = [row for row in rows_of("decode_launches", "results") if not row["first_of_step"]]
    first = {
        (row["route"], row["dtype"], row["batch"]): row
        for row in rows_of("decode_launches", "results")
        if row["first_of_step"]
    }
    return table(
        "route | dtype | batch | base | off | on | on / base | bytes | first token of a step | host reads more",
        (
            (
                routes[row["route"]],
                row["dtype"],
                str(row["batch"]),
                *(str(row[arm]["operations"]) for arm in ("base", "off", "on")),
                f"{row['ratio']:.3f}",
                f"{row['on']['bytes'] / row['base']['bytes']:.3f}",
                f"{first[row['route'], row['dtype'], row['batch']]['ratio']:.3f}",
                str(row["on"]["reads"] - row["base"]["reads"]),
            )
            for row in inside
        ),
    )


def steps() -> str:
    """Time of a decoded token."""
    rows = [row for row in rows_of("decode_overhead", "results") if row["part"] == "steps" and "skipped" not in row]
    return table(
        "dtype | context | batch | base, ms | off / base | on / base",
        (
            (
                row["dtype"],
                f"{row['context']:,}",
                "1" if row["batch"] == 1 else f"{row['batch']}, ragged",
                f"{row['median_ms']['base']:.1f}",
                ratio(row, "off_to_base"),
                ratio(row, "on_to_base"),
            )
            for row in rows
        ),
    )


def prefill() -> str:
    """Time and memory of a long pass."""
    return table(
        "tokens | base, s | on / base | peak memory, on / base | n",
        (
            (
                f"{row['length']:,}",
                f"{row['median_ms']['base'] / 1e3:.1f}",
                ratio(row, "on_to_base"),
                f"{row['peak_on_to_base']:.2f}",
                str(row["n"]),
            )
            for row in rows_of("prefill", "results")
            if row["part"] == "prefill"
        ),
    )


def calls() -> str:
    """Time of whole calls of generate."""
    rows = [row for row in rows_of("decode_overhead", "results") if row["part"] == "generate" and "skipped" not in row]
    return table(
        "batch | new tokens | base, tokens/s | on, tokens/s | off / base | on / base",
        (
            (
                str(row["batch"]),
                str(row["new_tokens"]),
                *(f"{row['tokens_per_second'][arm]:.0f}" for arm in ("base", "on")),
                ratio(row, "off_to_base"),
                ratio(row, "on_to_base"),
            )
            for row in rows
        ),
    )


def parts() -> str:
    """Where the time that `generate` takes longer goes."""
    rows = rows_of("profile_generate", "results")
    columns = [f"batch {row['batch']}, n = {row['settings']['calls']}" for row in rows]
    shares = [{name: added / row["base_us"] for name, added in row["added_us"].items()} for row in rows]
    return table(
        " | ".join(["part", *columns]),
        (
            (
                part,
                *(
                    f"{row['added_us'][part]:.0f} us, {share[part]:.1%}"
                    for row, share in zip(rows, shares, strict=True)
                ),
            )
            for part in rows[0]["added_us"]
        ),
    )


def saliency() -> str:
    """Time and memory of Step-Saliency."""
    return table(
        "tokens | time | peak memory",
        (
            (
                f"{row['tokens']:,}",
                f"{row['saliency']['time_over_plain']:.2f}",
                f"{row['saliency']['peak_bytes'] / row['plain']['peak_bytes']:.2f}",
            )
            for row in rows_of("saliency_scale", "rows")
            if "plain" in row
        ),
    )


def vllm() -> str:
    """CPU time in vLLM with StepFlow, and with the plugin alone."""
    file = ROOT / "benchmarks" / "vllm_cost.json"
    rows = []
    for name, row in json.loads(file.read_text(encoding="utf-8")).items():
        for part, meaning in (("plugin", "loaded, no settings / not loaded"), ("settings", "StepFlow on / off")):
            if part in row:
                cells = (f"{row[part][key]['median']:.2f}" for key in ("cpu", "seconds"))
                cpu = row[part]["cpu"]
                spread = f"{cpu['least']:.2f} to {cpu['most']:.2f}"
                rows.append((name, meaning, *cells, spread, str(row[part]["turns"])))
    return table("model | compared | CPU time | time | CPU time, least to most | n", rows)


def engines() -> str:
    """Tokens per second of a real model in both engines."""
    rows = []
    for engine in ("transformers", "vllm"):
        file = ROOT / "benchmarks" / "qwen_coder" / f"speed-{engine}.json"
        run = json.loads(file.read_text(encoding="utf-8"))
        speeds = [sum(one["outcomes"].values()) * one["tokens"] / one["seconds"] for one in run["arms"]]
        rows.append((engine, *(f"{speed:.0f}" for speed in speeds)))
    return table("engine | base, tokens/s | paper, tokens/s", rows)


def cost() -> str:
    """The three lines of the README."""
    steps = [row for row in rows_of("decode_overhead", "results") if row["part"] == "steps" and "skipped" not in row]
    ratios = sorted(row["on_to_base"] for row in steps)
    contexts = sorted({row["context"] for row in steps})
    calls = {row["batch"]: row for row in rows_of("decode_overhead", "results") if row["part"] == "generate"}
    made = ", ".join(f"{calls[batch]['on_to_base']:.2f} at batch {batch}" for batch in sorted(calls))
    counts = {
        (row["route"], row["first_of_step"]): row
        for row in rows_of("decode_launches", "results")
        if row["batch"] == 1 and row["dtype"] == "bfloat16"
    }
    lines = [
        f"On a CPU thread a decoded token takes {ratios[0]:.2f} to {ratios[-1]:.2f} times as long as with the base "
        f"alone, at {contexts[0]:,} to {contexts[-1]:,} tokens of context; `generate` with the embedded reasoner (1.6 "
        f"million parameters) takes {made}.",
        f"On the route of an accelerator a token starts {counts['device', False]['ratio']:.2f} times the operations, "
        "and nothing is read back. It has not run on a GPU yet.",
        "Off is off: the base's own code runs, with the same result bit for bit.",
    ]
    return "\n".join(textwrap.fill(f"* {line}", 119, subsequent_indent="  ") for line in lines)


PAGES = {
    ROOT / page: {part.__name__: part for part in own}
    for page, own in {
        "docs/performance.md": (launches, steps, calls, parts, prefill, saliency),
        "docs/serving.md": (vllm, engines),
        "README.md": (cost,),
    }.items()
}


if __name__ == "__main__":
    write_pages(PAGES)
