"""Problems of the generators of reasoning-gym: drawn by a seed, split by their question, checked by their verifier."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from typing import Any

from transformers.utils import logging

from hf_stepflow.runtime.errors import StepFlowInputError, shown

from .arms import read_pairs
from .checkers import make_problem
from .problem import EvalProblem

logger = logging.get_logger(__name__)

SPLITS = ("train", "calibration", "test")
# Problems of one data set of the library. Some generators make all of them at once, or refuse larger ones.
BLOCK = 500
# Problems without a new question after which a generator counts as exhausted.
_PATIENCE = 2000
_PROMPT = (
    "{}\n\nPlease reason step by step, then write the final answer, and nothing else, between <answer> and </answer>."
)
# It mixes other generators, which a line of text cannot configure.
_LEFT_OUT = {"composite"}
_OURS = {"seed", "size"}


def demand_reasoning_gym() -> None:
    """Raises StepFlowInputError if reasoning-gym is not installed."""
    if find_spec("reasoning_gym") is None:
        raise StepFlowInputError(
            "the generators need reasoning-gym, which is not installed", hint="pip install 'hf-stepflow[eval]'"
        )


def generators() -> dict[str, dict[str, Any]]:
    """Returns the knobs of every generator, with their defaults.

    Raises:
        StepFlowInputError: reasoning-gym is not installed.
    """
    demand_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return {name: _knobs(config) for name, (_, config) in sorted(DATASETS.items()) if name not in _LEFT_OUT}


def _knobs(config: Any) -> dict[str, Any]:
    """The fields of a generator's config that JSON can write, with their defaults."""
    found = {}
    for field in dataclasses.fields(config):
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        with contextlib.suppress(TypeError):
            if field.name not in _OURS:
                found[field.name] = json.loads(json.dumps(default))
    return found


def parse_generator(text: str) -> tuple[str, dict[str, Any]]:
    """Reads a generator and its knobs from `NAME[,KEY=VALUE...]`.

    Raises:
        StepFlowInputError: There is no such generator or knob, or reasoning-gym is not installed.

    Example:
        >>> from hf_stepflow.evaluation.generated import parse_generator
        >>> parse_generator("chain_sum,min_terms=8,max_terms=8")
        ('chain_sum', {'min_terms': 8, 'max_terms': 8})
    """
    name, _, rest = text.partition(",")
    known = generators()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or [one for one in known if name and name in one]
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise StepFlowInputError(
            f"reasoning-gym has no generator {name!r}", hint=f"{hint}`hf-stepflow eval --list-problems` lists them"
        )
    settings = dict(read_pairs(rest)) if rest else {}
    unknown = [key for key in settings if key not in known[name]]
    if unknown:
        knobs = ", ".join(f"{key}={json.dumps(value)}" for key, value in known[name].items())
        raise StepFlowInputError(
            f"the generator {name!r} has no knob {unknown[0]!r}", hint=f"its knobs: {knobs or 'none'}"
        )
    return name, settings


def draw_problems(
    name: str, settings: dict[str, Any], number: int, split: str = "test", seed: int = 0
) -> list[EvalProblem]:
    """Draws problems of one split, no question twice.

    A hash of its question decides which split a problem belongs to, whatever the seed and the knobs. So no question is
    ever in two splits.

    Args:
        name: The generator.
        settings: Its knobs that differ from their defaults.
        number: The number of problems. There are fewer, with a warning, if the generator runs out of questions.
        split: `train`, `calibration` or `test`.
        seed: The seed of the generator.

    Raises:
        StepFlowInputError: The split does not exist, the generator refuses a knob's value, or it finds no question.
    """
    from huggingface_hub.utils import tqdm

    if split not in SPLITS:
        raise StepFlowInputError(f"no split {split!r}", hint=f"splits: {', '.join(SPLITS)}")
    demand_reasoning_gym()
    problems: list[EvalProblem] = []
    questions: set[str] = set()
    idle = 0
    with tqdm(total=number, desc=f"drawing {name}", unit="problem", delay=2, leave=False) as bar:
        for source, entry in _entries(name, settings, seed):
            question, answer = entry["question"], entry["answer"]
            key = " ".join(question.casefold().split())
            idle += 1
            if split_of(question) == split and key not in questions:
                idle = 0
                questions.add(key)
                problems.append(
                    EvalProblem(
                        f"{name}/{split}/{len(problems)}",
                        _PROMPT.format(question),
                        answer if answer and answer.strip() else "-",  # some have many right answers
                        kind="verifier",
                        verifier=json.dumps(source, sort_keys=True),
                    )
                )
                bar.update()
            if len(problems) == number or idle >= _PATIENCE:
                break
    if not problems:
        raise StepFlowInputError(
            f"the generator {name!r} finds no question for the split {split!r} with {shown(settings)}",
            hint="give knobs that allow more questions, or another split",
        )
    if len(problems) < number:
        logger.warning(
            "%s has no more than %d different questions for the split %r; %d were asked for.",
            name,
            len(problems),
            split,
            number,
        )
    return problems


def split_of(question: str) -> str:
    """The split that a question belongs to, whatever its capitals and white space."""
    plain = " ".join(question.casefold().split())
    return SPLITS[hashlib.sha256(f"hf-stepflow split/{plain}".encode()).digest()[0] % len(SPLITS)]


def _entries(name: str, settings: dict[str, Any], seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the problems of a generator without end: the place of each, and its question and answer."""
    for number in count():
        block, index = divmod(number, BLOCK)
        # The library seeds each problem with the seed of its data set plus its index, so seeds must lie far apart.
        start = int.from_bytes(hashlib.sha256(f"{name}/{seed}/{block}".encode()).digest()[:4], "big")
        arguments = {**settings, "seed": start, "size": BLOCK}
        made = make_problem(name, arguments, index)
        if "error" in made:
            raise StepFlowInputError(
                f"the generator {name!r} refuses {shown(settings)}: {made['error']}",
                hint="`hf-stepflow eval --list-problems` shows the knobs with their defaults",
            )
        yield {"generator": name, "arguments": arguments, "index": index}, made
