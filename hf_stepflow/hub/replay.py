"""Checks a preset that somebody else measured: the same comparison on this machine, against the recorded verdict."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_stepflow.calibration.reproduce import code_digest, read_record
from hf_stepflow.calibration.splits import split_problems
from hf_stepflow.evaluation.problem import as_problems
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.statistics import PairedComparison
from hf_stepflow.presets.preset import RECORD, Preset, record_beside
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .base import first_line

_BASE = ("base_model_name_or_path", "base_model_revision")


@dataclass(frozen=True)
class Replay:
    """A recorded verdict beside the comparison on this machine.

    Attributes:
        verdict: The recorded verdict.
        recorded: The recorded difference in accuracy and the ends of its interval, in points; None if there is none.
        recorded_n: The number of problems of the record.
        measured: The comparison on this machine.
        is_same_code: Whether the settings were measured with the code that is installed here.
    """

    verdict: str
    recorded: tuple[float, float, float] | None
    recorded_n: int
    measured: PairedComparison
    is_same_code: bool

    @property
    def holds(self) -> bool | None:
        """Whether the verdict holds: True, False, or None where these problems are too few to tell.

        A gain or a harm holds if the interval measured here lies on the same side of zero. It does not if the interval
        lies on the other side, or excludes all that the record's interval holds. "No measurable gain" does not hold if
        the interval here lies on one side of zero, and holds if as many problems as in the record show nothing.
        """
        low, high = self._interval
        apart = self.recorded is not None and (high < self.recorded[1] or low > self.recorded[2])
        if self.verdict.startswith("gain"):
            return True if low > 0 else False if high <= 0 or apart else None
        if self.verdict == "harm":
            return True if high < 0 else False if low >= 0 or apart else None
        if apart or (self.verdict != "trade" and (low > 0 or high < 0)):
            return False
        return True if self.measured.problems >= self.recorded_n else None

    @property
    def _interval(self) -> tuple[float, float]:
        delta = self.measured.delta
        low, high = (delta.value if end is None else end for end in (delta.low, delta.high))
        return 100 * low, 100 * high

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        low, high = self._interval
        return {
            "verdict": self.verdict,
            "holds": self.holds,
            "recorded": None if self.recorded is None else list(self.recorded),
            "recorded_n": self.recorded_n,
            "measured": [100 * self.measured.delta.value, low, high],
            "n": self.measured.problems,
            "gained": self.measured.gained,
            "lost": self.measured.lost,
            "same_code": self.is_same_code,
        }

    def __str__(self) -> str:
        low, high = self._interval
        lines = []
        if self.recorded is not None:
            there = f"{self.recorded[0]:+.1f} points [{self.recorded[1]:+.1f}, {self.recorded[2]:+.1f}]"
            lines.append(f"recorded: {self.verdict}, {there}, n = {self.recorded_n}")
        else:
            lines.append(f"recorded: {self.verdict}, nothing was compared")
        here = f"{100 * self.measured.delta.value:+.1f} points [{low:+.1f}, {high:+.1f}], n = {self.measured.problems}"
        lines.append(f"here:     {here}, gained {self.measured.gained}, lost {self.measured.lost}")
        lines.append(
            {
                True: "The verdict holds.",
                False: "The verdict does NOT hold here.",
                None: "These problems are too few to confirm the verdict; they do not contradict it.",
            }[self.holds]
        )
        if not self.is_same_code:
            lines.append("The record was made with other code of hf-stepflow.")
        return "\n".join(lines)


def find_record(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """Finds the record of a measured preset.

    Args:
        source: A preset's file, whose record lies beside it; the folder of a preset repository; or its Hub id.
        revision: The revision of the repository.
        token: The token for it, as in huggingface_hub.

    Raises:
        StepFlowFileError: There is no record, or it cannot be read.
    """
    path = Path(source)
    if os.path.isdir(source):
        return read_record(path / RECORD)
    if os.path.isfile(source):
        return read_record(record_beside(path))
    from huggingface_hub import hf_hub_download

    try:
        return read_record(os.path.realpath(hf_hub_download(str(source), RECORD, revision=revision, token=token)))
    except StepFlowFileError:
        raise
    except (OSError, ValueError) as error:
        raise StepFlowFileError(
            f"{str(source)!r} has no {RECORD} that could be fetched: {first_line(error)}",
            hint="only presets that `hf-stepflow calibrate` wrote, with their records, can be replayed",
        ) from error


def replay_preset(
    preset: Preset,
    record: dict[str, Any],
    model: Any,
    tokenizer: Any,
    problems: Any,
    *,
    limit: int | None = None,
    run_code: bool = False,
    progress: bool = True,
) -> Replay:
    """Compares a preset with the base model again, on problems that its search has not seen.

    Args:
        preset: The preset, of the kind "measured".
        record: Its record, as `find_record` returns it.
        model: The base model, without StepFlow.
        tokenizer: Its tokenizer.
        problems: The problems that the record names; the held-out half of them is asked.
        limit: The number of problems to ask; None for all.
        run_code: Whether programs that the model writes may be run to judge them.
        progress: Whether to show progress.

    Raises:
        StepFlowInputError: The preset was not measured, or the limit is none.
        StepFlowConfigError: The preset is for another architecture.

    Example:
        >>> from hf_stepflow.hub.replay import find_record, replay_preset
        >>> print(replay_preset(preset, find_record("org/preset"), model, tokenizer, problems))  # doctest: +SKIP
    """
    if preset.kind != "measured":
        raise StepFlowInputError(
            f"the preset {preset.name!r} was not measured: {preset.claim}", hint="there is no verdict to replay"
        )
    if limit is not None and limit < 1:
        raise StepFlowInputError(f"the limit must be at least 1, got {limit}", hint="leave it out to ask all problems")
    preset.check_model(model)
    arguments = record["arguments"]
    _, held_out = split_problems(as_problems(problems), arguments["seed"])
    settings = {name: value for name, value in preset.settings.to_dict().items() if name not in _BASE}
    sampled = {"do_sample": True, "temperature": arguments["temperature"]} if arguments["samples"] > 1 else {}
    result = evaluate(
        model,
        held_out[:limit],
        {"base": False, "preset": settings},
        tokenizer=tokenizer,
        batch_size=arguments["batch_size"],
        max_new_tokens=arguments["max_new_tokens"],
        n_samples=arguments["samples"],
        seed=arguments["seed"],
        template=arguments.get("template"),
        run_code=run_code,
        progress=progress,
        **sampled,
    )
    stated = preset.provenance
    deltas = [tuple(each[name] for name in ("delta", "low", "high")) for each in stated["deltas"]]
    return Replay(
        stated["verdict"],
        deltas[0] if deltas else None,
        stated["n"],
        result.comparisons[0].paired,
        record["hashes"].get("code") == code_digest(),
    )
