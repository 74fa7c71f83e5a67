"""Calibration: the findings of every stage as numbers, as text and as a preset."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_stepflow.evaluation.result import amount, percent
from hf_stepflow.evaluation.statistics import CONFIDENCE, Estimate
from hf_stepflow.presets.architecture import Architecture
from hf_stepflow.presets.checks import preset_problems
from hf_stepflow.presets.preset import Preset
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError
from hf_stepflow.runtime.settings import StepFlowSettings

from .bands import Bands
from .candidates import EMPTY, OFF, Settings
from .gate import Gate
from .heads import MOST, Heads
from .pareto import Outcome
from .search import Halving, Trial
from .verdict import GAIN, HARM, Measured, Stratum, overall

# The exit status of the command if nothing better than the base was found.
NOTHING_FOUND = 3

# The format of a result in JSON; the first one had neither strata nor this key.
FORMAT = "hf-stepflow-calibration-result/2"

# The longest texts that a preset may hold.
_NOTES, _COMMAND, _TEXT = 2000, 1000, 200


@dataclass
class Ablation:
    """One variant of the winner on the held-out problems.

    Attributes:
        base: The variant compared with the base.
        winner: The winner compared with the variant.
        settings: The variant's settings.
    """

    base: Measured
    winner: Measured
    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        return {"base": self.base.to_dict(), "winner": self.winner.to_dict(), "settings": self.settings}


@dataclass
class Calibration:
    """The findings of a calibration; stages that were not reached are None or empty.

    Attributes:
        run: The arguments and inputs of the run.
        about: Versions and machine.
        gate: Whether errors rise with length.
        is_forced: Whether a closed gate was passed.
        bands: The proposed layers.
        heads: The heads that profit, by mechanism.
        order: Spearman's correlation of the order by slopes and the gains of the heads tried, and their number.
        trials: The candidates that the proxy scored, the best first.
        halving: The results of those that answered problems.
        correlation: Spearman's correlation of proxy and generated accuracy over these, and their number.
        points: The number, the proxy and the difference in accuracy on the first rung of each of these.
        front: The candidates that no other beats in gain, damage and cost at once.
        default: The number of the candidate that the rule picks, or None.
        winner: The trial that was judged, or None: the default, unless another one was chosen before.
        measured: The comparison on the held-out split, or None.
        strata: The same in every stratum.
        ablations: The winner's ablations by name.
        left_out: The reason for each ablation that was not run.
        held_out: The number of problems in the held-out split.
        seconds: The time spent.
        answers: Hashes of the held-out answers of the base and of the winner.
        timing: {stage: (seconds forecast before it, or None; seconds that it took)}, of the last start of the run.
    """

    run: dict[str, Any]
    about: dict[str, Any]
    gate: Gate
    is_forced: bool = False
    bands: Bands | None = None
    heads: dict[str, Heads] = field(default_factory=dict)
    order: tuple[Estimate | None, int] = (None, 0)
    trials: list[Trial] = field(default_factory=list)
    halving: Halving | None = None
    correlation: tuple[Estimate | None, int] = (None, 0)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    front: list[Outcome] = field(default_factory=list)
    default: int | None = None
    winner: Trial | None = None
    measured: Measured | None = None
    strata: list[Stratum] = field(default_factory=list)
    ablations: dict[str, Ablation] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    held_out: int = 0
    seconds: float = 0.0
    answers: dict[str, str] = field(default_factory=dict)
    timing: dict[str, tuple[float | None, float]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The winner's settings; without a winner, settings that leave the base as it is."""
        return dict(EMPTY) if self.winner is None else self.winner.settings

    @property
    def chosen(self) -> int | None:
        """The number of the candidate that was judged, or None."""
        return None if self.winner is None else self.winner.number

    @property
    def verdict(self) -> str:
        """`gain`, `gain, harm not excluded`, `trade`, `no measurable gain` or `harm`."""
        return overall(self.measured, self.strata)

    @property
    def exit_status(self) -> int:
        """0 for a gain, else `NOTHING_FOUND`."""
        return 0 if self.verdict == GAIN else NOTHING_FOUND

    @property
    def band(self) -> str:
        """The source of the winner's layers and heads."""
        if self.winner is None:
            return "none: the empty band"
        drawn = self.winner.parameters
        parts = [f"{part} {drawn[part]}" for part in ("bridge", "injection") if drawn[part] != OFF]
        if drawn["temperature"]:
            parts.append(f"length temperature on {drawn['temperature_heads']} heads")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        correlation, number = self.correlation
        return {
            "format": FORMAT,
            "run": self.run,
            "about": self.about,
            "verdict": self.verdict,
            "settings": self.settings,
            "band": self.band,
            "gate": asdict(self.gate) | {"is_forced": self.is_forced},
            "bands": None if self.bands is None else asdict(self.bands),
            "heads": {mechanism: heads.to_dict() for mechanism, heads in self.heads.items()},
            "order": {"spearman": None if self.order[0] is None else asdict(self.order[0]), "heads": self.order[1]},
            "trials": [one.to_dict() for one in self.trials],
            "halving": None if self.halving is None else asdict(self.halving),
            "proxy_against_generation": {
                "spearman": None if correlation is None else asdict(correlation),
                "candidates": number,
                "points": [list(one) for one in self.points],
            },
            "front": [asdict(one) for one in self.front],
            "default": self.default,
            "winner": None if self.winner is None else self.winner.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "strata": [one.to_dict() for one in self.strata],
            "ablations": {name: one.to_dict() for name, one in self.ablations.items()},
            "left_out": self.left_out,
            "held_out": self.held_out,
            "answers": self.answers,
            "seconds": round(self.seconds, 1),
            "timing": {
                name: [before and round(before, 1), round(took, 1)] for name, (before, took) in self.timing.items()
            },
        }

    def sentences(self) -> list[str]:
        """Returns the findings, one sentence per stage."""
        found = [f"Gate: {self.gate.reason}{'; passed by force' * self.is_forced}."]
        if self.bands is not None:
            found.append(f"Step-Saliency: {self.bands.reason}.")
        for mechanism, heads in self.heads.items():
            most = f" (the limit is {MOST})" * (len(heads.chosen) == MOST)
            untried = f"; no time for {heads.untried} more" * bool(heads.untried)
            share = f"{len(heads.chosen)}{most} of {len(heads.gains)} tried{untried}"
            found.append(f"Heads that profit from {mechanism}: {share}.")
        if self.order[0] is not None:
            rho = amount(self.order[0], 2)
            found.append(f"Order of heads by signed saliency: rank correlation with their gains {rho}.")
        if self.halving is not None:
            correlation, number = self.correlation
            rho = "" if correlation is None else f"; rank correlation of proxy and generation {amount(correlation, 2)}"
            found.append(f"Selection: {self.halving.reason} ({number} candidates answered problems{rho}).")
        if self.chosen != self.default:
            rule = "none" if self.default is None else f"#{self.default}"
            found.append(f"Chosen by hand before the held-out split was opened: #{self.chosen}; by the rule {rule}.")
        if self.measured is None:
            found.append("The empty preset stays: the base model, bit for bit.")
        else:
            found.append(f"Layers and heads of the winner: {self.band}.")
            found.append(f"Held out: {self.measured}")
        return found + self.sentences_of_strata()

    def sentences_of_strata(self) -> list[str]:
        """Returns the verdicts on strata: which gain, which lose, and how many problems the others lack."""
        found = []
        for verdict, words in ((GAIN, "Gains"), (HARM, "Harms")):
            own = [f"{one.name} ({percent(one.delta, '+')} points)" for one in self.strata if one.verdict == verdict]
            if own:
                found.append(f"{words}: {'; '.join(own)}.")
        lacking = [one for one in self.strata if not one.is_harmless and one.verdict != HARM]
        bound = f"{self.run.get('bound', 0):g} point{'s' * (self.run.get('bound') != 1)}"
        if lacking:
            needs = "; ".join(f"{one.name} has {one.problems}, needs about {one.needed}" for one in lacking)
            found.append(f"A loss of {bound} is not excluded in {len(lacking)} of {len(self.strata)} strata: {needs}.")
        elif self.strata and not any(one.verdict == HARM for one in self.strata):
            found.append(f"A loss of {bound} is excluded in every stratum (one-sided, 95 %).")
        return found

    def preset(
        self,
        name: str,
        base_model: str,
        architecture: Architecture,
        command: str,
        dataset: str,
        revision: str | None = None,
    ) -> Preset:
        """Returns the winner as a preset, with the measurement as its provenance.

        Args:
            name: The name of the preset.
            base_model: The Hub id of the base model.
            architecture: The architecture of the base model.
            command: The command that was run.
            dataset: The name of the problems.
            revision: The revision of the base model.

        Raises:
            StepFlowConfigError: A preset may not have this name or base model.
        """
        measured, deltas = self.measured, []
        if measured is not None:
            delta = measured.delta
            ends = (delta.value, *(delta.value if end is None else end for end in (delta.low, delta.high)))
            points = {key: round(100 * end, 4) for key, end in zip(("delta", "low", "high"), ends, strict=True)}
            deltas.append({"metric": "accuracy", **points, "confidence": CONFIDENCE})
        machine = [self.about[key] for key in ("platform", "processor", "accelerator", "device") if key in self.about]
        provenance = {
            "kind": "measured",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "library_version": version("hf-stepflow"),
            "dataset": dataset[:_TEXT],
            "n": self.gate.problems if measured is None else measured.problems,
            "deltas": deltas,
            "p_value": None if measured is None else float(f"{measured.p_value:.3g}"),
            "command": command[:_COMMAND],
            "verdict": self.verdict,
            "seed": self.run["seed"],
            "machine": ", ".join(map(str, machine))[:_TEXT],
        }
        base = {"base_model_name_or_path": base_model, "base_model_revision": revision}
        settings = StepFlowSettings(**{**self.run["settings"], **self.settings, **base})
        first = self.sentences_of_strata()  # notes may be cut short
        notes = " ".join([*first, *(one for one in self.sentences() if one not in first)])[:_NOTES]
        preset = Preset(name, base_model, revision, architecture, settings, provenance, None, notes)
        problems = preset_problems(preset.to_dict(), name)
        if problems:
            raise StepFlowConfigError(f"the preset {name!r}: {problems[0]}", hint=problems[0].hint)
        return preset

    def __str__(self) -> str:
        lines = self.sentences()
        if self.winner is not None:
            lines.append(f"Settings: {json.dumps(acting(self.settings))}")
        if self.ablations:
            lines += ["", f"{'ablation (held out)':<28} {'points against the base':>26} {'winner against it':>22}"]
            for name, one in self.ablations.items():
                lines.append(f"{name:<28} {percent(one.base.delta, '+'):>26} {percent(one.winner.delta, '+'):>22}")
        lines += [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        if self.strata:
            lines += ["", f"{'stratum (held out)':<28} {'n':>5} {'base, %':>8} {'difference, points':>22}  verdict"]
            for row in self.strata:
                shown = f"{row.problems:>5} {100 * row.base:>8.1f} {percent(row.delta, '+'):>22}  {row.verdict}"
                lines.append(f"{row.name:<28} {shown}")
        return "\n".join([*lines, "", f"Verdict: {self.verdict}"])


def front_table(front: Sequence[Outcome], default: int | None) -> str:
    """Returns the candidates to choose from as lines of text; a star marks the one that the rule picks."""
    if not front:
        return "No candidate is better than the base in gain, damage or cost."
    lines = [f"{'candidate':>10} {'n':>6} {'gain, points':>13} {'breaks, %':>10} {'tokens':>7}  settings"]
    for one in front:
        name = f"{'*' * (one.trial == default)}#{one.trial}"
        figures = f"{one.problems:>6} {100 * one.gain:>+13.1f} {100 * one.damage:>10.1f} {f'x{one.cost:.2f}':>7}"
        harm = f"; harms {', '.join(one.harmed)}" * bool(one.harmed)
        lines.append(f"{name:>10} {figures}  {one.words}{harm}")
    return "\n".join(lines)


def acting(settings: Settings) -> Settings:
    """Returns the settings that differ from the empty preset's."""
    return {name: value for name, value in settings.items() if value != EMPTY[name]}


def write_preset(preset: Preset, path: Path) -> None:
    """Writes a preset to a file.

    Raises:
        StepFlowFileError: The path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(preset.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StepFlowFileError(f"{str(path)!r} cannot be written: {error}") from error
