"""calibrate: from a model and problems to settings that are better than the base, or to the finding that none are.

The stages in order: traces, gate, bands, heads, search, generation, verdict. Everything is chosen on the calibration
split. The held-out split is answered once, at the end, by the base, the winner and the winner's ablations.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hf_stepflow.evaluation.answers import UNFINISHED, check_may_run
from hf_stepflow.evaluation.checkers import demand_math_verify
from hf_stepflow.evaluation.engine import Engine
from hf_stepflow.evaluation.markers import describe_markers
from hf_stepflow.evaluation.problem import EvalProblem, as_problems
from hf_stepflow.evaluation.run_checks import FirstResponses, check_steps, warn_of_length, warn_of_markers
from hf_stepflow.evaluation.sampler import check_generation, prepared
from hf_stepflow.evaluation.scoring import score_traces
from hf_stepflow.evaluation.store import another_run, digest, identify, machine
from hf_stepflow.presets.preset import rule_preset
from hf_stepflow.prompts import encode_prompt, encode_response
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.step_detector import SUMMARY, Field

from .bands import Bands, Proposal, propose_bands, quarter_rule
from .candidates import EMPTY, Settings, Space, in_words, mechanisms
from .forecast import Stage
from .gate import Gate, look_for_trend
from .non_inferiority import BOUND
from .order import steepest_band
from .pareto import Outcome, front
from .probe import HIGH, LOW
from .proxy import Row, Solved, read_answers, rows_to_score
from .proxy_stages import Scoring, numbers_of_heads, search_candidates, slopes_of, try_all_heads
from .result import Ablation, Calibration
from .run import ANSWERS, SCORES, Budget, CalibrationRun, Sampling, parse_budget, planned, rung_ends
from .search import Halving, Results, Rung, Trial, halve, rank_correlation, to_run
from .splits import Batch, batches_of, split_problems
from .strata import Strata, source_of
from .verdict import BASE, RANDOM_STEPS, ablations, judge_strata, measure, random_steps
from .work_folder import Workers, WorkFolder

STEPFLOW = "stepflow"

# Takes the candidates that no other beats and the number that the rule picks; returns the number to judge.
Choose = Callable[[Sequence[Outcome], int | None], int | None]

# The trial that every search begins with: the paper's settings, which answer problems whatever their proxy.
_PAPER = 0

# The number of problems whose responses are scored for each candidate by default.
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
    engine: Engine | None = None,
    bound: float = 100 * BOUND,
    sources: Mapping[str, str] | None = None,
    choose: "int | Choose | None" = None,
) -> Calibration:
    """Looks for settings that are better than the base on problems that played no part in choosing them.

    Processes started by `accelerate launch` share the work; they need a common work folder.

    Args:
        model: A causal language model, with or without StepFlow attached; it is left unchanged. Calibrate in float32
            on a CPU for exact verdicts.
        tokenizer: The model's tokenizer.
        problems: `EvalProblem`s or dicts (see `load_problems`); a problem with a `trace` is scored on it.
        budget: A number of candidates for the search, or a time for all stages: 40, "90s", "20m", "1.5h".
        seed: The seed of splits, sampling, search and resampling.
        work: A folder that keeps every result as soon as it is found. An interrupted run continues there; a different
            run is refused. None keeps nothing.
        force: Whether to go on if errors do not rise with length, also in the folder of a run that ended there.
        stepflow: Settings with markers and step rules, as for `attach`; None takes the attached ones, or the rule.
        samples: The number of responses to each problem; a single one is greedy, several are sampled.
        temperature: The temperature of the sampling.
        max_new_tokens: The largest number of tokens in a response.
        batch_size: The number of problems answered together.
        scored: The number of calibration problems whose responses are scored for each candidate.
        run_code: Whether programs that the model wrote may be run.
        template: Further arguments of the chat template.
        progress: Whether to show progress bars.
        engine: What answers problems, for instance a `VllmEngine` of the same model; None for `model`, which computes
            all likelihoods and the control with random steps in any case.
        bound: The loss of accuracy, in points, that has to be excluded in every stratum before a preset is a gain.
        sources: {id: source} of the problems, for strata and gate; None takes the part of the id before the first
            slash, without a level of difficulty.
        choose: The number of the candidate to judge in place of the one that the rule picks, or a function that takes
            the candidates that no other beats and the rule's number, and returns a number. The choice is made before
            the held-out split is opened, and once in a run.

    Returns:
        The findings of every stage, with the winning settings and their verdict.

    Raises:
        StepFlowInputError: An argument is invalid, there are too few problems or too long ones, the folder holds
            another run, or a package is not installed.
        StepFlowError: The model is not supported, or its tokenizer cannot write the markers.

    Example:
        >>> from hf_stepflow import load_problems
        >>> problems = load_problems("reasoner:chains-2", 24)  # some hundreds, with a budget of hours, for a verdict
        >>> result = calibrate(model, tokenizer, problems, budget=2, max_new_tokens=60, work="my-calibration")
        >>> result.verdict
        'no measurable gain'
    """
    spend = parse_budget(budget)
    sampling = Sampling(seed, samples, temperature, max_new_tokens, batch_size, run_code, dict(template or {}))
    counts = {"samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    check_generation(counts, seed, temperature)
    if type(scored) is not int or scored < 2:
        raise StepFlowInputError(f"scored must be a whole number of at least 2, got {scored!r}")
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0.1 <= bound <= 50:
        raise StepFlowInputError(f"bound must be a number of points in [0.1, 50], got {bound!r}", hint="pass 1")
    asked = as_problems(problems)
    sources = {problem.id: source_of(problem.id) for problem in asked} if sources is None else dict(sources)
    unknown = [problem.id for problem in asked if problem.id not in sources]
    if unknown:
        raise StepFlowInputError(f"sources names no source of problem {unknown[0]!r}", hint="name one for every id")
    for problem in asked:
        check_may_run(problem, run_code)
    splits = split_problems(asked, seed)
    _check_packages(asked)
    _check_lengths(model, tokenizer, asked, sampling)
    is_attached = getattr(model, "stepflow_runtime", None) is not None
    if is_attached and stepflow is not None:
        raise StepFlowInputError(
            "stepflow= is given for a model that has StepFlow attached with its own settings",
            hint="leave stepflow out, or call model.detach_stepflow() first",
        )
    if not is_attached and stepflow is None:
        stepflow = rule_preset(model).settings
    with prepared(model, tokenizer, stepflow, attach=True):
        warn_of_length(tokenizer, asked, max_new_tokens)
        prompts = (encode_prompt(tokenizer, problem.prompt, **sampling.template) for problem in asked)
        warn_of_markers(tokenizer, model.stepflow_runtime.settings, prompts)
        header = {
            "problems": digest([problem.asked() | {"trace": problem.trace} for problem in asked]),
            "n_problems": len(asked),
            **identify(model, tokenizer),
            "attention": model.stepflow_runtime.base_implementation,
            "settings": model.stepflow_runtime.settings.replace(**EMPTY).to_dict(),
            "sampling": vars(sampling),
            "seed": seed,
            "budget": vars(spend),
            "scored": scored,
            "bound": bound,
            "sources": digest([sources[problem.id] for problem in asked]),
            "library": version("hf-stepflow"),
        }
        if engine is not None:
            header["engine"] = engine.identity()
        about = {"model": getattr(model.config, "_name_or_path", ""), **machine(model.device)}
        workers = Workers.join()
        if workers.count > 1 and work is None:
            raise StepFlowInputError("several processes need a common work folder, got work=None", hint="pass work=")
        if not workers.is_first:
            workers.wait()  # for the first process to create the folder
        folder = WorkFolder(work, header, about, workers.count)
        if workers.is_first:
            workers.wait()
        run = CalibrationRun(model, tokenizer, sampling, folder, workers, spend, progress, engine)
        return _run_stages(run, *splits, sources, header, about, force, choose)


def _check_packages(problems: Sequence[EvalProblem]) -> None:
    """Refuses to begin without the packages that later stages need."""
    if find_spec("optuna") is None:
        raise StepFlowInputError(
            "the search for settings needs optuna, which is not installed", hint="pip install 'hf-stepflow[calibrate]'"
        )
    demand_math_verify(problem.kind for problem in problems)


def _check_lengths(model: Any, tokenizer: Any, problems: Sequence[EvalProblem], sampling: Sampling) -> None:
    """Refuses problems that, with a response or their trace, have more tokens than the model has positions."""
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is None:
        return
    for problem in problems:
        prompt = len(encode_prompt(tokenizer, problem.prompt, **sampling.template))
        trace = 0 if problem.trace is None else len(encode_response(tokenizer, problem.trace))
        longest = max(sampling.max_new_tokens, trace)
        if prompt + longest > room:
            raise StepFlowInputError(
                f"the prompt of problem {problem.id!r} has {prompt} tokens, its response or trace up to {longest}; "
                f"this model has {room} positions",
                hint=f"use max_new_tokens of at most {max(room - prompt, 0)}, or leave out this problem or its trace",
            )


def _run_stages(
    run: CalibrationRun,
    calibration: list[EvalProblem],
    held_out: list[EvalProblem],
    sources: Mapping[str, str],
    header: dict[str, Any],
    about: dict[str, Any],
    force: bool,
    choose: "int | Choose | None",
) -> Calibration:
    """Runs all stages, or those up to the gate if it is closed."""
    seed, size = run.sampling.seed, run.sampling.batch_size
    whole = batches_of(calibration, size, "calibration", seed)
    held_batches = batches_of(held_out, size, "held-out", seed)
    solved, batches = _solve(run, calibration, whole, len(held_batches), header["scored"])
    measures = {"tokens": [one.tokens for one in solved], "steps": [one.steps + 1 for one in solved]}
    own = [sources[one.problem.id] for one in solved]
    gate = look_for_trend([1 - one.accuracy for one in solved], measures, seed, own)
    lengths_of = {one.id: _length(run, one) for one in (*calibration, *held_out)}
    strata = Strata.of([one.id for one in calibration], [lengths_of[one.id] for one in calibration], sources)
    names = {name: strata.name(name, length) for name, length in lengths_of.items()}
    found = Calibration(header, about, gate, _is_forced(run, gate, force), held_out=len(held_out))
    if gate.is_open or found.is_forced:
        rows = rows_to_score(solved, header["scored"])
        scoring = Scoring(run, rows, names, run.scores(None, rows))
        lengths = _context_lengths(solved)
        counts: dict[str, Any] = {"traces": len(batches), "held_out": len(held_batches)}
        run.forecast.plan(planned(run.budget, **counts, heads=numbers_of_heads(run))[1:])
        found.bands = _propose(run, solved)
        slopes = slopes_of(scoring)
        layers = sorted(run.model.stepflow_runtime.heads)
        band = steepest_band(layers, slopes, len(quarter_rule(layers).oeb_layers)) if slopes else []
        if band and all(one.oeb_layers != band for one in found.bands.proposals):
            found.bands.proposals.append(Proposal("slope", band, []))
        found.heads = try_all_heads(scoring, lengths[0], slopes)
        if slopes:
            tried = list(found.heads["OEB"].gains)
            gains = [found.heads["OEB"].gains[one] for one in tried]
            found.order = rank_correlation([-slopes[one] for one in tried], gains)
        tables = {mechanism: heads.table for mechanism, heads in found.heads.items()}
        found.trials = search_candidates(scoring, Space.of(found.bands.proposals, tables, lengths))
        _select(found, run, batches, names, choose)
        if found.winner is not None:
            _judge(found, found.winner, run, held_batches, lengths[0], rows, names)
    found.seconds, found.timing = run.work.spent(), dict(run.forecast.kept)
    return found


def _solve(
    run: CalibrationRun, problems: Sequence[EvalProblem], batches: list[Batch], held_out: int, scored: int
) -> tuple[list[Solved], list[Batch]]:
    """The traces: the base's answers, and the batches that there was time for."""
    settings = run.model.stepflow_runtime.settings
    run.say(f"Judging responses: {describe_markers(settings)}.")
    first = FirstResponses(BASE, settings, None, run.sampling.max_new_tokens, may_go_on=False)
    results, _ = run.answers({BASE: None}, batches[:1], "traces")  # whatever the time
    first.check(results[BASE])
    check_steps(results[BASE], settings)
    _say_how_hard(run, results[BASE])
    _forecast(run, batches, held_out, scored, results[BASE])
    results, done = run.answers({BASE: None}, batches, "traces", end=run.budget.end_of("traces"))
    first.check(results[BASE], is_all=True)
    check_steps(results[BASE], settings)
    vocabulary = run.model.stepflow_runtime.rules.vocabulary
    solved = read_answers(problems, results[BASE], run.tokenizer, vocabulary, run.sampling.template)
    return solved, batches[:done]


def _say_how_hard(run: CalibrationRun, first: Sequence[dict[str, Any]]) -> None:
    """Says how many of the first responses are right, and warns where settings can hardly show a difference."""
    right = sum(result["right"] for result in first)
    text = f"The base solves {right} of the first {len(first)}"
    if not LOW <= right / len(first) <= HIGH:
        text += (
            "; settings show most where it solves 20 to 80 % (calibrate without --problems looks for such problems)"
        )
    run.say(f"{text}.")


def _forecast(
    run: CalibrationRun, batches: Sequence[Batch], held_out: int, scored: int, first: Sequence[dict[str, Any]]
) -> None:
    """Plans all stages, measures a pass over the first responses, and says how long each stage will take."""
    heads = numbers_of_heads(run)
    stages = planned(run.budget, traces=len(batches), held_out=held_out, heads=heads)
    run.forecast.plan(stages)
    if not run.progress:
        return
    if not run.forecast.kept:  # a run that goes on knows no batch yet: the first one was answered before
        run.forecast.learn(ANSWERS, sum(result["seconds"] for result in first))
    prompts = {
        one.id: encode_prompt(run.tokenizer, one.prompt, **run.sampling.template) for one in batches[0].problems
    }
    rows = [(prompts[result["problem"]], result["ids"]) for result in first if result["ids"]]
    start = time.perf_counter()
    score_traces(run.model, rows, False)
    run.forecast.learn(SCORES, (time.perf_counter() - start) * scored / len(rows))
    if run.forecast.left() is not None:
        run.say(f"Forecast, if the gate opens: {run.forecast.describe()}.")


def _length(run: CalibrationRun, problem: EvalProblem) -> int:
    """The length by which a problem is grouped: of its reference trace, or without one of its prompt, in tokens."""
    if problem.trace is not None:
        return len(encode_response(run.tokenizer, problem.trace))
    return len(encode_prompt(run.tokenizer, problem.prompt, **run.sampling.template))


def _is_forced(run: CalibrationRun, gate: Gate, force: bool) -> bool:
    """Whether a closed gate is passed. A run that passed it may have a verdict, which must not be taken back."""
    if gate.is_open:
        return False
    if force:
        return run.decide("forced", lambda: True)
    if run.work.get("decisions", "forced") is not None:
        assert run.work.path is not None  # in memory there is no earlier run
        raise another_run(run.work.path, ["force: true there, false now"])
    return False


def _context_lengths(solved: Sequence[Solved]) -> list[int]:
    """The lengths that three quarters and half of all traces exceed, from which a length temperature may start."""
    lengths = [len(one.prompt) + one.tokens for one in solved]
    return sorted({max(2, int(value)) for value in np.quantile(lengths, [0.25, 0.5])})


def _propose(run: CalibrationRun, solved: Sequence[Solved]) -> Bands:
    """The bands: by the quarter rule and by Step-Saliency."""
    layers = sorted(run.model.stepflow_runtime.heads)
    if run.is_over("bands", "bands"):
        return Bands([quarter_rule(layers)], (0, 0), layers, reason="there was no time for Step-Saliency")
    traces: dict[bool, list[tuple[list[int], int]]] = {True: [], False: []}
    for one in solved:
        result = one.results[0]
        if result["outcome"] != UNFINISHED and _has_summary(run, one.prompt, result["ids"]):
            traces[result["right"]].append(([*one.prompt, *result["ids"]], len(one.prompt)))

    def propose() -> dict[str, Any]:
        return asdict(
            propose_bands(
                run.model, traces[True], traces[False], run.tokenizer, layers, run.sampling.seed, run.progress
            )
        )

    return Bands.from_dict(run.decide("bands", propose))


def _has_summary(run: CalibrationRun, prompt: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether a response gets beyond its thinking, without which there is no index of decay."""
    records = run.model.stepflow_runtime.rules.vocabulary.scan([*prompt, *ids], prompt_length=len(prompt))
    return any(record[Field.LABEL] % 3 == SUMMARY for record in records[len(prompt) :])


def _select(
    found: Calibration,
    run: CalibrationRun,
    batches: Sequence[Batch],
    strata: Mapping[str, str],
    choose: "int | Choose | None",
) -> None:
    """Generation: the best candidates answer problems, which also shows how well the proxy ranks them."""
    candidates = to_run([one for one in found.trials if mechanisms(one.settings)], anchor=_PAPER)
    if not candidates:
        found.halving = Halving(reason="there was no time to score any candidate")
        return
    ends = rung_ends(len(batches))
    done = 0
    spent: dict[int, tuple[float, float]] = {}  # by candidate: seconds, and tokens relative to the base's
    solved: dict[int, int] = {}  # by number of problems: those that the base solves, at least once

    def answer(alive: Sequence[Trial], rung: int) -> tuple[Results, dict[int, Results]]:
        nonlocal done
        arms: dict[str, Settings | None] = {BASE: None, **{str(one.number): one.settings for one in alive}}
        label, end = f"rung {rung + 1} of {len(ends)}", run.budget.end_of("generation")
        results, reached = run.answers(arms, batches[: ends[rung]], label, end=end)
        if reached <= done:
            return {}, {}
        done = reached
        tokens = {name: sum(result["tokens"] for result in own) for name, own in results.items()}
        for one in alive:
            seconds = sum(result["seconds"] for result in results[str(one.number)])
            spent[one.number] = seconds, tokens[str(one.number)] / max(tokens[BASE], 1)
        shares = _shares(results[BASE])
        solved[len(shares)] = sum(max(own) > 0 for own in shares.values())
        return shares, {one.number: _shares(results[str(one.number)]) for one in alive}

    by_number = {one.number: one for one in candidates}

    def report(row: Rung) -> None:
        one, (seconds, tokens) = by_number[row.trial], spent[row.trial]
        harm = f", harms {'; '.join(row.harmed)}" * bool(row.harmed)
        run.say(
            f"#{row.trial:<3} {in_words(one.settings)}; proxy {one.score.value:+.3f}; answers {100 * row.delta:+.1f} "
            f"points on {row.problems}; breaks {row.lost}, repairs {row.gained}{harm}; tokens x{tokens:.2f}; "
            f"{seconds:.0f} s{'' if row.stays else '; stops'}"
        )

    found.halving = halve(candidates, len(ends), answer, strata, report)
    if found.halving.rungs:
        proxy = {one.number: one.score.value for one in candidates}
        found.points = [(one.trial, proxy[one.trial], one.delta) for one in found.halving.rungs[0]]
        found.correlation = rank_correlation([one[1] for one in found.points], [one[2] for one in found.points])
    last = {row.trial: row for rung in found.halving.rungs for row in rung}
    found.front = front(
        [
            Outcome(
                number,
                row.problems,
                row.delta,
                row.lost / max(solved[row.problems], 1),
                round(spent[number][1], 2),
                row.harmed,
                in_words(by_number[number].settings),
            )
            for number, row in last.items()
        ]
    )
    found.default = found.halving.winner
    found.winner = by_number.get(_choose(found, run, choose, list(last)))


def _choose(found: Calibration, run: CalibrationRun, choose: "int | Choose | None", known: list[int]) -> Any:
    """The number of the candidate to judge, or None: decided once, before the held-out split is opened."""

    def decided() -> int | None:
        number = choose if choose is None or isinstance(choose, int) else choose(found.front, found.default)
        if number is not None and number not in known:
            raise StepFlowInputError(
                f"candidate #{number} has answered no problems", hint=f"choose one of {', '.join(map(str, known))}"
            )
        return found.default if number is None else number

    number = run.decide("chosen", decided)
    if isinstance(choose, int) and choose != number:
        raise StepFlowInputError(
            f"candidate {'none' if number is None else f'#{number}'} was chosen in this run, and #{choose} is asked "
            "for now that the held-out split may have been seen",
            hint="leave the choice out, or calibrate anew on other problems",
        )
    return number


def _shares(results: Sequence[Mapping[str, Any]]) -> Results:
    """Whether each response was right, by problem."""
    shares: Results = {}
    for result in results:
        shares.setdefault(result["problem"], []).append(float(result["right"]))
    return shares


def _judge(
    found: Calibration,
    winner: Trial,
    run: CalibrationRun,
    batches: list[Batch],
    base_length: int,
    rows: list[Row],
    strata: Mapping[str, str],
) -> None:
    """The verdict: the winner and its ablations on the held-out split."""
    seed = run.sampling.seed
    compare = partial(measure, samples=run.sampling.samples, seed=seed)
    arms: dict[str, Settings | None] = {BASE: None, STEPFLOW: winner.settings}
    run.answers(arms, batches[:1], "verdict")  # whatever the time
    results, done = run.answers(arms, batches, "verdict", end=run.budget.end_of("verdict"))
    found.measured = compare(results, STEPFLOW)
    found.answers = {
        name: digest([[one["problem"], one["sample"], one["right"], one["tokens"]] for one in own])
        for name, own in results.items()
    }
    found.strata = judge_strata(results, STEPFLOW, strata, found.run["bound"] / 100, seed)
    variants, found.left_out = ablations(winner.settings, run.model.stepflow_runtime.heads, base_length, seed)
    run.forecast.plan([Stage(name, ANSWERS, done) for name in variants])
    limit = run.budget.end_of("ablations")
    for left, (name, settings) in zip(range(len(variants), 0, -1), variants.items(), strict=True):
        vocabulary = None
        if name == RANDOM_STEPS:
            traces = [(row.ids, len(row.prompt)) for row in rows[:32]]
            cuts = random.Random(f"{seed}/cuts").randrange(997)
            vocabulary = random_steps(run.model.stepflow_runtime.rules.vocabulary, traces, cuts)
        spent = run.work.spent()
        end = None if limit is None else spent + (limit - spent) / left  # the time left, in equal parts
        own, reached = run.answers({name: settings}, batches[:done], name, end=end, vocabulary=vocabulary)
        if not reached:
            found.left_out[name] = "there was no time"
            continue
        both, _ = run.answers(arms, batches[:reached], name)
        results = {**both, **own}
        found.ablations[name] = Ablation(compare(results, name), compare(results, STEPFLOW, against=name), settings)
