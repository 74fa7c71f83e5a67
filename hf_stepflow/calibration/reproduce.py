"""reproduce.json: everything that a calibration depends on and what it found, to replay it and compare.

A replay needs the same model, tokenizer and problems, which hashes identify. It may run on other code, versions or
machines; where these differ, the comparison says so beside what came out otherwise.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hf_stepflow.calibration
from hf_stepflow.evaluation.problem import as_problems
from hf_stepflow.evaluation.store import digest
from hf_stepflow.presets.preset import RECORD
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .result import Calibration
from .run import Budget

FORMAT = "hf-stepflow-reproduce/1"

# A record is small; nothing larger is read.
_MOST_BYTES = 1 << 20

# The arguments of `calibrate` that a record holds, with the types that they have.
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "samples": (int,),
    "temperature": (int, float),
    "max_new_tokens": (int,),
    "batch_size": (int,),
    "scored": (int,),
    "bound": (int, float),
    "force": (bool,),
}


@dataclass(frozen=True)
class Reproduction:
    """The outcome of a replay.

    Attributes:
        result: The new result.
        findings: What came out differently, one sentence each: gate, settings, verdict, answers.
        circumstances: What was different about the replay: code, versions, machine, a budget of time.
    """

    result: Calibration
    findings: list[str]
    circumstances: list[str]

    @property
    def is_same(self) -> bool:
        """Whether the replay found the same."""
        return not self.findings

    def __str__(self) -> str:
        lines = ["Reproduced: gate, settings, answers and verdict are the same."] if self.is_same else []
        lines += [f"Differs: {one}" for one in self.findings]
        return "\n".join([*lines, *(f"Replayed with other {one}" for one in self.circumstances)])


def record_of(result: Calibration, model: Any, problems: Sequence[Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a calibration, JSON-ready; the same run gives the same record.

    Args:
        result: The result.
        model: The model.
        problems: The problems, as given to `calibrate`.
        origin: JSON-ready facts by which others find the model and the problems: names, revision, dtype.

    Example:
        >>> from hf_stepflow.calibration.reproduce import record_of
        >>> record = record_of(result, model, problems, {"model": "org/name"})  # doctest: +SKIP
    """
    run = result.run
    sampling = run["sampling"]
    own = {name: sampling[name] for name in ("seed", "samples", "temperature", "max_new_tokens", "batch_size")}
    return {
        "format": FORMAT,
        "origin": dict(origin),
        "arguments": {
            **own,
            "scored": run["scored"],
            "bound": run["bound"],
            "budget": run["budget"],
            "force": result.is_forced,
            "choose": result.chosen if result.chosen != result.default else None,
            "template": sampling["template"],
            "settings": run["settings"],
        },
        "hashes": hashes_of(model, problems, run["tokenizer"]),
        "versions": {name: result.about.get(name) for name in ("python", "torch", "transformers")}
        | {"hf_stepflow": run["library"]},
        "machine": {name: result.about.get(name) for name in ("processor", "platform", "threads", "accelerator")},
        "found": findings_of(result),
    }


def hashes_of(model: Any, problems: Sequence[Any], tokenizer: str) -> dict[str, str]:
    """Returns the hashes of model, tokenizer, problems and code; every weight counts."""
    asked = [problem.asked() | {"trace": problem.trace} for problem in as_problems(problems)]
    return {
        "model": weights_digest(model),
        "tokenizer": tokenizer,
        "problems": digest(asked),
        "code": code_digest(),
    }


def findings_of(result: Calibration) -> dict[str, Any]:
    """Returns what a replay has to find again."""
    measured = result.measured
    return {
        "gate": result.gate.reason,
        "settings": result.settings,
        "verdict": result.verdict,
        "strata": {one.name: one.verdict for one in result.strata},
        "gained": None if measured is None else measured.gained,
        "lost": None if measured is None else measured.lost,
        "answers": result.answers,
    }


def weights_digest(model: Any) -> str:
    """Returns a hash over the name, shape, dtype and bytes of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def code_digest() -> str:
    """Returns a hash over the sources of the package."""
    folder = Path(hf_stepflow.calibration.__file__).parents[1]
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Writes a record to a file.

    Raises:
        StepFlowFileError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise StepFlowFileError(f"{str(path)!r} cannot be written: {error}", hint="choose another path") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads a record and checks its parts.

    Raises:
        StepFlowFileError: The file cannot be read or is no record.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, {_MOST_BYTES} at most are read")
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepFlowFileError(
            f"{str(file)!r} cannot be read: {error}", hint=f"give the {RECORD} of a calibration"
        ) from error
    known = record.get("format") if isinstance(record, dict) else None
    if known != FORMAT:
        raise StepFlowFileError(
            f"{str(file)!r} has the format {known!r}, expected {FORMAT!r}", hint=f"give the {RECORD} of a calibration"
        )
    for name in ("origin", "arguments", "hashes", "versions", "machine", "found"):
        if not isinstance(record.get(name), dict):
            raise StepFlowFileError(f"{str(file)!r} has no object {name!r}", hint="the file is not whole")
    for name, kinds in _ARGUMENTS.items():
        value = record["arguments"].get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise StepFlowFileError(f"{str(file)!r}: arguments.{name} is {value!r}, expected {kinds[-1].__name__}")
    return record


def reproduce(
    record: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    problems: Sequence[Any],
    *,
    sources: Mapping[str, str] | None = None,
    work: str | Path | None = None,
    run_code: bool = False,
    progress: bool = True,
) -> Reproduction:
    """Replays a calibration and compares what it finds with the record.

    Args:
        record: The record, as `read_record` returns it.
        model: The same model, without StepFlow.
        tokenizer: Its tokenizer.
        problems: The same problems, in the same order.
        sources: As for `calibrate`.
        work: A work folder, in which an interrupted replay continues.
        run_code: Whether programs that the model writes may be run; a record cannot allow it.
        progress: Whether to show progress.

    Raises:
        StepFlowInputError: Model, tokenizer or problems are others; the message names each with both hashes.
        StepFlowError: As `calibrate`.

    Example:
        >>> from hf_stepflow.calibration.reproduce import read_record, reproduce
        >>> print(reproduce(read_record("reproduce.json"), model, tokenizer, problems))  # doctest: +SKIP
    """
    from .stages import calibrate

    arguments = record["arguments"]
    own = hashes_of(model, problems, digest([len(tokenizer), tokenizer.chat_template]))
    others = [
        f"{name} {record['hashes'].get(name)} there, {own[name]} here"
        for name in ("model", "tokenizer", "problems")
        if record["hashes"].get(name) != own[name]
    ]
    if others:
        raise StepFlowInputError(
            f"this would be another calibration: {'; '.join(others)}",
            hint="give the model and the problems that the record's origin names",
        )
    budget = arguments["budget"]
    result = calibrate(
        model,
        tokenizer,
        problems,
        budget=Budget(budget["candidates"], budget["seconds"]),
        stepflow=arguments["settings"],
        template=arguments.get("template"),
        choose=arguments.get("choose"),
        work=work,
        run_code=run_code,
        sources=sources,
        progress=progress,
        **{name: arguments[name] for name in _ARGUMENTS},
    )
    return Reproduction(result, differences(record["found"], findings_of(result)), _circumstances(record, own, result))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the findings of two runs, one sentence each."""
    found = []
    for name in here:
        first, second = (json.dumps(one.get(name), sort_keys=True) for one in (there, here))
        if first != second:
            found.append(f"{name} is {first} in the record, {second} here")
    return found


def _circumstances(record: Mapping[str, Any], own: Mapping[str, str], result: Calibration) -> list[str]:
    found = []
    if record["hashes"].get("code") != own["code"]:
        found.append(f"code: {record['hashes'].get('code')} there, {own['code']} here")
    here = {**{name: result.about.get(name) for name in ("python", "torch", "transformers")}}
    here["hf_stepflow"] = result.run["library"]
    found += [
        f"{name}: {record['versions'].get(name)} there, {value} here"
        for name, value in here.items()
        if record["versions"].get(name) != value
    ]
    found += [
        f"{name}: {value} there, {result.about.get(name)} here"
        for name, value in record["machine"].items()
        if result.about.get(name) != value
    ]
    if record["arguments"]["budget"]["seconds"] is not None:
        found.append("speed: the budget is a time, and how far it goes depends on the machine")
    return found
