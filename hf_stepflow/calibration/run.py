"""One run: what it may spend, and the model's answers and likelihoods under any settings, each computed once."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.run import batch_seed
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.evaluation.scoring import score_traces
from hf_stepflow.evaluation.store import digest
from hf_stepflow.presets.preset import rule_preset
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.forward import FlowRules
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.step_detector import StepVocabulary

from .splits import Batch
from .traces import Row
from .work_folder import Workers, WorkFolder

Settings = dict[str, Any]

# Tokens that are scored together, padding included.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Sampling:
    """How responses are generated.

    Attributes:
        seed: of everything that is drawn.
        samples: responses to each problem; 1 is greedy.
        temperature: of more than one.
        max_new_tokens: tokens that a response may have.
        batch_size: problems that are answered together.
        run_code: allow running programs that the model wrote.
        template: further arguments of the chat template.
    """

    seed: int = 0
    samples: int = 1
    temperature: float = 0.7
    max_new_tokens: int = 2048
    batch_size: int = 16
    run_code: bool = False
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def generation(self) -> dict[str, Any]:
        """The arguments of `generate` that follow."""
        return {"do_sample": True, "temperature": self.temperature} if self.samples > 1 else {}


@dataclass
class CalibrationRun:
    """Answers questions about one model with StepFlow attached.

    Every process calls the same methods in the same order; each does its share, and all get the whole.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        sampling: how responses are generated.
        work: where results are kept.
        workers: who shares the work.
        progress: show progress bars.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    work: WorkFolder
    workers: Workers
    progress: bool = True

    def answers(
        self,
        arms: Mapping[str, Settings | None],
        batches: Sequence[Batch],
        what: str,
        *,
        end: float | None = None,
        steps: "tuple[str, StepVocabulary] | None" = None,
    ) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """Generates under some settings, the same batches and seeds for all.

        Args:
            arms: settings by name; None is the base.
            batches: what to answer, from the first on.
            what: stands before the progress bar.
            end: seconds of the run after which no batch is begun; None for no limit.
            steps: other step rules and what tells them apart, for controls.

        Returns:
            For each arm the results of the leading batches that every arm has answered, as `evaluate` makes them, with
            the batch's number; and how many batches these are.
        """
        rules = None if steps is None else steps[0]

        def found(batch: Batch, settings: Settings | None) -> Any:
            return self.work.get("answers", settings, batch.name, rules)

        def all_found(batch: Batch) -> bool:
            return all(found(batch, settings) is not None for settings in arms.values())

        todo = [batch for batch in batches if not all_found(batch)]
        missing = sum(found(batch, one) is None for batch in todo for one in arms.values())
        with self.bar(what, -(-missing // self.workers.count), "batch") as advance:
            for number, batch in enumerate(self.workers.share(todo)):
                if end is not None and self.work.spent() >= end:
                    break
                order = list(arms.values())
                for settings in order if number % 2 == 0 else reversed(order):  # none is always the one to warm up
                    if found(batch, settings) is None:
                        self.work.put("answers", self._answer(settings, batch, steps), settings, batch.name, rules)
                        advance()
        self.workers.wait()
        done = len(batches)
        if end is not None:  # what is there when time is up is what counts, also when the run is continued
            done = self.decide(
                "done",
                lambda: next((at for at, one in enumerate(batches) if not all_found(one)), len(batches)),
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

    def likelihoods(self, settings: Settings | None, rows: Sequence[Row]) -> list[float]:
        """The log-likelihood of given responses, in nats, one forward pass for each part of them.

        Args:
            settings: None is the base.
            rows: prompts and responses.
        """
        parts = _parts(rows)
        names = [digest([rows[index].ids for index in part]) for part in parts]
        missing = [at for at, name in enumerate(names) if self.work.get("likelihoods", settings, name) is None]
        for at in self.workers.share(missing):
            batch = [(list(rows[index].prompt), list(rows[index].response)) for index in parts[at]]
            scores = score_traces(self.model, batch, False if settings is None else settings)
            self.work.put("likelihoods", [one.log_likelihood for one in scores], settings, names[at])
        self.workers.wait()
        values = [0.0] * len(rows)
        for part, name in zip(parts, names, strict=True):
            for index, value in zip(part, self.work.get("likelihoods", settings, name), strict=True):
                values[index] = value
        return values

    def decide(self, kind: str, make: Callable[[], Any], *parts: Any) -> Any:
        """What the first process decides, for all of them and for when the run is continued.

        Args:
            kind: what is decided.
            make: makes the decision, JSON-ready; it runs in the first process alone, and once in a run.
            *parts: what tells it from others of its kind.
        """
        if self.workers.is_first and self.work.get("decisions", kind, *parts) is None:
            self.work.put("decisions", {"value": make()}, kind, *parts)
        self.workers.wait()
        return self.work.get("decisions", kind, *parts)["value"]

    def is_over(self, stage_end: float | None, *parts: Any) -> bool:
        """Whether time is up, the same for all processes and when the run is continued.

        Args:
            stage_end: seconds of the run, or None for no limit.
            *parts: what tells this question from others.
        """
        if stage_end is None:
            return False
        return self.decide("is_over", lambda: self.work.spent() >= stage_end, *parts)

    def _answer(
        self, settings: Settings | None, batch: Batch, steps: "tuple[str, StepVocabulary] | None"
    ) -> list[dict[str, Any]]:
        sampling, runtime = self.sampling, self.model.stepflow_runtime
        arm, rules = Arm(stepflow=False if settings is None else settings), nullcontext()
        vocabulary = runtime.rules.vocabulary
        if steps is not None:
            assert settings is not None
            vocabulary, arm = steps[1], Arm(stepflow=True)
            rules = runtime.override(FlowRules(runtime.plan_for(runtime.settings.replace(**settings)), vocabulary))
        sampler = Sampler(
            self.model,
            self.tokenizer,
            vocabulary,
            sampling.max_new_tokens,
            sampling.generation,
            sampling.template,
            sampling.run_code,
            keep_ids=settings is None,
        )
        rows = [
            (problem, sampler.encode(problem), sample)
            for problem in batch.problems
            for sample in range(sampling.samples)
        ]
        rows.sort(key=lambda row: len(row[1]))
        seed = batch_seed(int(digest([sampling.seed, batch.name])[:8], 16), 0)
        with rules:
            made = sampler.run(arm, [row[0] for row in rows], [row[1] for row in rows], seed)
        return [
            {"problem": problem.id, "sample": sample, **result}
            for (problem, _, sample), result in zip(rows, made, strict=True)
        ]

    @contextmanager
    def bar(self, what: str, total: int | None, unit: str) -> Iterator[Callable[[], None]]:
        """A progress bar of the first process; calling what it gives advances it."""
        from huggingface_hub.utils import are_progress_bars_disabled
        from tqdm import tqdm

        hidden = not self.progress or are_progress_bars_disabled() or not self.workers.is_first
        with tqdm(total=total, desc=what, unit=unit, disable=hidden or total == 0, leave=False) as bar:
            yield lambda: bar.update(1)


def _parts(rows: Sequence[Row]) -> list[list[int]]:
    """Rows of like length that go through the model together, by index."""
    parts: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda one: len(rows[one].ids)):
        if parts and (len(parts[-1]) + 1) * len(rows[index].ids) <= _BATCH_TOKENS:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


@contextmanager
def attached(model: Any, tokenizer: Any, stepflow: Any) -> Iterator[None]:
    """The model in evaluation mode with StepFlow attached; as it was afterwards.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        stepflow: markers and step rules, as for `attach`; None takes those that are attached, or the rule.

    Raises:
        StepFlowInputError: some are attached, and others were given.
    """
    was_training = model.training
    attaches = getattr(model, "stepflow_runtime", None) is None
    if not attaches and stepflow is not None:
        raise StepFlowInputError(
            "StepFlow is attached to this model with settings of its own, and stepflow= was given as well",
            hint="leave stepflow out, or call model.detach_stepflow() first",
        )
    if attaches:
        settings = rule_preset(model).settings.to_dict() if stepflow is None else stepflow
        if stepflow is None:
            settings |= {"base_model_name_or_path": None}
        StepFlowModelForCausalLM.attach(model, settings, tokenizer=tokenizer)
    try:
        model.eval()
        yield
    finally:
        if attaches:
            model.detach_stepflow()
        model.train(was_training)


# Candidates of the search where no budget is given, or only a time is: more than a short time allows.
CANDIDATES = 40
MANY_CANDIDATES = 1000

# Up to which share of the time each stage may run. What one leaves over, the next ones have.
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

_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes:
        candidates: settings that the search scores, at most.
        seconds: of all stages together, or None for no limit.
    """

    candidates: int = CANDIDATES
    seconds: float | None = None

    def end_of(self, stage: str) -> float | None:
        """Seconds from the start after which a stage begins nothing more; None for no limit.

        Args:
            stage: a key of `ENDS`.
        """
        return None if self.seconds is None else ENDS[stage] * self.seconds


def parse_budget(text: "str | int | Budget") -> Budget:
    """A budget from what a user writes: `40` candidates, or `90s`, `20m`, `1.5h`.

    Raises:
        StepFlowInputError: something else, or nothing at all to spend.
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
