"""The model of the app, its problems, and the settings that the controls give."""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_stepflow.cli.arguments import find_stepflow, load_with_stepflow
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.presets.preset import list_presets, load_preset
from hf_stepflow.problems import load_problems, reasoner_problems
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner.language import check_readable
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.settings import SETTINGS, StepFlowSettings

REASONER = "reasoner"
OWN, PAPER = "the model's own", "the paper's constants"

# What the controls show; a choice gives the other settings of the mechanisms.
CONTROLS = ("tau_max", "alpha", "oeb_layers", "smi_layers")
_SEEDS = 100_000


@dataclass(frozen=True)
class LoadedModel:
    """A model with StepFlow attached.

    Attributes:
        name: The name by which it was asked for.
        model: The model.
        tokenizer: Its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def settings(self) -> StepFlowSettings:
        """The settings that the model has of its own."""
        return self.model.stepflow_runtime.settings

    def encode(self, question: str, max_new_tokens: int) -> list[int]:
        """Encodes a question, and checks that the model can read it and has room for an answer.

        Raises:
            StepFlowInputError: The question is empty, outside the reasoner's language, or too long.
        """
        if not question.strip():
            raise StepFlowInputError("there is no question", hint="type one, or draw one")
        if self.name == REASONER:
            check_readable(question)
        ids = encode_prompt(self.tokenizer, question)
        room = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if room is not None and len(ids) + max_new_tokens > room:
            raise StepFlowInputError(
                f"the question has {len(ids)} tokens and the answer may have {max_new_tokens}; this model has {room} "
                "positions",
                hint="a shorter question, or fewer tokens",
            )
        return ids

    def chosen_settings(self, choice: str, **controls: Any) -> dict[str, Any]:
        """Returns the settings of a call: those of a choice, under those of the controls.

        Args:
            choice: `OWN`, `PAPER`, or the name of a preset, of which the mechanisms are taken; markers and step rules
                stay those of the model.
            **controls: The values of `CONTROLS`; bands as text.

        Raises:
            StepFlowError: The preset is unknown, or a setting does not fit the model.
        """
        controls |= {name: read_band(controls[name]) for name in ("oeb_layers", "smi_layers")}
        chosen = settings_of_choice(choice, self.settings) | controls
        self.model.stepflow_runtime.rules_for(self.settings.replace(**chosen))
        return chosen


def load_model(
    name: str,
    stepflow: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> LoadedModel:
    """Loads a model with StepFlow.

    Args:
        name: A folder, a Hub id, or `reasoner`.
        stepflow: The settings, as for `--stepflow` on the command line; None takes those of the repository, or `auto`.
        revision: The revision on the Hub.
        dtype: The dtype of the weights.
        device: The device, or `auto`.

    Raises:
        StepFlowError: The model cannot be loaded, or StepFlow does not support it.
    """
    if not name.strip():
        raise StepFlowInputError("there is no name of a model", hint="a folder, a Hub id, or `reasoner`")
    args = argparse.Namespace(model=name.strip(), revision=revision, dtype=dtype, device=device)
    # The reasoner has no settings of its own, and the paper's need no search for a preset.
    settings = {} if stepflow is None and args.model == REASONER else find_stepflow(stepflow)
    model, tokenizer = load_with_stepflow(args, settings)
    return LoadedModel(args.model, model.eval(), tokenizer)


def choices() -> list[str]:
    """The settings to choose from: the model's own, the paper's, and every preset that comes with the package."""
    return [OWN, PAPER, *(preset.name for preset in list_presets())]


def settings_of_choice(choice: str, own: StepFlowSettings) -> dict[str, Any]:
    """Returns the settings of the mechanisms that a choice gives.

    Args:
        choice: One of `choices()`.
        own: The model's own settings.

    Raises:
        StepFlowFileError: There is no such preset.
    """
    if choice == OWN:
        settings = own
    elif choice == PAPER:
        settings = StepFlowSettings()
    else:
        settings = load_preset(choice).settings
    mechanisms = {name for name, setting in SETTINGS.items() if not setting.labels and setting.group != "base model"}
    return {name: value for name, value in settings.to_dict().items() if name in mechanisms}


def read_band(text: str) -> Any:
    """Reads a band of layers as it is typed: `bottom:0.25`, `top:0.25`, `all`, `none`, or a list such as `[0, 1]`."""
    text = text.strip()
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise StepFlowInputError(
            f"{text!r} is no list of layers: {error}", hint="for instance [0, 1], bottom:0.25 or none"
        ) from error


def shown_band(value: Any) -> str:
    """A band as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def draw_problem(source: str, seed: int | None = None) -> tuple[EvalProblem, int]:
    """Draws a problem, and returns it with the seed that draws it again.

    Args:
        source: A source of problems, as for `load_problems`.
        seed: The seed; None takes a new one.

    Raises:
        StepFlowError: The source is unknown, or cannot be read.
    """
    seed = random.randrange(_SEEDS) if seed is None else seed
    return draw_problems(source, 1, seed)[0], seed


def draw_problems(source: str, number: int, start: int) -> list[EvalProblem]:
    """Draws problems from a place on.

    Args:
        source: A source of problems, as for `load_problems`.
        number: The number of problems; there are fewer where a file or a benchmark has fewer.
        start: The first problem of a reasoner's level, the seed of a generator, or the place in a file, counted on
            from its beginning after its end.

    Raises:
        StepFlowError: The source is unknown, or cannot be read.
    """
    source = source.strip()
    if source.startswith("reasoner:"):
        return reasoner_problems(source.removeprefix("reasoner:"), number, start=start)
    if source.startswith(("reasoning-gym:", "stepflow-suite:")) and not Path(source).exists():
        return load_problems(source, number, seed=start)
    problems = load_problems(source)
    first = start % len(problems)
    return (problems[first:] + problems[:first])[:number]
