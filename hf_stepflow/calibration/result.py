"""Calibration: what every stage found, as numbers, as text, and as a preset."""

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hf_stepflow
from hf_stepflow.evaluation.result import percent
from hf_stepflow.evaluation.statistics import CONFIDENCE, Estimate
from hf_stepflow.presets.architecture import Architecture
from hf_stepflow.presets.checks import preset_problems
from hf_stepflow.presets.preset import Preset
from hf_stepflow.runtime.configuration_stepflow import StepFlowSettings
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError

from .bands import Bands
from .candidates import EMPTY, OFF, Settings
from .gate import Gate
from .heads import MOST, Heads
from .search import Halving, Trial
from .verdict import GAIN, NO_GAIN, Measured

# Exit status of the command where nothing better than the base was found.
NOTHING_FOUND = 3

_NOTES = 2000


@dataclass
class Ablation:
    """One variant of the winner on the held-out problems.

    Attributes:
        base: held against the base.
        winner: the winner held against it.
        settings: what ran.
    """

    base: Measured
    winner: Measured
    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {"base": self.base.to_dict(), "winner": self.winner.to_dict(), "settings": self.settings}


@dataclass
class Calibration:
    """What a calibration found, stage by stage; stages that were not reached are None or empty.

    Attributes:
        run: what was asked for.
        about: versions and machine.
        gate: stage 0.
        is_forced: whether a closed gate was passed.
        bands: stage 2.
        heads: heads that profit, by mechanism.
        trials: candidates that the proxy scored, the best first.
        halving: how the best of them fared by generation.
        correlation: Spearman's, of proxy and generated accuracy over the candidates that were run, and their number.
        points: for these candidates the number, the proxy, and the difference in accuracy on the first rung.
        settings: the winner's settings; those that leave the base as it is if there is none.
        winner: the trial that won, or None.
        measured: stage 4, the verdict on the held-out split; None where there was nothing to measure.
        ablations: by name.
        left_out: ablations that were not run, and why.
        held_out: problems of the held-out split.
        seconds: spent on all of it.
    """

    run: dict[str, Any]
    about: dict[str, Any]
    gate: Gate
    is_forced: bool = False
    bands: Bands | None = None
    heads: dict[str, Heads] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    halving: Halving | None = None
    correlation: tuple[Estimate | None, int] = (None, 0)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    settings: Settings = field(default_factory=lambda: dict(EMPTY))
    winner: Trial | None = None
    measured: Measured | None = None
    ablations: dict[str, Ablation] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    held_out: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`gain`, `no measurable gain` or `harm`."""
        return NO_GAIN if self.measured is None else self.measured.verdict

    @property
    def exit_status(self) -> int:
        """0 for a gain, else `NOTHING_FOUND`."""
        return 0 if self.verdict == GAIN else NOTHING_FOUND

    @property
    def band(self) -> str:
        """Whose layers and heads the winner has."""
        if self.winner is None:
            return "none: the empty band"
        drawn = self.winner.parameters
        parts = [f"{part} {drawn[part]}" for part in ("bridge", "injection") if drawn[part] != OFF]
        if drawn["temperature"]:
            parts.append(f"length temperature on {drawn['temperature_heads']} heads")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        correlation, number = self.correlation
        return {
            "run": self.run,
            "about": self.about,
            "verdict": self.verdict,
            "settings": self.settings,
            "band": self.band,
            "gate": self.gate.to_dict() | {"is_forced": self.is_forced},
            "bands": None if self.bands is None else self.bands.to_dict(),
            "heads": {mechanism: heads.to_dict() for mechanism, heads in self.heads.items()},
            "trials": [one.to_dict() for one in self.trials],
            "halving": None if self.halving is None else self.halving.to_dict(),
            "proxy_against_generation": {
                "spearman": None if correlation is None else asdict(correlation),
                "candidates": number,
                "points": [list(one) for one in self.points],
            },
            "winner": None if self.winner is None else self.winner.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "ablations": {name: one.to_dict() for name, one in self.ablations.items()},
            "left_out": self.left_out,
            "held_out": self.held_out,
            "seconds": round(self.seconds, 1),
        }

    def sentences(self) -> list[str]:
        """What was found, one sentence a stage."""
        said = [f"Gate: {self.gate.reason}{'; passed by force' * self.is_forced}."]
        if self.bands is not None:
            said.append(f"Step-Saliency: {self.bands.reason}.")
        for mechanism, heads in self.heads.items():
            of = f"{len(heads.chosen)} of {len(heads.gains)} that were tried"
            most = f", the most that are put together being {MOST}" * (len(heads.chosen) == MOST)
            untried = f"; no time for {heads.untried} more" * bool(heads.untried)
            said.append(f"Heads that profit from {mechanism}: {of}{most}{untried}.")
        if self.halving is not None:
            correlation, number = self.correlation
            told = "" if correlation is None else f"; proxy against generation: rank correlation {_plain(correlation)}"
            said.append(f"Selection: {self.halving.reason} ({number} candidates were run{told}).")
        if self.measured is None:
            said.append("The empty preset is kept: the base model, bit for bit.")
        else:
            said.append(f"Layers and heads of the winner: {self.band}.")
            said.append(f"Held out: {sentence_of(self.measured)}")
        return said

    def preset(
        self,
        name: str,
        base_model: str,
        architecture: Architecture,
        command: str,
        dataset: str,
        revision: str | None = None,
    ) -> Preset:
        """The preset, with what was measured as its provenance.

        Args:
            name: of the preset.
            base_model: Hub id.
            architecture: of the model.
            command: what was typed.
            dataset: what the problems are called.
            revision: of the base model.

        Raises:
            StepFlowConfigError: names that no preset may have.
        """
        measured = self.measured
        deltas = []
        if measured is not None:
            delta = measured.delta
            low, high = (delta.value if end is None else end for end in (delta.low, delta.high))
            deltas.append(
                {
                    "metric": "accuracy",
                    "delta": round(100 * delta.value, 4),
                    "low": round(100 * low, 4),
                    "high": round(100 * high, 4),
                    "confidence": CONFIDENCE,
                }
            )
        provenance = {
            "kind": "measured",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "library_version": hf_stepflow.__version__,
            "dataset": dataset[:200],
            "n": self.gate.problems if measured is None else measured.problems,
            "deltas": deltas,
            "p_value": None if measured is None else float(f"{measured.p_value:.3g}"),
            "command": command[:1000],
            "verdict": self.verdict,
            "seed": self.run["seed"],
            "machine": ", ".join(
                str(self.about[key]) for key in ("platform", "processor", "accelerator", "device") if key in self.about
            )[:200],
        }
        base = {"base_model_name_or_path": base_model, "base_model_revision": revision}
        settings = StepFlowSettings(**{**self.run["settings"], **self.settings, **base})
        notes = " ".join(self.sentences())[:_NOTES]
        preset = Preset(name, base_model, revision, architecture, settings, provenance, None, notes)
        problems = preset_problems(preset.to_dict(), name)
        if problems:
            raise StepFlowConfigError(f"the preset {name!r}: {problems[0]}", hint=problems[0].hint)
        return preset

    def __str__(self) -> str:
        lines = [*self.sentences()]
        if self.winner is not None:
            shown = {name: value for name, value in self.settings.items() if value != EMPTY[name]}
            lines.append(f"Settings: {json.dumps(shown)}")
        if self.ablations:
            lines += ["", f"{'ablation (held out)':<28} {'points against the base':>26} {'winner against it':>22}"]
            for name, one in self.ablations.items():
                lines.append(f"{name:<28} {percent(one.base.delta, '+'):>26} {percent(one.winner.delta, '+'):>22}")
        lines += [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        return "\n".join([*lines, "", f"Verdict: {self.verdict}"])


def sentence_of(one: Measured) -> str:
    """The verdict in one sentence."""
    harm = "" if one.harm_rate is None else f", breaks {one.harm_rate.value:.1%} of what the base solves"
    could = (
        "n could have shown none"
        if one.smallest_delta is None
        else f"n could have shown {100 * one.smallest_delta:.1f} points"
    )
    return (
        f"{percent(one.delta, '+')} points on {one.problems} problems (base {100 * one.base.value:.1f}), gained "
        f"{one.gained}, lost {one.lost}{harm}, p = {one.p_value:.3g}; {could}; tokens x{one.tokens_ratio.value:.2f}, "
        f"time x{one.seconds_ratio.value:.2f}, {one.changed:.0%} of the responses changed."
    )


def write_preset(preset: Preset, path: Path) -> None:
    """Writes the file of a preset.

    Raises:
        StepFlowFileError: a path that cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(preset.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StepFlowFileError(f"{str(path)!r} cannot be written: {error}") from error


def _plain(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return f"{one.value:.2f}"
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
