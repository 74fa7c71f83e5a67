"""The results file, written batch by batch, and everything by which one run is distinguished from another."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

FORMAT = "hf-stepflow-results/1"


class ResultStore:
    """Results in a JSONL file, or in memory if there is no path.

    A new file starts with its header. A file that exists is continued if its header asks for the same run; a batch
    that a crash left incomplete is dropped. Each batch is forced to the disk.

    Args:
        path: The file, or None.
        header: Everything that was asked for, JSON-ready; two runs may share a file only if these are equal.
        about: Versions, the machine, and measurements beside the results, which may differ; or a function that makes
            them, which is called if no file is continued.

    Attributes:
        header: Everything that was asked for.
        about: Versions, the machine and measurements; those of the file if one is continued.
        results: The results stored so far, oldest first.

    Raises:
        StepFlowInputError: The file holds another run; the error names the differences.
        StepFlowFileError: The file is not a results file.
    """

    def __init__(
        self,
        path: str | Path | None,
        header: dict[str, Any],
        about: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
    ):
        self.path = None if path is None else Path(path)
        self.header = header
        self.results: list[dict[str, Any]] = []
        self.about: dict[str, Any]
        if self.path is not None and self.path.exists() and self.path.stat().st_size:
            known, self.results, end = read_results(self.path)
            changes = changes_of_run(known["run"], header)
            if changes or list(known["run"]["arms"]) != list(header["arms"]):
                raise another_run(self.path, changes or ["arms in another order"])
            with open(self.path, "r+b") as file:
                file.truncate(end)
            self.about = known.get("about", {})
            return
        self.about = about() if callable(about) else about or {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([{"format": FORMAT, "run": header, "about": self.about}])

    def append(self, results: list[dict[str, Any]]) -> None:
        """Stores the results of one batch."""
        self.results += results
        self._write(results)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.path is None:
            return
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with open(self.path, "ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Reads the header of a file, the results of whole batches, and the number of bytes up to their end.

    Raises:
        StepFlowFileError: The file is not a results file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StepFlowFileError(f"{path} cannot be read: {error}") from error
    texts = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    lines = []
    for number, line in enumerate(texts, 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise StepFlowFileError(
                f"{path}, line {number} is not JSON: {error}",
                hint="it was edited; move it away to start anew",
            ) from error
    if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != FORMAT:
        raise StepFlowFileError(f"{path} is not a results file of hf-stepflow ({FORMAT})", hint="choose another path")
    header, results = lines[0], lines[1:]
    if results:
        arm, batch = results[-1]["arm"], results[-1]["batch"]
        first = len(results)
        while first and (results[first - 1]["arm"], results[first - 1]["batch"]) == (arm, batch):
            first -= 1
        if len(results) - first < results[-1]["of"]:
            del results[first:]
    return header, results, sum(len(text) + 1 for text in texts[: len(results) + 1])


def changes_of_run(known: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Describes how two runs differ; names the first five differences."""
    there, now = _flatten(known), _flatten(json.loads(json.dumps(asked)))
    differing = sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key))
    changes = [f"{key}: {_short(there, key)} there, {_short(now, key)} now" for key in differing[:5]]
    return [*changes, f"and {len(differing) - 5} more"] if len(differing) > 5 else changes


def another_run(path: Path, changes: list[str]) -> StepFlowInputError:
    """Makes the error for a path that holds the results of another run."""
    return StepFlowInputError(
        f"{path} holds another run ({'; '.join(changes)}), and results of different runs are not mixed",
        hint="choose another path, or ask for the same run to continue it",
    )


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(data: dict[str, Any], key: str) -> str:
    text = json.dumps(data[key]) if key in data else "nothing"
    return text if len(text) <= 60 else text[:57] + "..."


def digest(data: Any) -> str:
    """A short hash of JSON-ready data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def model_digest(model: Any) -> str:
    """A short hash of a model: the names, shapes and first weights of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            start = parameter.detach().flatten()[:16].contiguous()
            digest.update(start.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def identify(model: Any, tokenizer: Any) -> dict[str, str]:
    """Returns hashes of a model and its tokenizer, the dtype and the device, on which results depend."""
    return {
        "model": model_digest(model),
        "tokenizer": digest([len(tokenizer), tokenizer.chat_template]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Describes the machine and the versions, on which a measurement depends.

    Args:
        device: A device to name too, with its accelerator.
    """
    facts: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device is not None:
        facts["device"] = str(device)
        if device.type == "cuda":
            facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    """The processor's name, which `platform` knows on some systems only."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
