"""calibrate: from a model and some problems to settings that are better than the base, or the word that none are.

The stages in their order: gate, traces, bands, settings, verdict. Everything is chosen on the calibration split; the
held-out split is answered once, at the end, by the base, the winner, and the winner's ablations.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import hf_stepflow
from hf_stepflow.evaluation.answers import check_may_run
from hf_stepflow.evaluation.checkers import demand_math_verify
from hf_stepflow.evaluation.problem import EvalProblem, check_unique, problem_of
from hf_stepflow.evaluation.sampler import check_generation
from hf_stepflow.evaluation.store import another_run, digest, machine, model_digest
from hf_stepflow.prompts import encode_prompt, encode_response
from hf_stepflow.runtime.errors import StepFlowInputError

from .bands import Bands, propose_bands, quarter_rule
from .candidates import EMPTY, Settings, Space, mechanisms
from .gate import Gate, look_for_trend
from .heads import Head, Heads, find_heads, floor_on, temperature_on
from .proxy import proxy_score
from .result import Ablation, Calibration
from .run import Budget, CalibrationRun, Sampling, attached, parse_budget
from .search import Halving, Proposer, Results, Trial, halve, rank_correlation, search, to_run
from .splits import Batch, Splits, batches_of, split_problems
from .traces import Row, Solved, read_answers, rows_to_score, short_and_easy
from .verdict import BASE, RANDOM_STEPS, ablations, depends_on_steps, measure, random_steps
from .work_folder import Workers, WorkFolder

STEPFLOW = "stepflow"

# Shares of the calibration split that candidates answer up to each rung.
_RUNGS = (0.25, 0.5, 1.0)

# The number of the trial that every search begins with: the paper's settings. What they do is always asked.
_PAPER = 0

# Problems whose responses are scored for each candidate.
SCORED = 96


def calibrate(
    model: Any,
    tokenizer: Any,
    problems: Iterable[Any],
    *,
    budget: "str | int | Budget" = Budget(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    work: str | Path | None = None,
    force: bool = False,
    stepflow: Any = None,
    samples: int = 1,
    temperature: float = 0.7,
    max_new_tokens: int = 2048,
    batch_size: int = 16,
    scored: int = SCORED,
    run_code: bool = False,
    template: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Calibration:
    """Looks for settings that are better than the base on problems that played no part in choosing them.

    Under `accelerate launch` the processes share the work; they need the same work folder.

    Args:
        model: a causal language model, StepFlow attached or not; left as it was. Judge in float32 on a CPU.
        tokenizer: its tokenizer.
        problems: `EvalProblem`s or dicts (see `load_problems`); those with a `trace` are scored on it.
        budget: a number of candidates for the search, or a time for everything: 40, "90s", "20m", "1.5h".
        seed: of splits, sampling, search and resampling.
        work: folder in which everything is kept as soon as it is found; a run that was stopped is continued there, and
            another one refused. None keeps nothing.
        force: go on where errors do not rise with length; also in the folder of a run that ended there.
        stepflow: markers and step rules, as for `attach`; None takes those that are attached, or the rule.
        samples: responses to each problem; 1 is greedy, more are sampled.
        temperature: of the sampling.
        max_new_tokens: tokens that a response may have.
        batch_size: problems that are answered together.
        scored: problems of the calibration split whose responses are scored for each candidate.
        run_code: allow running programs that the model wrote.
        template: further arguments of the chat template.
        progress: show progress bars.

    Raises:
        StepFlowInputError: arguments that make no sense, too few problems or too long ones, another run's folder, a
            package that is not installed.
        StepFlowError: a model that StepFlow cannot reach, or markers that its tokenizer cannot write.
    """
    spend = parse_budget(budget)
    sampling = Sampling(seed, samples, temperature, max_new_tokens, batch_size, run_code, dict(template or {}))
    check_numbers(sampling, scored)
    asked = check_unique(one if isinstance(one, EvalProblem) else problem_of(one) for one in problems)
    for problem in asked:
        check_may_run(problem, run_code)
    splits = split_problems(asked, seed)
    demand_packages(asked)
    check_lengths(model, tokenizer, asked, sampling)
    with attached(model, tokenizer, stepflow):
        run = {
            "problems": digest([vars(problem) for problem in asked]),
            "n_problems": len(asked),
            "model": model_digest(model),
            "tokenizer": digest([len(tokenizer), tokenizer.chat_template]),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "attention": model.stepflow_runtime.base_implementation,
            "settings": model.stepflow_runtime.settings.replace(**EMPTY).to_dict(),
            "sampling": vars(sampling),
            "seed": seed,
            "budget": vars(spend),
            "scored": scored,
            "library": hf_stepflow.__version__,
        }
        about = {"model": getattr(model.config, "_name_or_path", ""), **machine(model.device)}
        workers = Workers.join()
        if workers.count > 1 and work is None:
            raise StepFlowInputError("several processes meet in a work folder, and none was given", hint="pass work=")
        if not workers.is_first:  # the first makes the folder
            workers.wait()
        folder = WorkFolder(work, run, about, workers.count)
        if workers.is_first:
            workers.wait()
        laboratory = CalibrationRun(model, tokenizer, sampling, folder, workers, progress)
        return _Stages(laboratory, spend, splits, scored).run(run, about, force)


class _Stages:
    """The stages of one calibration, each a method that fills in a part of the result."""

    def __init__(self, laboratory: CalibrationRun, budget: Budget, splits: Splits, scored: int):
        self.lab = laboratory
        self.budget = budget
        self.splits = splits
        self.scored = scored
        self.seed = laboratory.sampling.seed
        size = laboratory.sampling.batch_size
        self.calibration = batches_of(splits.calibration, size, "calibration", self.seed)
        self.held_out = batches_of(splits.held_out, size, "held-out", self.seed)
        self.heads: dict[int, int] = laboratory.model.stepflow_runtime.heads
        self.rows: list[Row] = []
        self.easy: set[str] = set()
        self.base: list[float] = []

    def run(self, run: dict[str, Any], about: dict[str, Any], force: bool) -> Calibration:
        """All stages, or those up to the gate where it is closed."""
        solved = self.solve()
        errors = [1 - one.accuracy for one in solved]
        measures = {"tokens": [one.tokens for one in solved], "steps": [one.steps + 1 for one in solved]}
        gate = look_for_trend(errors, measures, self.seed)
        found = Calibration(run, about, gate, held_out=len(self.splits.held_out))
        found.is_forced = self.is_forced(found.gate, force)
        if found.gate.is_open or found.is_forced:
            self.rows = rows_to_score(solved, self.lab.tokenizer, self.lab.sampling.template, self.scored)
            self.easy = short_and_easy(solved)
            self.base = self.lab.likelihoods(None, self.rows)
            bases = self.context_lengths(solved)
            found.bands = self.propose(solved)
            found.heads = self.probe(bases[0])
            tables = {mechanism: heads.table for mechanism, heads in found.heads.items()}
            found.trials = self.search(Space.of(found.bands.proposals, tables, bases))
            self.select(found)
            if found.winner is not None:
                self.judge(found, bases[0])
        found.seconds = self.lab.work.spent()
        return found

    def solve(self) -> list[Solved]:
        """Stage 1: the base's own traces."""
        end = self.budget.end_of("traces")
        self.lab.answers({BASE: None}, self.calibration[:1], "traces")  # some, however short the time
        results, done = self.lab.answers({BASE: None}, self.calibration, "traces", end=end)
        self.calibration = self.calibration[:done]
        answered = {problem.id for batch in self.calibration for problem in batch.problems}
        problems = [one for one in self.splits.calibration if one.id in answered]
        vocabulary = self.lab.model.stepflow_runtime.rules.vocabulary
        return read_answers(problems, results[BASE], self.lab.tokenizer, vocabulary, self.lab.sampling.template)

    def is_forced(self, gate: Gate, force: bool) -> bool:
        """Whether a closed gate is passed. Once it was, there may be a verdict, which must not be taken back."""
        if gate.is_open:
            return False
        if force:
            return self.lab.decide("forced", lambda: True)
        if self.lab.work.get("decisions", "forced") is not None:
            assert self.lab.work.path is not None  # without a folder nothing is known of another run
            raise another_run(self.lab.work.path, ["force: true there, false now"])
        return False

    def context_lengths(self, solved: Sequence[Solved]) -> list[int]:
        """Lengths from which a length temperature may start: three quarters and half of all traces are longer."""
        prompts = [
            len(encode_prompt(self.lab.tokenizer, one.problem.prompt, **self.lab.sampling.template)) for one in solved
        ]
        lengths = [prompt + one.tokens for prompt, one in zip(prompts, solved, strict=True)]
        return sorted({max(2, int(value)) for value in np.quantile(lengths, [0.25, 0.5])})

    def propose(self, solved: Sequence[Solved]) -> Bands:
        """Stage 2: bands by Step-Saliency and by rule."""
        if self.lab.is_over(self.budget.end_of("bands"), "bands"):
            reason = "there was no time for Step-Saliency"
            return Bands([quarter_rule(sorted(self.heads))], (0, 0), sorted(self.heads), reason=reason)
        traces: dict[bool, list[tuple[list[int], int]]] = {True: [], False: []}
        for one in solved:
            prompt = encode_prompt(self.lab.tokenizer, one.problem.prompt, **self.lab.sampling.template)
            for result in one.results[:1]:
                # The index of decay needs a summary; a trace that was cut off has none.
                if result["outcome"] != "unfinished":
                    traces[result["right"]].append(([*prompt, *result["ids"]], len(prompt)))

        def look() -> dict[str, Any]:
            return propose_bands(
                self.lab.model,
                traces[True],
                traces[False],
                self.lab.tokenizer,
                sorted(self.heads),
                self.seed,
                self.lab.progress,
            ).to_dict()

        return Bands.from_dict(self.lab.decide("bands", look))

    def probe(self, base_length: int) -> dict[str, Heads]:
        """Stage 3: heads, one forward pass each: the shallow half for the bridge, all for the length temperature."""
        layers = sorted(self.heads)
        everywhere = [(layer, head) for layer in layers for head in range(self.heads[layer])]
        shallow = [one for one in everywhere if one[0] in layers[: -(-len(layers) // 2)]]
        # Where time is short, those that are reached are of all layers.
        random.Random(f"{self.seed}/temperature").shuffle(everywhere)
        warm = partial(temperature_on, base=base_length)
        return {
            "OEB": self.try_heads("bridge heads", shallow, floor_on),
            "length temperature": self.try_heads("temperature heads", everywhere, warm),
        }

    def try_heads(self, what: str, heads: list[Head], acting_on: Callable[[Sequence[Head]], Settings]) -> Heads:
        """The heads that profit from one mechanism."""
        ends = {False: self.budget.end_of(what), True: self.budget.end_of(f"{what} together")}

        def is_over(head: Head, together: bool) -> bool:
            return self.lab.is_over(ends[together], what, list(head), together)

        score = partial(_score, self.rows, self.easy)
        with self.lab.bar(what, len(heads), "head") as advance:
            return find_heads(heads, acting_on, self.counted(advance), score, is_over)

    def search(self, space: Space) -> list[Trial]:
        """Stage 3: settings by the proxy."""
        work = self.lab.work
        journal = None if work.path is None else work.path / "optuna.journal"
        proposer = Proposer(space, self.seed, journal) if self.lab.workers.is_first else None
        trials, end = self.budget.candidates, self.budget.end_of("search")

        def propose(number: int) -> dict[str, Any]:
            return self.lab.decide("trial", lambda: proposer.draw(number) if proposer else None, number)

        def tell(number: int, value: float) -> None:
            if proposer is not None:
                proposer.tell(number, value)

        with self.lab.bar("search", trials if end is None else None, "candidate") as advance:
            likelihoods = self.counted(advance)
            return search(
                space,
                trials,
                propose,
                lambda settings: proxy_score(self.rows, self.base, likelihoods(settings), self.easy),
                tell,
                lambda number: self.lab.is_over(end, "search", number),
            )

    def select(self, found: Calibration) -> None:
        """Stage 3: the best few by generation, and how well the proxy foretold it."""
        candidates = to_run([one for one in found.trials if mechanisms(one.settings)], anchor=_PAPER)
        ends = sorted({max(1, round(share * len(self.calibration))) for share in _RUNGS})
        done = [0]

        def answer(alive: Sequence[Trial], rung: int) -> tuple[Results, dict[int, Results]]:
            arms: dict[str, Settings | None] = {BASE: None, **{str(one.number): one.settings for one in alive}}
            batches, end = self.calibration[: ends[rung]], self.budget.end_of("generation")
            results, reached = self.lab.answers(arms, batches, f"rung {rung + 1} of {len(ends)}", end=end)
            if reached <= done[-1]:
                return {}, {}
            done.append(reached)
            return _shares(results[BASE]), {one.number: _shares(results[str(one.number)]) for one in alive}

        nothing = Halving(reason="there was no time to score any candidate")
        found.halving = halve(candidates, len(ends), answer, self.easy) if candidates else nothing
        if found.halving.rungs:
            proxy = {one.number: one.score.value for one in candidates}
            found.points = [(one.trial, proxy[one.trial], one.delta) for one in found.halving.rungs[0]]
            found.correlation = rank_correlation([one[1] for one in found.points], [one[2] for one in found.points])
        found.winner = next((one for one in candidates if one.number == found.halving.winner), None)

    def judge(self, found: Calibration, base_length: int) -> None:
        """Stage 4: the winner on the held-out split, and its ablations."""
        assert found.winner is not None
        winner = found.settings = found.winner.settings
        arms: dict[str, Settings | None] = {BASE: None, STEPFLOW: winner}
        self.lab.answers(arms, self.held_out[:1], "verdict")  # some, however short the time
        results, done = self.lab.answers(arms, self.held_out, "verdict", end=self.budget.end_of("verdict"))
        found.measured = self.measured(results, STEPFLOW)
        variants, found.left_out = ablations(winner, self.heads, base_length, self.seed)
        if depends_on_steps(winner):
            variants[RANDOM_STEPS] = winner
        else:
            found.left_out[RANDOM_STEPS] = "it does not matter to the winner where steps end"
        for left, (name, settings) in zip(range(len(variants), 0, -1), variants.items(), strict=True):
            self.ablate(found, name, settings, self.held_out[:done], 1 / left)

    def ablate(
        self, found: Calibration, name: str, settings: Settings, batches: Sequence[Batch], share: float
    ) -> None:
        """One ablation on the problems that the winner answered, as far as its share of the time left allows."""
        steps = None
        if name == RANDOM_STEPS:
            vocabulary = self.lab.model.stepflow_runtime.rules.vocabulary
            traces = [([*row.ids], len(row.prompt)) for row in self.rows[:32]]
            steps = (RANDOM_STEPS, random_steps(vocabulary, traces, random.Random(f"{self.seed}/cuts").randrange(997)))
        end, spent = self.budget.end_of("ablations"), self.lab.work.spent()
        end = None if end is None else spent + share * (end - spent)
        own, done = self.lab.answers({name: settings}, batches, name, end=end, steps=steps)
        if not done:
            found.left_out[name] = "there was no time"
            return
        both, _ = self.lab.answers({BASE: None, STEPFLOW: found.settings}, batches[:done], name)
        results = {**both, **own}
        found.ablations[name] = Ablation(
            self.measured(results, name), self.measured(results, STEPFLOW, against=name), settings
        )

    def measured(self, results: Mapping[str, Sequence[dict[str, Any]]], name: str, against: str = BASE) -> Any:
        """Two arms held against each other."""
        return measure(results, name, against=against, samples=self.lab.sampling.samples, seed=self.seed)

    def counted(self, advance: Any) -> Any:
        """`likelihoods` of the rows that are scored, counted on a progress bar."""

        def likelihoods(settings: Settings | None) -> list[float]:
            values = self.lab.likelihoods(settings, self.rows)
            advance()
            return values

        return likelihoods


def _score(rows: Sequence[Row], easy: set[str], before: list[float], after: list[float]) -> Any:
    return proxy_score(rows, before, after, easy)


def _shares(results: Sequence[Mapping[str, Any]]) -> Results:
    """Whether each response was right, by problem."""
    shares: Results = {}
    for result in results:
        shares.setdefault(result["problem"], []).append(float(result["right"]))
    return shares


def check_numbers(sampling: Sampling, scored: int) -> None:
    """Refuses numbers that make no sense.

    Args:
        sampling: how responses are generated.
        scored: problems whose responses are scored for each candidate.

    Raises:
        StepFlowInputError: there are some.
    """
    counts = {name: getattr(sampling, name) for name in ("samples", "max_new_tokens", "batch_size")}
    check_generation(counts, sampling.seed, sampling.temperature)
    if type(scored) is not int or scored < 2:
        raise StepFlowInputError(f"scored must be a whole number of at least 2, got {scored!r}")


def demand_packages(problems: Sequence[EvalProblem]) -> None:
    """Checks that what later stages need is installed.

    Args:
        problems: what is asked.

    Raises:
        StepFlowInputError: it is not.
    """
    if find_spec("optuna") is None:
        raise StepFlowInputError(
            "the search for settings needs optuna, which is not installed", hint="pip install 'hf-stepflow[calibrate]'"
        )
    demand_math_verify(problem.kind for problem in problems)


def check_lengths(model: Any, tokenizer: Any, problems: Sequence[EvalProblem], sampling: Sampling) -> None:
    """Refuses problems of either split that the model has no positions for.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        problems: those of both splits.
        sampling: how responses are generated.

    Raises:
        StepFlowInputError: a prompt with the response that may follow, or with its reference trace, is too long.
    """
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is None:
        return
    for problem in problems:
        prompt = len(encode_prompt(tokenizer, problem.prompt, **sampling.template))
        if prompt + sampling.max_new_tokens > room:
            raise StepFlowInputError(
                f"the prompt of problem {problem.id!r} has {prompt} tokens, which with a response of "
                f"max_new_tokens={sampling.max_new_tokens} makes {prompt + sampling.max_new_tokens}; this model has "
                f"{room} positions",
                hint=f"max_new_tokens of at most {max(room - prompt, 0)}, or leave this problem out",
            )
        trace = 0 if problem.trace is None else len(encode_response(tokenizer, problem.trace))
        if prompt + trace > room:
            raise StepFlowInputError(
                f"prompt and trace of problem {problem.id!r} have {prompt} and {trace} tokens; this model has {room} "
                f"positions",
                hint="leave this problem out, or its trace",
            )
