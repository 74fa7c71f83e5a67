"""The trace viewer: one HTML file that shows every response of a run, arms side by side and step by step."""

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_stepflow.report import scripted_page, write_page
from hf_stepflow.runtime.configuration_stepflow import read_settings
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.settings import StepFlowSettings

from .aligned_steps import align_steps
from .arms import Arm
from .problem import EvalProblem, as_problems
from .result import EvaluationResult
from .store import digest
from .written_steps import TextSteps

# In the order in which data flows: what the file holds, the list of problems, the chosen one, the page.
_SCRIPTS = ("data", "list", "detail", "page")

# The most characters of a response on the page; of longer ones the beginning and the end are shown.
LONGEST_TEXT = 20_000

_LABELS = {"thinking": "t", "summary": "s", "question": "q"}
_LEFT_OUT = "-"


def write_viewer(
    result: EvaluationResult, path: str | Path, problems: Sequence[EvalProblem] | None = None, progress: bool = False
) -> None:
    """Writes the page.

    The file needs no network and no other file. A run of 1,000 problems and two arms takes some 9 MB where responses
    have 7,300 characters.

    Args:
        result: The run, finished or not.
        path: The file to write.
        problems: The problems of the run, for the texts of the questions and the right answers; a results file does
            not hold them.
        progress: Whether to show a progress bar while steps are cut.

    Raises:
        StepFlowInputError: The run has no responses, or the problems are not those of the run.
        StepFlowFileError: A response of the results file is incomplete, or the path cannot be written.
    """
    folder = Path(__file__).parent / "assets"
    packed = zlib.compress(json.dumps(viewer_content(result, problems, progress)).encode(), 9)
    write_page(path, scripted_page(folder, _SCRIPTS, base64.b64encode(packed).decode()))


def demand_problems_of(run: dict[str, Any], problems: Sequence[EvalProblem]) -> None:
    """Checks that problems are those that a run was asked.

    Raises:
        StepFlowInputError: They are others.
    """
    if digest([problem.asked() for problem in problems]) != run["problems"]:
        raise StepFlowInputError(
            f"these {len(problems)} problems are not the {run['n_problems']} that the run was asked",
            hint="name the source that the run was given, with the same --split",
        )


def viewer_content(
    result: EvaluationResult, problems: Sequence[EvalProblem] | None = None, progress: bool = False
) -> dict[str, Any]:
    """Returns all data of the page: facts, verdicts, arms, and for each problem its responses cut into steps.

    A response holds its text in pieces `[label, number, text]`: "t" thinking, "s" summary, "q" neither, "" no step,
    "-" left out. `rows` aligns the steps of each arm with those of the first, in runs
    `[first, other, is_same, length]` of places among the steps, -1 for none.

    Args:
        result: The run.
        problems: The problems of the run, or None.
        progress: Whether to show a progress bar.

    Raises:
        StepFlowInputError: The run has no responses, or the problems are not those of the run.
        StepFlowFileError: A response of the results file is incomplete.
    """
    from huggingface_hub.utils import tqdm

    if not result.results:
        raise StepFlowInputError("the run has no responses yet", hint="wait for its first batch")
    asked: dict[str, EvalProblem] = {}
    if problems is not None:
        known = as_problems(problems)
        demand_problems_of(result.run, known)
        asked = {problem.id: problem for problem in known}
    arms = list(result.run["arms"])
    place = {problem: number for number, problem in enumerate(asked)}
    entries: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for one in result.results:
        entries.setdefault((one["problem"], one["sample"]), {})[one["arm"]] = one
    order = sorted(entries, key=lambda key: (place.get(key[0], len(place)), key[1]))
    cutters = _cutters(result)
    shown = []
    with tqdm(total=len(result.results), desc="cutting steps", delay=2, leave=False, disable=not progress) as bar:
        for problem, sample in order:
            own = entries[problem, sample]
            responses = [_response(own[name], cutters[name]) if name in own else None for name in arms]
            bar.update(len(own))
            entry: dict[str, Any] = {"id": problem, "responses": responses, "rows": _rows(responses)}
            if result.run["n_samples"] > 1:
                entry["sample"] = sample
            if problem in asked:
                entry |= {"question": asked[problem].prompt, "answer": asked[problem].answer}
            shown.append(entry)
    return {
        "facts": result.facts,
        "verdicts": result.verdicts(),
        "arms": [_arm(result, name) for name in arms],
        "problems": shown,
    }


def _arm(result: EvaluationResult, name: str) -> dict[str, Any]:
    """An arm's name and its settings, those that differ from an empty arm."""
    given = result.run["arms"][name]
    defaults = Arm().to_dict()
    own = {key: value for key, value in given.items() if value != defaults.get(key)}
    return {"name": name, "settings": json.dumps(own) if own else "the base model"}


def _cutters(result: EvaluationResult) -> dict[str, TextSteps]:
    """The step rules by which the responses of each arm are cut; arms with the same rules share them."""
    run = result.run
    base = StepFlowSettings() if run["settings"] is None else read_settings(run["settings"])
    texts: dict[str, list[str]] = {name: [] for name in run["arms"]}
    for one in result.results:
        if not isinstance(one.get("text"), str):
            raise StepFlowFileError(
                f"the response to {one.get('problem')!r} has no text", hint="it was edited; run the evaluation again"
            )
        texts[one["arm"]].append(one["text"])
    cutters: dict[str, TextSteps] = {}
    made: dict[str, TextSteps] = {}
    for name, arm in run["arms"].items():
        own = arm["stepflow"]
        settings = base.replace(**own) if isinstance(own, dict) else base
        key = json.dumps(settings.to_dict(), sort_keys=True)
        if key not in made:
            made[key] = TextSteps((text for some in texts.values() for text in some), settings)
        cutters[name] = made[key]
    return cutters


def _response(one: dict[str, Any], cutter: TextSteps) -> dict[str, Any]:
    text = one["text"]
    pieces: list[list[Any]] = []
    end = 0
    for step in cutter.cut(text, one["steps"] > 0):
        if step.start > end:
            pieces.append(["", 0, text[end : step.start]])
        pieces.append([_LABELS[step.label], step.index, text[step.start : step.end]])
        end = step.end
    if end < len(text):
        pieces.append(["", 0, text[end:]])
    kept = ("outcome", "right", "answer", "tokens", "loops", "stepflow")
    shown = {name: one[name] for name in kept if name in one} | {"pieces": _shortened(pieces)}
    if "votes" in one:
        shown["votes"] = [[vote["answer"], vote["outcome"]] for vote in one["votes"]]
    return shown


def _shortened(pieces: list[list[Any]]) -> list[list[Any]]:
    """The pieces of a response, without those in the middle if it is long."""
    if sum(len(text) for _, _, text in pieces) <= LONGEST_TEXT:
        return pieces
    half = LONGEST_TEXT // 2
    first, room = 0, half
    while room >= len(pieces[first][2]):
        room -= len(pieces[first][2])
        first += 1
    last, room = len(pieces), half
    while last > first and room >= len(pieces[last - 1][2]):
        last -= 1
        room -= len(pieces[last][2])
    middle = pieces[first:last]
    if len(middle) == 1:  # one step that is too long by itself
        label, number, text = middle[0]
        keep = (LONGEST_TEXT - sum(len(own) for _, _, own in pieces[:first] + pieces[last:])) // 2
        note = f"… {len(text) - 2 * keep:,} characters are left out here …"
        return [*pieces[:first], [label, number, f"{text[:keep]}{note}{text[len(text) - keep :]}"], *pieces[last:]]
    steps = sum(label in _LABELS.values() for label, _, _ in middle)
    characters = sum(len(text) for _, _, text in middle)
    note = f"{steps} steps of {characters:,} characters are left out here"
    return [*pieces[:first], [_LEFT_OUT, 0, note], *pieces[last:]]


def _rows(responses: list[dict[str, Any] | None]) -> list[list[list[int]]]:
    """The alignment of every arm but the first with the first, as runs."""
    sides = [_step_texts(response) for response in responses]
    found = []
    for other in sides[1:]:
        runs: list[list[int]] = []
        for pair in align_steps(sides[0], other):
            row = [-1 if place is None else place for place in (pair.first, pair.other)] + [int(pair.is_same)]
            if runs and _goes_on(runs[-1], row):
                runs[-1][3] += 1
            else:
                runs.append([*row, 1])
        found.append(runs)
    return found


def _step_texts(response: dict[str, Any] | None) -> list[str]:
    """The texts of what stands in rows: all pieces but those in no step."""
    return [] if response is None else [text for label, _, text in response["pieces"] if label]


def _goes_on(run: list[int], row: list[int]) -> bool:
    ends = [place if place < 0 else place + run[3] for place in run[:2]]
    return run[2] == row[2] and ends == row[:2]
