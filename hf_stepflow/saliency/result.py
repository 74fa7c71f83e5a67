"""StepSaliency: the maps of one trace, their indices, and their file."""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.trace import Trace, TraceStep

from .indices import saliency_indices
from .pooling import POOLINGS, pair_counts
from .summary import summary_text

_FORMAT = "stepflow-saliency-1"


@dataclass
class StepSaliency:
    """Step-Saliency of one trace.

    Attributes:
        sums: [L, S, S], or [L, H, S, S] where heads were kept apart: saliency summed over the token pairs of two
            steps, float32 or float64. Row i is what step i draws on.
        layers: the index in the model of each of the L layers.
        trace: the trace, S steps in order.
        pooling: "causal" or "block": the pairs over which `maps` averages.
        about: the model, the loss and the versions behind it.
    """

    sums: torch.Tensor
    layers: list[int]
    trace: Trace
    pooling: str = "causal"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.trace.steps)
        if (
            self.sums.ndim not in (3, 4)
            or self.sums.shape[0] != len(self.layers)
            or self.sums.shape[-2:] != (steps, steps)
        ):
            raise StepFlowInputError(
                f"sums must be [{len(self.layers)}, (heads,) {steps}, {steps}] for these layers and steps, got "
                f"{list(self.sums.shape)}"
            )
        if self.pooling not in POOLINGS:
            raise StepFlowInputError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")

    def __repr__(self) -> str:
        heads = f" and {self.sums.shape[1]} heads" if self.sums.ndim == 4 else ""
        return f"<StepSaliency of {len(self.trace)} tokens: {len(self.steps)} steps, {len(self.layers)} layers{heads}>"

    def __str__(self) -> str:
        return summary_text(self)

    @property
    def steps(self) -> list[TraceStep]:
        """The steps, in the order of the maps' rows and columns."""
        return self.trace.steps

    @cached_property
    def maps(self) -> torch.Tensor:
        """Step-level saliency M, [L, S, S] or [L, H, S, S]: mean over the token pairs of two steps, 0 without any."""
        counts = self._counts
        return torch.where(counts > 0, self.sums / counts.clamp(min=1).to(self.sums), 0.0)

    @cached_property
    def indices(self) -> dict[str, torch.Tensor]:
        """Lock-in, decay and shares, {name: float64 [L]}; what they are, `INDICES` says."""
        sums = self.sums.mean(1) if self.sums.ndim == 4 else self.sums
        return saliency_indices(sums, self._counts, self.trace)

    @cached_property
    def _counts(self) -> torch.Tensor:
        return pair_counts(self.trace, self.pooling)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the steps and all that is known of them in its header.

        Raises:
            StepFlowFileError: a path that cannot be written.
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
        # safetensors refuses parts of one tensor, which a trace's ids may be.
        tensors = {"sums": self.sums.contiguous(), **{name: one.clone().contiguous() for name, one in ids.items()}}
        try:
            save_file(tensors, str(path), metadata={"stepflow": json.dumps(header)})
        except (OSError, SafetensorError) as error:
            raise StepFlowFileError(
                f"{str(path)!r} cannot be written: {error}", hint="give a file in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "StepSaliency":
        """Reads what `save` wrote.

        Raises:
            StepFlowFileError: a file that is missing, damaged or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["stepflow"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']!r}, expected {_FORMAT!r}")
            trace = Trace(
                tensors["segment_ids"],
                tensors["step_ids"],
                tensors["round_ids"],
                [TraceStep(**step) for step in header["steps"]],
            )
            return cls(tensors["sums"], list(header["layers"]), trace, header["pooling"], dict(header["about"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StepFlowFileError(
                f"{str(path)!r} holds no Step-Saliency: {error}", hint="give a file that StepSaliency.save wrote"
            ) from error

    def to_html(self, path: str | Path) -> None:
        """Writes an interactive HTML page of the maps; what it holds, and how exactly, `write_report` says."""
        from .page import write_report

        write_report(self, path)

    def plot(self, layer: "int | str" = "bands", **options: Any) -> Any:
        """The maps as a matplotlib Figure; what the arguments are, `plot_maps` says."""
        from .plot import plot_maps

        return plot_maps(self, layer, **options)

    def plot_profile(self, **options: Any) -> Any:
        """The indices over depth as a matplotlib Figure; what the options are, `plot_profile` says."""
        from .plot import plot_profile

        return plot_profile(self, **options)


def describe(model: Any, loss: "str | tuple[int, int]") -> dict[str, Any]:
    """What a saved map has to say of its origin."""
    import transformers

    import hf_stepflow

    runtime = getattr(model, "stepflow_runtime", None)
    rules = None if runtime is None else runtime.effective
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "loss": loss if isinstance(loss, str) else list(loss),
        "stepflow": None if rules is None else rules.plan.settings.to_dict(),
        "hf_stepflow": hf_stepflow.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
