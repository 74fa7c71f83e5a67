"""Prints the tables of docs/calibration.md from the files of a calibration.

Run: python -m benchmarks.calibration_table benchmarks/smollm2_calibration [FOLDER ...]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_stepflow.calibration.result import FORMAT
from hf_stepflow.hub.cards import table
from hf_stepflow.runtime.errors import StepFlowFileError


def read_result(folder: Path) -> dict[str, Any]:
    """Reads the result of a calibration.

    Raises:
        StepFlowFileError: It was written in another format.
    """
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise StepFlowFileError(
            f"{folder / 'result.json'} has the format {found.get('format')!r}, expected {FORMAT!r}",
            hint="calibrate again: earlier results know no strata",
        )
    return found


def points(estimate: dict[str, Any]) -> str:
    """Formats a difference in points of accuracy with its interval."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def stages(result: dict[str, Any]) -> str:
    """Makes the table of findings, one row for each stage."""
    gate = result["gate"]
    rows = [("gate", f"{'open' if gate['is_open'] else 'closed'}: {gate['reason']}; {gate['problems']} problems")]
    if result["bands"] is not None:
        rows.append(("Step-Saliency", result["bands"]["reason"]))
    for mechanism, heads in result["heads"].items():
        chosen = ", ".join(f"layer {layer} head {head}" for layer, head in heads["chosen"]) or "none"
        found = f"{len(heads['gains'])} tried, {heads['untried']} not reached; together profit: {chosen}"
        rows.append((f"heads, {mechanism}", found))
    if result["trials"]:
        better = sum(trial["objective"] > 0 for trial in result["trials"])
        rows.append(("search", f"{len(result['trials'])} different candidates, {better} better by the proxy"))
    if result["halving"] is not None:
        rows.append(("generation", result["halving"]["reason"]))
        proxy = result["proxy_against_generation"]
        rho = proxy["spearman"]
        value = "has no value" if rho is None else f"{rho['value']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]"
        rows.append(("proxy against generation", f"rank correlation over {proxy['candidates']} candidates: {value}"))
    measured = result["measured"]
    if measured is None:
        rows.append(("verdict", f"{result['verdict']}: the empty preset; the held-out split was not touched"))
    else:
        verdict = (
            f"{result['verdict']}: {points(measured['delta'])} points on {measured['problems']} held-out problems, "
            f"{measured['gained']} gained, {measured['lost']} lost, p = {measured['p_value']:.3g}; base "
            f"{100 * measured['base']['value']:.1f} %"
        )
        rows.append(("verdict", verdict))
    return table(("stage", "found"), rows)


def strata(result: dict[str, Any]) -> str:
    """Makes the table of strata."""
    rows = [
        (
            one["name"],
            str(one["problems"]),
            f"{100 * one['base']:.1f}",
            points(one["delta"]),
            f"{one['gained']} / {one['lost']}",
            f"{one['adjusted_p_value']:.2g}",
            f"{one['harm_p_value']:.2g}",
            one["verdict"] if one["needed"] is None else f"{one['verdict']} (about {one['needed']} needed)",
        )
        for one in result["strata"]
    ]
    head = ("stratum", "n", "base, %", "difference", "gained / lost", "p (Holm)", "p of harm", "verdict")
    return table(head, rows)


def ablations(result: dict[str, Any]) -> str:
    """Makes the table that compares each ablation with the base and with the winner."""
    rows = [
        (name, str(one["base"]["problems"]), points(one["base"]["delta"]), points(one["winner"]["delta"]))
        for name, one in result["ablations"].items()
    ]
    left_out = "".join(f"\n\nLeft out, {name}: {why}." for name, why in result["left_out"].items())
    return table(("ablation", "problems", "against the base", "the winner against it"), rows) + left_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    for folder in parser.parse_args().folders:
        found = read_result(folder)
        print(f"{folder.name}, {found['seconds']:.0f} s\n\n{stages(found)}\n")
        if found["strata"]:
            print(f"{strata(found)}\n")
        if found["ablations"]:
            print(f"{ablations(found)}\n")
