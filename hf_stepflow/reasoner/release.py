"""Makes the model folder that the package ships from a finished training run: weights, tokenizer, log, accuracy, card.

`python -m hf_stepflow.reasoner.release RUN [RUN ...]`: the first run is shipped, the others are reported beside it.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError

from . import FOLDER
from .levels import LEVELS, problems_of
from .prompts import encode_problem
from .train import LONGEST_COUNTING, STAGES, Recipe, build_model
from .vocabulary import build_tokenizer

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

* **chains**: quantities linked by shuffled premises among distractors, worked out digit by digit. `chains-8`: eight
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

The aim is above 95 % at the easiest level of each family: {aim}.

## Training

`python -m hf_stepflow.reasoner.train --seed {seed}`, in two stages, {minutes:.0f} minutes altogether on two shared CPU
cores, float32, Muon and AdamW, about {batch:,} tokens a step, linear decay to zero at the planned end of each stage:

1. {first:,} steps on chains and on holdings (sums of what is looked up by two keys). The lookups by two keys were not
   learnt: a whole right trace in 18 % of 400 such problems. Counting and following a plan were.
2. {second:,} steps on chains and errands, from the weights of the first, rounded to bfloat16.

The log is `training_log.jsonl`; its last line: `{last}`.
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hf_stepflow.reasoner.release", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished training runs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the model (default: the package's own)")
    parser.add_argument("--problems", type=int, default=400, help="of each level, for the card (default: 400)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = build_tokenizer()
    accuracies = []
    for number, run in enumerate(args.runs):
        model, recipe, log, seconds = load_run(run, tokenizer)
        if number == 0:
            shipped = model, recipe, log, seconds
        accuracies.append((recipe.seed, measure(model, tokenizer, args.problems)))
    write(args.out, tokenizer, *shipped, accuracies, args.problems)


def load_run(run: Path, tokenizer: Any) -> tuple[Any, Recipe, list[dict[str, Any]], float]:
    """The model of a finished run in bfloat16, the recipe of its last stage, and log and seconds of all stages.

    Raises:
        StepFlowInputError: the run is not finished.
    """
    from safetensors import safe_open

    log = [
        {"stage": number, **json.loads(line)}
        for number, stage in enumerate(STAGES, 1)
        for line in (run / stage / "log.jsonl").read_text().splitlines()
    ]
    with safe_open(run / STAGES[-1] / "checkpoint.safetensors", "pt") as file:
        about = file.metadata()
        recipe = Recipe(**json.loads(about["recipe"]))
        if int(about["step"]) != recipe.steps:
            raise StepFlowInputError(
                f"{run} has come to step {about['step']} of {recipe.steps}", hint="train it to its end first"
            )
        model = build_model(recipe, tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}").to(torch.bfloat16))
    last_lines = {line["stage"]: line for line in log}
    seconds = sum(line["seconds"] for line in last_lines.values())
    return model.eval(), recipe, log, float(seconds)


def measure(model: Any, tokenizer: Any, number: int) -> dict[str, tuple[int, float]]:
    """{level: (exact traces, mean tokens of a response)} on the calibration split."""
    from hf_stepflow.evaluation.scoring import score_traces

    found = {}
    for level in LEVELS:
        rows = [encode_problem(tokenizer, problem) for problem in problems_of(level, "calibration", number)]
        scores = score_traces(model, rows)
        found[level] = sum(score.exact for score in scores), sum(score.tokens for score in scores) / number
        print(f"{level:<14} {found[level][0] / number:.3f}  {found[level][1]:.0f} tokens", flush=True)
    return found


def write(
    out: Path,
    tokenizer: Any,
    model: Any,
    recipe: Recipe,
    log: list[dict[str, Any]],
    seconds: float,
    accuracies: list[tuple[int, dict[str, tuple[int, float]]]],
    number: int,
) -> None:
    """Writes the model folder anew."""
    from hf_stepflow.evaluation.result import percent
    from hf_stepflow.evaluation.statistics import proportion

    if out.exists() and any(out.iterdir()) and not (out / "training_log.jsonl").exists():
        raise StepFlowInputError(f"{out} holds something that is no reasoner", hint="choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.max_new_tokens = 4096
    config._from_model_config = False  # else its file would be read without what is set here
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    names = "".join(f" seed {seed} |" for seed, _ in accuracies)
    rows = [f"| level | tokens |{names}", "|---|---|" + "---|" * len(accuracies)]
    for level in LEVELS:
        cells = [proportion(found[level][0], number) for _, found in accuracies]
        texts = "".join(f" {percent(one)} |" for one in cells)
        rows.append(f"| {level} | {accuracies[0][1][level][1]:.0f} |{texts}")
    card = _CARD.format(
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        layers=recipe.layers,
        width=recipe.hidden_size,
        sentences=LONGEST_COUNTING,
        n=number,
        table="\n".join(rows),
        aim=_aim(accuracies[0][1], number),
        seed=recipe.seed,
        first=Recipe.stages(recipe.seed)[0].steps,
        second=recipe.steps,
        batch=recipe.batch_tokens,
        minutes=seconds / 60,
        last=json.dumps(log[-1]),
    )
    (out / "README.md").write_text(card)
    exact = {level: found[0] for level, found in accuracies[0][1].items()}
    (out / "accuracy.json").write_text(
        json.dumps({"split": "calibration", "n": number, "exact": exact}, indent=1) + "\n"
    )


def _aim(found: dict[str, tuple[int, float]], number: int) -> str:
    """Whether the easiest levels are where they should be."""
    easiest = {level.partition("-")[0]: level for level in reversed(LEVELS)}.values()
    missed = [level for level in easiest if found[level][0] <= 0.95 * number]
    return "missed at " + ", ".join(missed) if missed else "reached"


if __name__ == "__main__":
    main()
