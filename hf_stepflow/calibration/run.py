"""One run: its budget, and the model's answers and likelihoods under any settings, each computed once and kept."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.engine import Engine
from hf_stepflow.evaluation.progress import announce
from hf_stepflow.evaluation.responses import ResponseMaker
from hf_stepflow.evaluation.run import batch_seed
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.evaluation.scoring import batches, score_traces
from hf_stepflow.evaluation.store import digest
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.forward import FlowRules
from hf_stepflow.runtime.step_detector import StepVocabulary

from .candidates import Settings
from .forecast import Forecast, Stage, in_clock
from .proxy import Row, Scored
from .search import RUN
from .splits import Batch
from .verdict import RANDOM_STEPS
from .work_folder import Workers, WorkFolder

# Candidates of the search by default, and under a budget of time, which ends the search long before.
CANDIDATES = 40
MANY_CANDIDATES = 1000

# The share of the time that is spent when each stage ends. Stages leave the time that they do not use to the next.
ENDS = {
    "traces": 0.15,
    "bands": 0.2,
    "bridge heads": 0.26,
    "bridge heads together": 0.29,
    "temperature heads": 0.35,
    "temperature heads together": 0.38,
    "search": 0.54,
    "generation": 0.71,
    "verdict": 0.85,
    "ablations": 1.0,
}

# The kinds of units of a stage, by which time is forecast: a batch under some settings, a pass over scored responses.
ANSWERS, SCORES = "batches", "passes"

_UNITS = {"s": 1, "m": 60, "h": 3600}

# The shares of the calibration split that candidates have answered after each rung.
_RUNGS = (0.25, 0.5, 1.0)

# The number of ablations that a forecast counts with.
_ABLATIONS = 5

# Tokens that are scored together, including padding.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Budget:
    """The most that a calibration may spend.

    Attributes:
        candidates: The largest number of settings that the search scores.
        seconds: The time for all stages, or None for no limit.
    """

    candidates: int = CANDIDATES
    seconds: float | None = None

    def end_of(self, stage: str) -> float | None:
        """Returns the second of the run at which a stage, a key of `ENDS`, has to end; None for no limit."""
        return None if self.seconds is None else ENDS[stage] * self.seconds


def parse_budget(text: "str | int | Budget") -> Budget:
    """Reads a budget: `40` candidates, or `90s`, `20m`, `1.5h`.

    Raises:
        StepFlowInputError: The text is neither, or nothing is left to spend.
    """
    if isinstance(text, Budget):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text).strip())
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0 or (not match[2] and number != int(number)):
        raise StepFlowInputError(
            f"the budget must be a number of candidates or a time, got {text!r}", hint="write 40, 90s, 20m or 1.5h"
        )
    if not match[2]:
        return Budget(candidates=int(number))
    return Budget(MANY_CANDIDATES, number * _UNITS[match[2]])


@dataclass(frozen=True)
class Sampling:
    """How responses are generated, by the arguments of `calibrate` of the same names."""

    seed: int = 0
    samples: int = 1
    temperature: float = 0.7
    max_new_tokens: int = 2048
    batch_size: int = 16
    run_code: bool = False
    template: dict[str, Any] = field(default_factory=dict)


class StageBar:
    """The progress bar of a stage, with the time spent and left.

    Args:
        bar: The bar, of tqdm.
        forecast: The forecast, in which the stage has begun.
    """

    def __init__(self, bar: Any, forecast: Forecast):
        self._bar, self._forecast = bar, forecast
        self.is_hidden = bool(bar.disable)

    def update(self, units: int = 1) -> None:
        """Takes note that units are done."""
        self._forecast.advance(units)
        self._show()
        self._bar.update(units)

    def show_speed(self, start: float, tokens: int) -> None:
        """Shows the speed of the batch that runs, which began at `start` and has so many tokens."""
        self._show(f", {tokens / (time.perf_counter() - start):,.0f} tokens/s")

    def _show(self, more: str = "") -> None:
        left = self._forecast.left()
        known = "?" if left is None else in_clock(left)
        self._bar.set_postfix_str(f"{in_clock(self._forecast.elapsed())} / {known} left{more}", refresh=bool(more))


def planned(budget: Budget, *, traces: int, held_out: int, heads: tuple[int, int]) -> list[Stage]:
    """Returns the stages of a run with their units, as far as they can be known before.

    Args:
        budget: The budget.
        traces: The number of batches of the calibration split.
        held_out: The number of batches of the held-out split.
        heads: The numbers of heads to try under the bridge and under the length temperature.
    """
    ends = rung_ends(traces)
    alive = [max(1, -(-RUN // 2**rung)) for rung in range(len(ends))]
    rungs = [
        (f"rung {rung + 1} of {len(ends)}", ANSWERS, alive[rung] * (end - before), "generation")
        for rung, (before, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    units = [
        ("traces", ANSWERS, traces, "traces"),
        ("bridge heads", SCORES, heads[0], "bridge heads together"),
        ("temperature heads", SCORES, heads[1], "temperature heads together"),
        ("search", SCORES, budget.candidates, "search"),
        *rungs,
        ("verdict", ANSWERS, 2 * held_out, "verdict"),
        ("ablations", ANSWERS, _ABLATIONS * held_out, "ablations"),
    ]
    return [Stage(name, kind, number, budget.end_of(end)) for name, kind, number, end in units]


def rung_ends(batches: int) -> list[int]:
    """Returns the number of batches that candidates have answered after each rung."""
    return sorted({max(1, round(share * batches)) for share in _RUNGS})


@dataclass
class CalibrationRun:
    """A model with StepFlow attached, and all that is asked of it.

    Every process calls the same methods in the same order; each does its share, and all get the whole.

    Attributes:
        model: The model.
        tokenizer: The model's tokenizer.
        sampling: How responses are generated.
        work: The folder that keeps results.
        workers: The processes that share the work.
        budget: The most that may be spent.
        progress: Whether to show progress bars.
        engine: What answers problems in place of the model; None for the model.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    work: WorkFolder
    workers: Workers
    budget: Budget = Budget()
    progress: bool = True
    engine: Engine | None = None
    forecast: Forecast = field(init=False)

    def __post_init__(self) -> None:
        self.forecast = Forecast(self.work.spent)

    def answers(
        self,
        arms: Mapping[str, Settings | None],
        batches: Sequence[Batch],
        label: str,
        *,
        end: float | None = None,
        vocabulary: StepVocabulary | None = None,
    ) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """Generates responses under several settings, with the same batches and seeds.

        Args:
            arms: {name: settings}; None is the base.
            batches: The batches to answer, in order.
            label: The label of the progress bar.
            end: The second of the run from which no batch is begun; None for no limit.
            vocabulary: The step rules of the control with random steps; None takes the model's own.

        Returns:
            The leading batches that every arm has answered: their responses by arm, as `evaluate` records them with
            the number of the batch; and the number of these batches.
        """
        rules = None if vocabulary is None else RANDOM_STEPS

        def found(batch: Batch, settings: Settings | None) -> Any:
            return self.work.get("answers", settings, batch.name, rules)

        def is_answered(batch: Batch) -> bool:
            return all(found(batch, settings) is not None for settings in arms.values())

        todo = [batch for batch in batches if not is_answered(batch)]
        missing = sum(found(batch, settings) is None for batch in todo for settings in arms.values())
        with self.bar(label, -(-missing // self.workers.count), ANSWERS) as bar:
            for number, batch in enumerate(self.workers.share(todo)):
                if end is not None and self.work.spent() >= end:
                    break
                order = list(arms.values())
                for settings in order if number % 2 == 0 else reversed(order):  # arms take turns to warm up
                    if found(batch, settings) is None:
                        made = self._answer(settings, batch, vocabulary, bar)
                        self.work.put("answers", made, settings, batch.name, rules)
                        bar.update()
        self.workers.wait()
        done = len(batches)
        if end is not None:  # decided once, so that a continued run has the same batches
            done = self.decide(
                "done",
                lambda: next((at for at, one in enumerate(batches) if not is_answered(one)), len(batches)),
                list(arms.values()),
                [batch.name for batch in batches],
                rules,
            )
        results = {
            name: [
                {**result, "arm": name, "batch": number}
                for number, batch in enumerate(batches[:done])
                for result in found(batch, settings)
            ]
            for name, settings in arms.items()
        }
        return results, done

    def scores(self, settings: Settings | None, rows: Sequence[Row]) -> list[Scored]:
        """Scores responses by forward passes: their likelihoods, and the tokens that greedy decoding gets right.

        Args:
            settings: The settings; None is the base.
            rows: The responses with their prompts.
        """
        pairs = [(list(row.prompt), list(row.response)) for row in rows]
        parts = list(batches(pairs, _BATCH_TOKENS))
        names = [digest([rows[index].ids for index in part]) for part in parts]
        missing = [at for at, name in enumerate(names) if self.work.get("scores", settings, name) is None]
        for at in self.workers.share(missing):
            batch = [pairs[index] for index in parts[at]]
            scores = score_traces(self.model, batch, False if settings is None else settings)
            found = [[one.log_likelihood, one.errors, one.tokens] for one in scores]
            self.work.put("scores", found, settings, names[at])
        self.workers.wait()
        values: dict[int, Scored] = {}
        for part, name in zip(parts, names, strict=True):
            for index, value in zip(part, self.work.get("scores", settings, name), strict=True):
                values[index] = Scored(*value)
        return [values[index] for index in range(len(rows))]

    def decide(self, kind: str, make: Callable[[], Any], *parts: Any) -> Any:
        """Returns a decision, JSON-ready, that the first process makes once in a run.

        All processes have the same decisions, and so does a continued run. `parts` distinguish those of one kind.
        """
        if self.workers.is_first and self.work.get("decisions", kind, *parts) is None:
            self.work.put("decisions", {"value": make()}, kind, *parts)
        self.workers.wait()
        return self.work.get("decisions", kind, *parts)["value"]

    def is_over(self, stage: str, *parts: Any) -> bool:
        """Returns whether the time of a stage, a key of `ENDS`, is up: a decision, distinguished by `parts`."""
        end = self.budget.end_of(stage)
        return end is not None and self.decide("is_over", lambda: self.work.spent() >= end, *parts)

    def say(self, text: str) -> None:
        """Writes a line above the progress bars, in the first process and if progress is shown."""
        announce(text, self.progress and self.workers.is_first)

    @contextmanager
    def bar(self, label: str, total: int, kind: str) -> Iterator["StageBar"]:
        """Begins a stage: says how long it will take, and yields its progress bar, which the first process shows.

        Args:
            label: The name of the stage.
            total: The number of its units; a stage without any is not begun.
            kind: The kind of its units, `ANSWERS` or `SCORES`.
        """
        from huggingface_hub.utils import tqdm

        hidden = not self.progress or not self.workers.is_first or total == 0
        if total:
            is_new = label not in self.forecast.kept  # the first batch of a stage may have been asked for before
            seconds = self.forecast.begin(label, kind, total)
            if is_new and seconds is not None:
                left = self.forecast.left()
                whole = "" if left is None else f"; {in_clock(left)} left in all"
                self.say(f"{label}: about {in_clock(seconds)}{whole}")
        shape = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit}{postfix}"
        with tqdm(total=total, desc=label, unit=kind, disable=hidden, leave=False, bar_format=shape) as shown:
            try:
                yield StageBar(shown, self.forecast)
            finally:
                self.forecast.finish()

    def _answer(
        self, settings: Settings | None, batch: Batch, vocabulary: StepVocabulary | None, bar: "StageBar"
    ) -> list[dict[str, Any]]:
        sampling, runtime = self.sampling, self.model.stepflow_runtime
        arm, override = Arm(stepflow=False if settings is None else settings), nullcontext()
        if vocabulary is None:
            vocabulary = runtime.rules.vocabulary
        else:
            assert settings is not None
            plan = runtime.plan_for(runtime.settings.replace(**settings))
            arm, override = Arm(stepflow=True), runtime.override(FlowRules(plan, vocabulary))
        arguments = (
            sampling.max_new_tokens,
            {"do_sample": True, "temperature": sampling.temperature} if sampling.samples > 1 else {},
            sampling.template,
            sampling.run_code,
            settings is None,
            None if bar.is_hidden else partial(bar.show_speed, time.perf_counter()),
        )
        sampler: ResponseMaker
        if self.engine is None or arm.stepflow is True:  # random steps are a state of the model here
            sampler = Sampler(self.model, self.tokenizer, vocabulary, *arguments)
        else:
            arm = replace(arm, stepflow=arm.stepflow and runtime.settings.replace(**arm.stepflow).to_dict())
            sampler = self.engine.sampler({"": arm}, *arguments)
        rows = [(one, sampler.encode(one), sample) for one in batch.problems for sample in range(sampling.samples)]
        rows.sort(key=lambda row: len(row[1]))
        seed = batch_seed(int(digest([sampling.seed, batch.name])[:8], 16), 0)
        with override:
            made = sampler.run(arm, [problem for problem, _, _ in rows], [prompt for _, prompt, _ in rows], seed)
        return [
            {"problem": problem.id, "sample": sample, **result}
            for (problem, _, sample), result in zip(rows, made, strict=True)
        ]
