"""Makes the shipped model folder from a finished training run: weights, tokenizer, log, accuracy and card.

`python -m hf_stepflow.reasoner.release RUN [RUN ...]` ships the first run and reports the others in its card. With
`--keep` the shipped weights stay, and the card reports all runs beside them.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError

from . import FOLDER
from .levels import LEVELS, problems_of
from .prompts import build_tokenizer, encode_problem
from .train import LONGEST_COUNTING, Recipe, build_model

_REACHED = "reached"

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [reasoning, tiny, stepflow]
---

# The embedded reasoner of hf-stepflow

A {millions:.2f} million parameter model (Qwen3 architecture, {layers} layers, width {width}) that reasons in steps
about two families of invented problems. It exists so that StepFlow can be tried and measured anywhere, offline, in
seconds. It knows nothing else, and what helps or harms it need not help or harm a real model.

* **chains**: quantities linked by shuffled premises among distractors, worked out digit by digit. `chains-7`: seven
  quantities must be known. Trained on up to six.
* **errands**: chains of five quantities with counting in between, so that premises are read early and needed late.
  `errands-60`: about 60 sentences of counting. Trained on up to {sentences}.

```python
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.reasoner.levels import problems_of

model, tokenizer = load_reasoner()
problem = problems_of("chains-4", "test", 1)[0]
```

## Accuracy by difficulty

Share of problems whose whole right trace greedy decoding writes (teacher-forced, float32 arithmetic on the shipped
bfloat16 weights), on {n} problems each of the **calibration** split; 95 % Wilson intervals. No choice was made on the
test split.

{table}
{beside}
The aim is above 95 % at the easiest level of each family: {aim}.

## Training

`python -m hf_stepflow.reasoner.train --seed {seed} --out FOLDER`, {minutes:.0f} minutes on two shared CPU cores:
{steps:,} steps on chains and errands alike, float32, Muon and AdamW, about {batch:,} tokens a step, linear decay to
zero at the planned end. It starts with heads that look at the token before (`hf_stepflow/reasoner/initial.py`).

The log is `training_log.jsonl`; its last line: `{last}`.
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        model: The model, float32, with its weights rounded to bfloat16.
        recipe: Its recipe.
        log: The lines of its log.
    """

    model: Any
    recipe: Recipe
    log: list[dict[str, Any]]


# {level: (exact traces, mean tokens of a response)}
Accuracy = dict[str, tuple[int, float]]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m hf_stepflow.reasoner.release", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished training runs")
    parser.add_argument("--keep", action="store_true", help="keep the shipped weights, and only write the card anew")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the model (default: the package's own)")
    parser.add_argument("--problems", type=int, default=400, help="problems of each level for the card (default: 400)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(2)
    tokenizer = build_tokenizer()
    runs = [load_shipped(args.out)] if args.keep else []
    runs += [load_run(run, tokenizer) for run in args.runs]
    accuracies = []
    for run in runs:
        print(f"seed {run.recipe.seed}", flush=True)
        accuracies.append(measure(run.model, tokenizer, args.problems))
    if not args.keep:
        write_model(args.out, tokenizer, runs[0])
    write_card(args.out, runs, accuracies, args.problems)


def load_run(folder: Path, tokenizer: Any) -> Run:
    """Loads a run from the folder of its checkpoint and log.

    Raises:
        StepFlowInputError: The folder holds no run, or the run is not finished.
    """
    from safetensors import safe_open

    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        raise StepFlowInputError(f"{folder} holds no training run", hint="give the --out folder of a training")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    with safe_open(checkpoint, "pt") as file:
        about = file.metadata()
        recipe = Recipe(**json.loads(about["recipe"]))
        if int(about["step"]) != recipe.steps:
            raise StepFlowInputError(
                f"{folder} is at step {about['step']} of {recipe.steps}", hint="finish the training first"
            )
        model = build_model(recipe, tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}").to(torch.bfloat16))
    return Run(model.eval(), recipe, log)


def load_shipped(folder: Path) -> Run:
    """Loads the run behind a released model's folder."""
    from transformers import AutoModelForCausalLM

    seed = json.loads((folder / "accuracy.json").read_text())["seed"]
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Run(model.eval(), Recipe(seed=seed), log)


def measure(model: Any, tokenizer: Any, number: int) -> Accuracy:
    """Measures the accuracy at every level, on `number` problems each of the calibration split."""
    from hf_stepflow.evaluation.scoring import score_traces

    found = {}
    for level in LEVELS:
        rows = [encode_problem(tokenizer, problem) for problem in problems_of(level, "calibration", number)]
        scores = score_traces(model, rows)
        found[level] = sum(score.exact for score in scores), sum(score.tokens for score in scores) / number
        print(f"{level:<14} {found[level][0] / number:.3f}  {found[level][1]:.0f} tokens", flush=True)
    return found


def write_model(out: Path, tokenizer: Any, run: Run) -> None:
    """Writes the model folder anew, without its card."""
    if out.exists() and any(out.iterdir()) and not (out / "training_log.jsonl").exists():
        raise StepFlowInputError(f"{out} holds something other than a reasoner", hint="choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    config = run.model.generation_config
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.max_new_tokens = 4096
    config._from_model_config = False  # otherwise loading ignores the values set here
    run.model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.log))


def write_card(out: Path, runs: list[Run], accuracies: list[Accuracy], number: int) -> None:
    """Writes the card and accuracy.json for the first run, which is shipped, and for the others."""
    from hf_stepflow.evaluation.result import percent
    from hf_stepflow.evaluation.statistics import proportion

    shipped = runs[0]
    names = "".join(f" {_name(run, shipped)} |" for run in runs)
    rows = [f"| level | tokens |{names}", "|---|---|" + "---|" * len(runs)]
    for level in LEVELS:
        cells = [proportion(found[level][0], number) for found in accuracies]
        texts = "".join(f" {percent(one)} |" for one in cells)
        rows.append(f"| {level} | {accuracies[0][level][1]:.0f} |{texts}")
    card = _CARD.format(
        millions=sum(parameter.numel() for parameter in shipped.model.parameters()) / 1e6,
        layers=shipped.recipe.layers,
        width=shipped.recipe.hidden_size,
        sentences=LONGEST_COUNTING,
        n=number,
        table="\n".join(rows),
        beside=_beside(runs, accuracies, number),
        aim=_aim(accuracies[0], number),
        seed=shipped.recipe.seed,
        steps=shipped.recipe.steps,
        batch=shipped.recipe.batch_tokens,
        minutes=shipped.log[-1]["seconds"] / 60,
        last=json.dumps(shipped.log[-1]),
    )
    (out / "README.md").write_text(card)
    exact = [
        {"seed": run.recipe.seed, "exact": {level: found[level][0] for level in LEVELS}}
        for run, found in zip(runs, accuracies, strict=True)
    ]
    accuracy = {"split": "calibration", "n": number, **exact[0], "others": exact[1:]}
    (out / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")


def _beside(runs: list[Run], accuracies: list[Accuracy], number: int) -> str:
    """Returns the card's section on the runs that are not shipped."""
    shipped, *others = runs
    if not others:
        return ""
    lines = [
        "",
        f"Seed {shipped.recipe.seed} is shipped: the recipe was found on it, before the others were trained. By the",
        "same command, each in one run:",
        "",
    ]
    for run, found in zip(others, accuracies[1:], strict=True):
        lines.append(f"* {_name(run, shipped)}: the aim below is {_aim(found, number)}")
    reached = sum(_aim(found, number) == _REACHED for found in accuracies)
    if reached < len(runs):
        lines += [
            "",
            f"So {reached} of {len(runs)} runs learnt the task: the recipe works by chance, and the command may not",
            "make this model again on another machine, where rounding differs.",
        ]
    return "\n".join([*lines, ""])


def _name(run: Run, shipped: Run) -> str:
    again = " again" if run is not shipped and run.recipe.seed == shipped.recipe.seed else ""
    return f"seed {run.recipe.seed}{again}"


def _aim(found: Accuracy, number: int) -> str:
    """Says whether the easiest level of each family reached the aim."""
    easiest = {level.partition("-")[0]: level for level in reversed(LEVELS)}.values()
    missed = [level for level in LEVELS if level in easiest and found[level][0] <= 0.95 * number]
    return "missed at " + ", ".join(missed) if missed else _REACHED


if __name__ == "__main__":
    main()
