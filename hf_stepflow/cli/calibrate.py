"""`hf-stepflow calibrate`: settings for a model that are better than the base, or the word that none are."""

import argparse
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .loading import add_model_arguments, find_stepflow, load
from .paths import demand_folders
from .seeds import read_seed

_REASONER = "hf-stepflow/reasoner"
# What to do about each part of a preset's identity.
_WAYS_OUT = {
    "name": "pass --out my-model.json, as the preset is to be called",
    "base_model": "pass --base-model ORG/NAME, the Hub id of the model",
    "base_model_revision": "pass --revision with a branch, tag or commit of the Hub",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Looks for StepFlow settings that are better than the base model, and judges them on problems that played no\n"
        "part in choosing them. Where the errors do not rise with length, or nothing helps, it says so.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "PROBLEMS is a JSONL file (id, question, answer, and trace where a right response is known), a benchmark, or\n"
        "reasoner:LEVEL; repeat it for several. Half of them are kept for the verdict.\n"
        "The budget is a number of candidates (40) or a time for everything (90s, 20m, 1.5h).\n"
        "A run that was stopped goes on where it was. `accelerate launch -m hf_stepflow.cli` shares the work.\n"
        "Exit status: 0 a measured gain, 3 none, 2 an error."
    )
    parser.epilog = (
        "example: hf-stepflow calibrate reasoner --problems reasoner:errands-30 --budget 10m \\\n"
        "             --out my-reasoner.json --report my-reasoner.html"
    )
    add_model_arguments(parser, positional=True)
    parser.add_argument("--problems", required=True, action="append", help="JSONL file, benchmark or reasoner:LEVEL")
    parser.add_argument("--limit", type=int, help="only the first N of each")
    parser.add_argument("--budget", default="40", help="candidates, or a time (default: 40)")
    parser.add_argument("--out", type=Path, help="file of the preset, NAME.json")
    parser.add_argument("--report", type=Path, help="HTML page of the result")
    parser.add_argument("--work", type=Path, help="folder that keeps what is found (default: NAME-calibration)")
    parser.add_argument("--base-model", help="Hub id that the preset is for (default: MODEL, where that is one)")
    parser.add_argument("--stepflow", metavar="CONFIG", help="preset, JSON file or folder with markers and step rules")
    parser.add_argument("--force", action="store_true", help="go on where errors do not rise with length")
    parser.add_argument("--samples", type=int, default=1, help="responses to each problem; above 1 they are sampled")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the sampling (default: 0.7)")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="default: 2048")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--scored", type=int, default=96, help="problems scored for each candidate (default: 96)")
    parser.add_argument("--run-code", action="store_true", help="run programs that the model writes, to check them")
    parser.add_argument("--seed", type=read_seed, default=0, help="of splits, sampling and search (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes what was asked for, and prints the result."""
    from hf_stepflow.calibration.result import write_preset
    from hf_stepflow.calibration.stages import calibrate

    demand_folders(args.out, args.report)
    base_model = _base_model(args)
    name = base_model.rpartition("/")[2].lower() if args.out is None else args.out.stem
    _check_identity(args.out, name, base_model, args.revision)
    work = args.work or (args.out or Path(name)).with_name(f"{name}-calibration")
    problems = _problems(args.problems, args.limit, args.seed)
    settings = find_stepflow(args.stepflow)
    model, tokenizer = load(args.model, args.dtype, _device(args.device), args.revision)
    architecture = _architecture(model)
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
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        scored=args.scored,
        run_code=args.run_code,
    )
    result.about["model"] = base_model  # not where it lies on this machine
    if int(os.environ.get("RANK", "0")):
        return 0  # the first process speaks for all, and a launcher would end it if another one reported a failure
    preset = result.preset(
        name,
        base_model,
        architecture,
        command=shlex.join(["hf-stepflow", *sys.argv[1:]]),
        dataset=", ".join(args.problems),
        revision=args.revision,
    )
    if args.out is not None:
        write_preset(preset, args.out)
    if args.report is not None:
        from hf_stepflow.calibration.page import write_report

        write_report(result, args.report, preset)
    if args.json:
        print(json.dumps(result.to_dict() | {"preset": preset.to_dict()}, indent=2))
    else:
        print(result)
        print(f"Preset: {args.out}" if args.out is not None else json.dumps(preset.to_dict()["settings"]))
    return result.exit_status


def _base_model(args: argparse.Namespace) -> str:
    """The Hub id that the preset is for."""
    given = args.base_model or (_REASONER if args.model == "reasoner" else args.model)
    if args.base_model is None and Path(args.model).exists():
        raise StepFlowInputError(
            f"a preset names its model by a Hub id, and {given!r} is a path", hint="pass --base-model ORG/NAME"
        )
    return given


def _check_identity(out: Path | None, name: str, base_model: str, revision: str | None) -> None:
    """Refuses names that no preset may have before hours are spent on finding one."""
    from hf_stepflow.presets.checks import identity_problems

    if out is not None and out.suffix != ".json":
        raise StepFlowInputError(f"the file of a preset is NAME.json, got {str(out)!r}", hint=_WAYS_OUT["name"])
    problems = identity_problems(name, base_model, revision)
    if problems:
        raise StepFlowInputError(f"the preset to be made: {problems[0]}", hint=_WAYS_OUT[problems[0].field])


def _problems(sources: list[str], limit: int | None, seed: int) -> list[Any]:
    """The problems of all sources. Many number theirs from 0 or 1: of several sources, each id tells its own."""
    from hf_stepflow.problems import load_problems

    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise StepFlowInputError(f"--problems {twice} is given twice", hint="give each source once")
    problems = []
    for source in sources:
        own = load_problems(source, limit, split="calibration", seed=seed)
        problems += own if len(sources) == 1 else [replace(one, id=f"{source}/{one.id}") for one in own]
    return problems


def _device(device: str) -> str:
    """Each process of `accelerate launch` has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def _architecture(model: Any) -> Any:
    from hf_stepflow.presets.architecture import architecture_of

    found = architecture_of(model)
    if found.num_attention_heads is None or found.num_key_value_heads is None:
        raise StepFlowInputError(
            f"a preset needs one number of heads, and this model has none: {found}",
            hint="use hf_stepflow.calibration.calibrate, and give the settings that it finds",
        )
    return found
