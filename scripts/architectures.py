"""Writes docs/architectures.md: checks every causal model type of transformers by the sweep of the tests.

`python -m scripts.architectures` checks all types and writes the page, which takes minutes.
`python -m scripts.architectures llama qwen3` checks these two and prints their rows.
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers

from tests.support.flow import encode
from tests.support.sweep import QUESTION, REST, SweepResult, check_model_type
from tests.support.tiny_models import causal_model_types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
IS_RELEASE_OF_PAGE = f"in transformers {transformers.__version__}:" in PAGE.read_text(encoding="utf-8")
TABLE_HEAD = """| model type | status | base implementation | layers | reason or note |
|---|---|---|---|---|
"""
HEAD = """# Model types

Every model type of `AutoModelForCausalLM` in transformers {version}: {supported} are supported, {refused} are refused,
{unbuilt} could not be built small enough to check. `make docs` writes this page. StepFlow recognises a model by what
its code does, not by its name, so it treats other releases of transformers the same way.

## How a type is checked

Each supported type passed these checks on a tiny random model (four layers, float32) with a trace of {tokens} tokens:
a question, three thinking steps and a summary. The relative tolerance is 1e-5.

* **Neutral.** With a floor too low to move anything, all layers give the base model's logits in the forward pass and
  in decode: softcap, sinks, biases, windows, latent and grouped heads work as in the base.
* **Off.** `disable_stepflow()`, `tau_max = 0` with `alpha = 0`, and `detach_stepflow()` each give the base model bit
  for bit.
* **On.** With `tau_max = 0.3` and `alpha = 0.2` on the outer quarters of the layers, every attention row equals the
  Odds-Equal Bridge computed from the base's row. The previous step's mean is added to the head outputs where a step
  starts, and nowhere else. The report gives the same numbers.
* **Decode.** Token-by-token decode with a cache equals the forward pass.
* **Padding.** A row padded on the left equals the same row alone.

A note says where the base model itself misses the tolerance. `attach` refuses the other types and leaves the model
unchanged. "Layers" counts the layers of the tiny model that have softmax attention, the only ones StepFlow acts on.

## All types

"""


def table(results: list[SweepResult]) -> list[str]:
    """Returns one table row for each result, sorted by model type."""
    rows = []
    for one in results:
        note = one.reason or "; ".join(one.notes)
        rows.append(f"| {one.model_type} | {one.status} | {one.base_implementation} | {one.layers or ''} | {note} |")
    return sorted(rows)


def page(rows: list[str]) -> str:
    """Returns the page with these rows."""
    statuses = [row.split(" | ")[1] for row in rows]
    head = HEAD.format(
        version=transformers.__version__,
        supported=statuses.count("supported"),
        refused=statuses.count("refused"),
        unbuilt=statuses.count("not built"),
        tokens=len(encode(QUESTION + REST)),
    )
    return head + TABLE_HEAD + "\n".join(rows) + "\n"


def main(model_types: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    for model_type in model_types or causal_model_types():
        results.append(check_model_type(model_type))
        print(*table(results[-1:]), flush=True)
    if not model_types:
        PAGE.write_text(page(table(results)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
