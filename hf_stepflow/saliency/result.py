"""StepSaliency: the step maps of one trace with their file, their text and their pictures."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowFileError
from hf_stepflow.runtime.trace import Trace, TraceStep

from .maps import INDICES, StepMaps

_FORMAT = "stepflow-saliency-1"

# The columns of the table, by index.
_HEADS = {
    "lock_in": "lock-in",
    "current_step": "itself",
    "previous_step": "previous",
    "earlier_steps": "earlier",
    "question": "question",
    "decay_share": "decay",
    "decay_slope": "slope",
    "block_ratio": "ratio",
}


class StepSaliency(StepMaps):
    """Step-Saliency of one trace.

    Args:
        sums: Saliency summed over the token pairs of two steps, float32 or float64, [L, S, S], or [L, H, S, S] where
            heads are kept apart. Row i shows what step i draws on.
        layers: The index in the model of each of the L layers.
        trace: The trace, S steps in order.
        pooling: The token pairs over which `maps` averages, "causal" or "block".
        about: The model, the loss and the versions behind the maps.

    Example:
        >>> import torch
        >>> from hf_stepflow import StepSaliency, Trace
        >>> StepSaliency(torch.ones(1, 2, 2), [0], Trace([0, 1], [0, 1])).indices["lock_in"]
        tensor([0.5000], dtype=torch.float64)
    """

    def __repr__(self) -> str:
        heads = f" and {self.sums.shape[1]} heads" if self.sums.ndim == 4 else ""
        return f"<StepSaliency of {len(self.trace)} tokens: {len(self.steps)} steps, {len(self.layers)} layers{heads}>"

    def __str__(self) -> str:
        """A table of 80 columns with the indices, one line a layer."""
        labels = Counter(step.label for step in self.steps)
        steps = ", ".join(f"{labels[name]} {name}" for name in ("question", "thinking", "summary") if labels[name])
        width = {name: max(len(text), 6) + 2 for name, text in _HEADS.items()}
        head = "layer " + "".join(f"{text:>{width[name]}}" for name, text in _HEADS.items())
        lines = [f"{len(self.trace)} tokens; steps: {steps}", "", head]
        for row, layer in enumerate(self.layers):
            values = {name: float(self.indices[name][row]) for name in _HEADS}
            cells = {name: "-" if math.isnan(value) else f"{value:.3f}" for name, value in values.items()}
            lines.append(f"{layer:5} " + "".join(f"{cell:>{width[name]}}" for name, cell in cells.items()))
        lines += ["", *(f"{text}: {INDICES[name]}" for name, text in _HEADS.items())]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the steps and the indices, ready for JSON; NaN becomes None."""
        steps = [{key: value for key, value in asdict(step).items() if value is not None} for step in self.steps]
        return {
            "tokens": len(self.trace),
            "steps": steps,
            "layers": self.layers,
            "indices": {
                name: [None if math.isnan(value) else value for value in values.tolist()]
                for name, values in self.indices.items()
            },
            "about": self.about,
        }

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the maps, and the steps and facts in its header.

        Args:
            path: The file to write.

        Raises:
            StepFlowFileError: If the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        header = {
            "format": _FORMAT,
            "layers": self.layers,
            "pooling": self.pooling,
            "steps": [asdict(step) for step in self.steps],
            "about": self.about,
        }
        rounds = self.trace.round_ids
        assert rounds is not None
        ids = {"segment_ids": self.trace.segment_ids, "step_ids": self.trace.step_ids, "round_ids": rounds}
        # safetensors refuses views of one tensor, which a trace's ids may be.
        tensors = {"sums": self.sums.contiguous(), **{name: one.clone().contiguous() for name, one in ids.items()}}
        try:
            save_file(tensors, str(path), metadata={"stepflow": json.dumps(header)})
        except (OSError, SafetensorError) as error:
            raise StepFlowFileError(
                f"{str(path)!r} cannot be written: {error}", hint="give a file in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "StepSaliency":
        """Reads a file that `save` wrote.

        Args:
            path: The file to read.

        Raises:
            StepFlowFileError: If the file is missing, damaged or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["stepflow"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']!r}, expected {_FORMAT!r}")
            steps = [TraceStep(**step) for step in header["steps"]]
            trace = Trace(tensors["segment_ids"], tensors["step_ids"], tensors["round_ids"], steps)
            return cls(tensors["sums"], list(header["layers"]), trace, header["pooling"], dict(header["about"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StepFlowFileError(
                f"{str(path)!r} holds no Step-Saliency: {error}", hint="give a file that StepSaliency.save wrote"
            ) from error

    def to_html(self, path: str | Path) -> None:
        """Writes an interactive HTML page of the maps; see `page.write_report` for what it holds."""
        from .page import write_report

        write_report(self, path)

    def plot(self, layer: "int | str" = "bands", **options: Any) -> Any:
        """Draws the maps as a matplotlib Figure; see `plot.plot_maps` for the arguments."""
        from .plot import plot_maps

        return plot_maps(self, layer, **options)

    def plot_profile(self, **options: Any) -> Any:
        """Draws the indices over depth as a matplotlib Figure; see `plot.plot_profile` for the arguments."""
        from .plot import plot_profile

        return plot_profile(self, **options)
