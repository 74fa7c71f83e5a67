"""The end of `hf-stepflow calibrate` on a terminal: which candidate to judge, then save, push or compare."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_stepflow.calibration.pareto import Outcome
from hf_stepflow.calibration.reproduce import write_record
from hf_stepflow.calibration.result import Calibration, front_table, write_preset
from hf_stepflow.evaluation.sampler import Sampler, prepared
from hf_stepflow.presets.preset import Preset, record_beside
from hf_stepflow.runtime.errors import StepFlowError

from .terminal import StepPrinter, answer, first_difference


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask_for_candidate(front: Sequence[Outcome], default: int | None) -> int | None:
    """Asks which candidate to judge on the held-out split.

    Args:
        front: The candidates that no other beats.
        default: The one that the rule picks, or None.

    Returns:
        The number; None for the rule's choice.
    """
    print("\nCandidates that no other beats in gain, damage and tokens at once (calibration split):\n")
    print(front_table(front, default))
    if not front:
        return None
    rule = "none of them: the base stays" if default is None else f"#{default}"
    known = {one.trial for one in front}
    while True:
        text = _ask(f"\nCandidate to judge on the held-out problems [{rule}]: ")
        if not text:
            return None
        if text.lstrip("#").isdecimal() and int(text.lstrip("#")) in known:
            return int(text.lstrip("#"))
        print(f"{text!r} is none of {', '.join(f'#{one}' for one in sorted(known))}; an empty line takes the rule's.")


def offer(
    model: Any,
    tokenizer: Any,
    result: Calibration,
    preset: Preset,
    record: Mapping[str, Any],
    problems: Sequence[Any],
    max_new_tokens: int,
) -> None:
    """Offers to save the preset, to push it, and to compare answers, until an empty line.

    Each of them may fail: the error is shown, and the result stays.
    """

    def save() -> None:
        path = Path(_ask(f"File [{preset.name}.json]: ") or f"{preset.name}.json")
        _write_both(preset, record, path)
        print(f"Saved: {path}, and its record {record_beside(path)}")

    def push() -> None:
        from hf_stepflow.hub.push import push_preset

        repo_id = _ask("Repository (YOUR-NAME/NAME, empty for none): ")
        if repo_id:
            with TemporaryDirectory() as folder:
                file = Path(folder) / f"{preset.name}.json"
                _write_both(preset, record, file)
                pushed = push_preset(file, repo_id)
            print(f"Pushed to {pushed.url}, commit {pushed.commit}")

    def compare() -> None:
        _compare(model, tokenizer, result, problems[0], max_new_tokens)

    actions: dict[str, Callable[[], None]] = {"save": save, "push": push, "compare": compare}
    while True:
        text = _ask("\nsave, push or compare (empty: end): ").casefold()
        if not text:
            return
        action = next((one for name, one in actions.items() if name.startswith(text)), None)
        if action is None:
            print(f"{text!r} is none of {', '.join(actions)}.")
            continue
        try:
            action()
        except StepFlowError as error:
            print(f"That failed: {error.message}", file=sys.stderr)
            if error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
        except OSError as error:
            print(f"That failed: {error}", file=sys.stderr)


def _write_both(preset: Preset, record: Mapping[str, Any], path: Path) -> None:
    """Writes a preset, and its record beside it."""
    write_preset(preset, path)
    write_record(record, record_beside(path))


def _compare(model: Any, tokenizer: Any, result: Calibration, problem: Any, max_new_tokens: int) -> None:
    """Prints the answers of the base and of the candidate to one problem, and the first step that differs."""
    from hf_stepflow.prompts import encode_prompt
    from hf_stepflow.runtime.tokenization_stepflow import end_of_turn_ids

    settings = {**result.run["settings"], **result.settings}
    with prepared(model, tokenizer, settings, attach=True):
        vocabulary = model.stepflow_runtime.rules.vocabulary
        ends = end_of_turn_ids(model, tokenizer)
        prompt = encode_prompt(tokenizer, problem.prompt)
        lines = []
        for name, is_on in (("base", False), ("candidate", True)):
            print(f"\n{name}")
            streamer = StepPrinter(tokenizer, vocabulary, ends)
            sampler = Sampler(model, tokenizer, vocabulary, max_new_tokens, {"streamer": streamer})
            lines.append(answer(sampler, prompt, is_on).lines)
    first = first_difference(*lines)
    print(f"\nRight answer: {problem.answer}. ", end="")
    print("The steps are the same." if first is None else f"The first step that differs is step {first + 1}.")


def _ask(text: str) -> str:
    """Asks for a line; the end of the input is an empty one."""
    try:
        return input(text).strip()
    except EOFError:
        print()
        return ""
