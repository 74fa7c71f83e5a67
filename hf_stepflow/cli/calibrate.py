"""`hf-stepflow calibrate`: finds settings that beat the base model, or reports that none do."""

import argparse
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from . import EXIT_INTERRUPTED
from .arguments import (
    add_engine_arguments,
    add_model_arguments,
    add_run_arguments,
    demand_folders,
    demand_no_engine_args,
    find_stepflow,
    load,
    load_engine,
    read_seed,
)
from .calibration_end import ask_for_candidate, is_terminal, offer
from .calibration_setup import Setup

_REASONER = "hf-stepflow/reasoner"
# The way out for each part of a preset's identity.
_WAYS_OUT = {
    "name": "pass --out my-model.json; the file's name is the preset's",
    "base_model": "pass --base-model ORG/NAME, the Hub id of the model",
    "base_model_revision": "pass --revision with a branch, tag or commit of the Hub",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Searches for StepFlow settings that beat the base model, and judges them on problems that the search did\n"
        "not use. Reports it when errors do not rise with length, or when nothing helps.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "Without --problems it looks for some that the model solves 20 to 80 % of the time: levels of the reasoner,\n"
        "or tasks of stepflow-suite. PROBLEMS is a JSONL file (id, question, answer, and trace if a right answer\n"
        "is known), a benchmark, reasoner:LEVEL, reasoning-gym:NAME[,KEY=VALUE...] or stepflow-suite:TASK@LENGTH, as\n"
        "`eval --list-problems` shows them; repeat it for several. Half of the problems are kept for the verdict.\n"
        "The budget is a number of candidates (40) or a time for everything (90s, 20m, 1.5h). The time of each stage\n"
        "is forecast. A run that was stopped, by Ctrl-C too, resumes where it was.\n"
        "`accelerate launch -m hf_stepflow.cli` shares the work.\n"
        "On a terminal it asks which candidate to judge, and at the end whether to save, push or compare.\n"
        "Exit status: 0 a measured gain, 3 none, 2 an error, 130 stopped by Ctrl-C; with --reproduce: 0 found the\n"
        "same, 1 found something else."
    )
    parser.epilog = (
        "examples: hf-stepflow calibrate reasoner\n"
        "          hf-stepflow calibrate reasoner --problems reasoner:errands-30 --budget 10m \\\n"
        "              --out my-reasoner.json --report my-reasoner.html"
    )
    add_model_arguments(parser, positional=True, is_needed=False)
    add_engine_arguments(parser)
    parser.add_argument("--problems", action="append", help="JSONL file, benchmark, generator or level")
    add_run_arguments(parser, batch_size=None)
    parser.add_argument("--budget", default="40", help="candidates, or a time (default: 40)")
    parser.add_argument("--out", type=Path, help="file of the preset, NAME.json")
    parser.add_argument("--work", type=Path, help="folder of the run, to resume it (default: NAME-calibration)")
    parser.add_argument("--base-model", help="Hub id of the preset's model (default: MODEL if it is a Hub id)")
    parser.add_argument("--stepflow", metavar="CONFIG", help="preset, JSON file or folder with markers and step rules")
    parser.add_argument("--force", action="store_true", help="search even if errors do not rise with length")
    parser.add_argument(
        "--bound",
        type=float,
        default=1.0,
        help="points that no kind of problems may lose, shown at 95 %% (default: 1)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="temperature of samples (default: 0.7)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="tokens of a response (default: 1.25 times the longest trace, else 2048)"
    )
    parser.add_argument("--scored", type=int, default=96, help="problems scored for each candidate (default: 96)")
    parser.add_argument("--seed", type=read_seed, default=0, help="seed of splits, sampling and search (default: 0)")
    parser.add_argument(
        "--choose", type=int, metavar="N", help="judge candidate N instead of the one that the rule picks"
    )
    parser.add_argument(
        "--reproduce", type=Path, metavar="FILE", help="replay the calibration of a reproduce.json, and compare"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the files that were asked for, and prints the result."""
    try:
        return _run(args) if args.reproduce is None else _reproduce(args)
    except KeyboardInterrupt:
        if not int(os.environ.get("RANK", "0")):
            command = shlex.join(["hf-stepflow", *sys.argv[1:]])
            print("\nStopped. What was found is kept; the same command goes on from there:", file=sys.stderr)
            print(f"  {command}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    if args.model is None:
        raise StepFlowInputError("calibrate needs a model", hint="hf-stepflow calibrate MODEL, or --reproduce FILE")
    from hf_stepflow.calibration.reproduce import record_of, write_record
    from hf_stepflow.calibration.result import write_preset
    from hf_stepflow.calibration.run import parse_budget
    from hf_stepflow.calibration.stages import calibrate
    from hf_stepflow.presets.preset import RECORD, record_beside

    parse_budget(args.budget)
    demand_folders(args.out, args.report)
    demand_no_engine_args(args)
    base_model = _base_model(args)
    name = base_model.rpartition("/")[2].lower() if args.out is None else args.out.stem
    _check_identity(args.out, name, base_model, args.revision)
    work = args.work or (args.out or Path(name)).with_name(f"{name}-calibration")
    loaded = None if args.problems is None else load_sources(args.problems, args.limit, args.seed)
    settings = find_stepflow(args.stepflow)
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # each process of `accelerate launch` has its own GPU
    model, tokenizer = load(args)
    architecture = _architecture(model)
    setup = Setup(args, model, tokenizer, settings, work)
    names = args.problems or setup.problems()
    problems, sources = loaded or load_sources(names, args.limit, args.seed)
    max_new_tokens = args.max_new_tokens or setup.max_new_tokens(problems)
    batch_size = args.batch_size or setup.batch_size(problems, max_new_tokens)
    engine = None if args.engine == "transformers" else load_engine(args, settings)
    result = calibrate(
        model,
        tokenizer,
        problems,
        budget=args.budget,
        seed=args.seed,
        work=work,
        force=args.force,
        stepflow=settings,
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        scored=args.scored,
        run_code=args.run_code,
        engine=engine,
        bound=args.bound,
        sources=sources,
        choose=_choice(args),
    )
    result.about["model"] = base_model  # rather than a path of this machine
    if int(os.environ.get("RANK", "0")):
        return 0  # the first process reports; a launcher would end it if another one returned a failure
    command = shlex.join(["hf-stepflow", *sys.argv[1:]])
    dataset = ", ".join(names)
    preset = result.preset(name, base_model, architecture, command=command, dataset=dataset, revision=args.revision)
    # The record may be published with the preset: no path of this machine.
    own_model = base_model if Path(args.model).exists() else args.model
    own_problems = [Path(one).name if Path(one).is_absolute() else one for one in names]
    origin = {"model": own_model, "base_model": base_model, "revision": args.revision, "dtype": args.dtype}
    origin |= {"problems": own_problems, "limit": args.limit, "device": args.device}
    record = record_of(result, model, problems, origin)
    write_record(record, work / RECORD)
    if args.out is not None:
        write_preset(preset, args.out)
        write_record(record, record_beside(args.out))
    if args.report is not None:
        from hf_stepflow.calibration.page import write_report

        write_report(result, args.report, preset)
    if args.json:
        print(json.dumps(result.to_dict() | {"preset": preset.to_dict()}, indent=2))
    else:
        print(result)
        print(f"Preset: {args.out}" if args.out is not None else "Preset: not written, as there is no --out")
        print(f"To replay it: hf-stepflow calibrate --reproduce {work / RECORD}")
        if is_terminal():
            offer(model, tokenizer, result, preset, record, problems, max_new_tokens)
    return result.exit_status


def _choice(args: argparse.Namespace) -> Any:
    """The candidate to judge: the one asked for, a question on a terminal, or None for the rule's."""
    if args.choose is not None or args.json or not is_terminal():
        return args.choose
    return ask_for_candidate


def _reproduce(args: argparse.Namespace) -> int:
    """Replays a calibration; the exit status is 0 if it finds the same, else 1."""
    from hf_stepflow.calibration.reproduce import read_record, reproduce

    record = read_record(args.reproduce)
    origin = record["origin"]
    args.model = args.model or origin.get("model")
    if not isinstance(args.model, str):
        raise StepFlowInputError("the record names no model", hint="give it: calibrate MODEL --reproduce FILE")
    args.revision, args.dtype = args.revision or origin.get("revision"), str(origin.get("dtype") or args.dtype)
    names = args.problems or origin.get("problems")
    if not isinstance(names, list) or not names:
        raise StepFlowInputError("the record names no problems", hint="give them with --problems")
    problems, sources = load_sources(
        list(map(str, names)), args.limit or origin.get("limit"), record["arguments"]["seed"]
    )
    model, tokenizer = load(args)
    work = args.work or args.reproduce.with_name(f"{args.reproduce.resolve().parent.name}-replay")
    found = reproduce(record, model, tokenizer, problems, sources=sources, work=work, run_code=args.run_code)
    if args.json:
        data = {"same": found.is_same, "differences": found.findings, "circumstances": found.circumstances}
        print(json.dumps(data | {"result": found.result.to_dict()}, indent=2))
    else:
        print(found.result)
        print(found)
    return 0 if found.is_same else 1


def _base_model(args: argparse.Namespace) -> str:
    """Returns the Hub id of the model that the preset is for."""
    if args.base_model is None and Path(args.model).exists():
        raise StepFlowInputError(
            f"a preset names its model by a Hub id, and {args.model!r} is a path", hint="pass --base-model ORG/NAME"
        )
    return args.base_model or (_REASONER if args.model == "reasoner" else args.model)


def _check_identity(out: Path | None, name: str, base_model: str, revision: str | None) -> None:
    """Refuses names that no preset can have before hours are spent on finding one."""
    from hf_stepflow.presets.checks import identity_problems

    if out is not None and out.suffix != ".json":
        raise StepFlowInputError(f"the file of a preset is NAME.json, got {str(out)!r}", hint=_WAYS_OUT["name"])
    problems = identity_problems(name, base_model, revision)
    if problems:
        raise StepFlowInputError(f"the new preset: {problems[0]}", hint=_WAYS_OUT[problems[0].field])


def load_sources(sources: list[str], limit: int | None, seed: int) -> tuple[list[Any], dict[str, str]]:
    """Loads the problems of all sources, and says which source each is of.

    With several sources, prefixes each id with its source to keep ids unique.
    """
    from hf_stepflow.calibration.strata import source_of
    from hf_stepflow.problems import load_problems

    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise StepFlowInputError(f"--problems {twice} is given twice", hint="give each source once")
    problems: list[Any] = []
    source_by_id: dict[str, str] = {}
    for source in sources:
        own = load_problems(source, limit, split="calibration", seed=seed)
        if len(sources) > 1:
            own = [replace(one, id=f"{source}/{one.id}") for one in own]
        is_file = Path(source).is_file()
        source_by_id |= dict.fromkeys((one.id for one in own), source if is_file else source_of(source))
        problems += own
    return problems, source_by_id


def _architecture(model: Any) -> Any:
    from hf_stepflow.presets.architecture import architecture_of

    found = architecture_of(model)
    if found.num_attention_heads is None or found.num_key_value_heads is None:
        raise StepFlowInputError(
            f"a preset states one number of heads for all layers, and this model's config has none: {found}",
            hint="call hf_stepflow.calibration.calibrate, and use the settings that it finds",
        )
    return found
