"""`hf-stepflow presets`: lists and shows presets and settings, writes cards, and checks files."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError, StepFlowInputError

if TYPE_CHECKING:
    from hf_stepflow.presets.preset import Preset

_WIDTH = 100
_KINDS = {
    "paper": "published settings for this model; figures are the paper's, not measured by this project",
    "rule": "the paper's constants carried over; NOT calibrated for this model",
    "measured": "an evaluation on this very model, with its verdict",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the actions with their arguments, and examples."""
    kinds = "\n".join(f"  {kind:<9} {meaning}" for kind, meaning in _KINDS.items())
    parser.description = f"Presets are settings for models, each with its provenance. Kinds of provenance:\n{kinds}"
    parser.epilog = "example: hf-stepflow presets show qwen3-8b"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _action(actions, "list", "list the presets of this package", "hf-stepflow presets list --kind paper")
    listing.add_argument("--kind", choices=_KINDS, help="only this kind of provenance")
    show = _action(actions, "show", "show all of one preset", "hf-stepflow presets show Qwen/Qwen3-8B --json")
    show.add_argument("name", metavar="NAME", help="name, base model, path, or Hub id of a preset repository")
    show.add_argument("--revision", help="revision of the preset repository")
    example = "hf-stepflow presets diff qwen3-8b my-preset.json"
    diff = _action(actions, "diff", "list what two presets differ in; the status is 1 if anything", example)
    diff.add_argument("names", metavar="NAME", nargs=2, help="as for `show`")
    example = "hf-stepflow presets search Qwen/Qwen3-8B"
    search = _action(actions, "search", "find the presets for a model, here and on the Hub", example)
    search.add_argument("model", metavar="MODEL", help="Hub id of the base model")
    search.add_argument("--offline", action="store_true", help="look in this package alone")
    search.add_argument("--limit", type=int, default=20, help="repositories of the Hub to look at (default: 20)")
    example = "hf-stepflow presets lock your-name/qwen3-8b-stepflow --out stepflow.lock.json"
    lock = _action(actions, "lock", "pin a preset, its code and its base model in a file that loads as it", example)
    lock.add_argument("name", metavar="NAME", help="as for `show`")
    lock.add_argument("--out", metavar="FILE", type=Path, required=True, help="the lock file to write")
    lock.add_argument("--revision", help="revision of the preset repository (default: its main branch)")
    lock.add_argument("--base-revision", help="revision of the base model (default: the preset's, or the main branch)")
    example = "hf-stepflow presets replay your-name/qwen3-8b-stepflow --limit 50"
    summary = "compare a measured preset with its base model again, and say whether its verdict holds"
    replay = _action(actions, "replay", summary, example)
    replay.description = (
        f"{summary[0].upper()}{summary[1:]}. It asks problems of the record (reproduce.json) that the calibration did "
        "not choose by. `hf-stepflow calibrate --reproduce` repeats the search too. Exit status: 1 if the verdict "
        "does not hold."
    )
    replay.add_argument("name", metavar="NAME", help="preset file, or folder or Hub id of a preset repository")
    replay.add_argument("--limit", type=int, help="problems to ask (default: all)")
    replay.add_argument("--model", help="folder or Hub id of the base model (default: the record's)")
    replay.add_argument("--revision", help="revision of the base model (default: the record's)")
    replay.add_argument("--problems", nargs="+", help="the problems, where the record names files of another machine")
    replay.add_argument("--run-code", action="store_true", help="run programs that the model writes, to judge them")
    card = _action(actions, "card", "write a preset's model card", "hf-stepflow presets card qwen3-8b")
    choice = card.add_mutually_exclusive_group(required=True)
    choice.add_argument("name", metavar="NAME", nargs="?", help="as for `show`")
    choice.add_argument("--all", metavar="FOLDER", type=Path, help="one file for each preset of `list`, NAME.md")
    card.add_argument("--repo-id", help="id of the card's repository (default: a placeholder)")
    card.add_argument("--out", metavar="FILE", type=Path, help="write the card to a file")
    card.add_argument("--revision", help="revision of the preset repository")
    example = "hf-stepflow presets validate my-model.json"
    validate = _action(actions, "validate", "check files before they are contributed", example)
    validate.add_argument("files", metavar="FILE", nargs="+", type=Path, help="preset file, or folder with one")
    _action(actions, "settings", "list all settings, with default, values and meaning", "hf-stepflow presets settings")
    example = "hf-stepflow presets verify-code DIR"
    verify = _action(actions, "verify-code", "compare a repository's code with the releases", example)
    verify.add_argument("source", metavar="DIR|REPO_ID", help="folder, or repository on the Hub")
    verify.add_argument("--revision", help="branch, tag or commit of the repository")


def _action(actions: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = actions.add_parser(
        name, help=summary, description=description, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the action.

    Returns:
        2 if `validate` or `verify-code` finds a file wrong, 1 if `diff` finds a difference or a verdict does not hold
        in `replay`, else 0.
    """
    actions = {
        "list": _list, "show": _show, "diff": _diff, "search": _search, "lock": _lock, "replay": _replay,
        "card": _card, "validate": _validate, "settings": _settings, "verify-code": _verify_code,
    }  # fmt: skip
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.preset import list_presets

    presets = [preset for preset in list_presets() if args.kind in (None, preset.kind)]
    if args.json:
        print(json.dumps([_data(preset) for preset in presets], indent=2))
        return 0
    presets.sort(key=lambda preset: (list(_KINDS).index(preset.kind), preset.name))
    rows = [("kind", "name", "base model", "layers")]
    for preset in presets:
        layers = str(preset.architecture.num_hidden_layers) if preset.architecture else "?"
        rows.append((preset.kind, preset.name, preset.base_model or "?", layers))
    print(*_table(rows), "", sep="\n")
    for kind in dict.fromkeys(preset.kind for preset in presets):
        print(f"{kind}: {_KINDS[kind]}")
    if not presets:
        print(f"There is no preset of the kind {args.kind} yet.")
    return 0


def _show(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.preset import load_preset

    preset = load_preset(args.name, revision=args.revision)
    print(json.dumps(_data(preset), indent=2, ensure_ascii=False) if args.json else "\n".join(_lines(preset)))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.differences import differences
    from hf_stepflow.presets.preset import load_preset

    first, second = map(load_preset, args.names)
    found = differences(first, second)
    if args.json:
        print(json.dumps([vars(each) for each in found], indent=2, ensure_ascii=False))
    elif not found:
        print(f"{args.names[0]} and {args.names[1]} hold the same.")
    else:
        for name, preset in zip(args.names, (first, second), strict=True):
            print(*textwrap.wrap(f"{name}: {preset.claim}", _WIDTH, subsequent_indent="  "), sep="\n")
        print()
        for each in found:
            print(each.field)
            for name, value in zip(args.names, (each.first, each.second), strict=True):
                text = f"{name}: {json.dumps(value, ensure_ascii=False)}"
                print(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="      "))
    return 1 if found else 0


def _search(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.search import search_presets

    if args.limit < 1:
        raise StepFlowInputError(
            f"--limit must be at least 1, got {args.limit}", hint="--offline asks the Hub nothing"
        )
    found = search_presets(args.model, online=not args.offline, limit=args.limit)
    if args.json:
        data = [
            {"source": one.source, "problem": one.problem, "preset": None if one.preset is None else _data(one.preset)}
            for one in found
        ]
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return 0
    where = "in this package" if args.offline else "in this package or on the Hub"
    if not found:
        print(f"There is no preset for {args.model} {where}. `auto` takes the rule, which is not calibrated.")
    for one in found:
        print(f"{one.source}{' (this package)' if one.is_of_package else ''}")
        text = f"cannot be read: {one.problem}" if one.preset is None else one.preset.claim
        print(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  "))
    return 0


def _lock(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.lock import lock_preset

    lock = lock_preset(args.name, args.out, revision=args.revision, base_revision=args.base_revision)
    if args.json:
        print(json.dumps(lock.to_dict(), indent=2))
        return 0
    at = "" if lock.revision is None else f" at {lock.revision}"
    print(f"wrote {args.out}: {lock.source}{at},")
    print(f"the code of hf-stepflow {lock.code_version}, and {lock.base_model} at {lock.base_revision}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.replay import find_record, replay_preset
    from hf_stepflow.presets.preset import load_preset

    from .arguments import load
    from .calibrate import load_sources

    preset, record = load_preset(args.name), find_record(args.name)
    origin = record["origin"]
    args.model = args.model or origin.get("model")
    args.revision = args.revision or origin.get("revision")
    args.dtype, args.device = str(origin.get("dtype") or "float32"), str(origin.get("device") or "cpu")
    names = args.problems or origin.get("problems")
    if not isinstance(args.model, str) or not isinstance(names, list) or not names:
        raise StepFlowInputError("the record names no model or no problems", hint="give them: --model, --problems")
    problems, _ = load_sources(list(map(str, names)), origin.get("limit"), record["arguments"]["seed"])
    model, tokenizer = load(args)
    found = replay_preset(
        preset, record, model, tokenizer, problems, limit=args.limit, run_code=args.run_code, progress=not args.json
    )
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 1 if found.holds is False else 0


def _settings(args: argparse.Namespace) -> int:
    rows = settings_rows()
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    for part in dict.fromkeys(row["part"] for row in rows):
        print(f"{part[0].upper()}{part[1:]}")
        for row in rows:
            if row["part"] == part:
                print(f"  {row['name']} (default {row['default']})")
                for text in (row["meaning"], f"Values: {row['values']}."):
                    print(textwrap.fill(text, _WIDTH, initial_indent="      ", subsequent_indent="      "))
    return 0


def settings_rows() -> list[dict[str, str]]:
    """Returns part, name, default, values and meaning of every setting."""
    from hf_stepflow.runtime.settings import SETTINGS, StepFlowSettings

    defaults = {name: json.dumps(value) for name, value in vars(StepFlowSettings()).items()}
    return [
        {"part": one.group, "name": name, "default": defaults[name], "values": one.expected, "meaning": one.meaning}
        for name, one in SETTINGS.items()
    ]


def _card(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.cards import preset_card
    from hf_stepflow.presets.preset import list_presets, load_preset

    if args.all is None:
        cards = {args.out: preset_card(load_preset(args.name, revision=args.revision), args.repo_id)}
    elif args.repo_id or args.out or args.revision:
        raise StepFlowInputError("--all takes no --repo-id, --out or --revision", hint="leave them out")
    else:
        cards = {args.all / f"{preset.name}.md": preset_card(preset) for preset in list_presets()}
    data = []
    for file, card in cards.items():
        path = None if file is None else str(file)
        data.append({"metadata": card.data.to_dict(), "card": str(card), "path": path})
        try:
            if file is not None:
                card.save(file)
        except OSError as error:
            raise StepFlowFileError(f"{path!r} cannot be written: {error}", hint="choose another path") from error
    if args.json:
        print(json.dumps(data[0] if args.all is None else data, indent=2, ensure_ascii=False))
    else:
        print(*(each["card"] if each["path"] is None else f"wrote {each['path']}" for each in data), sep="\n")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.preset import find_problems

    found = {str(file): find_problems(file) for file in args.files}
    if args.json:
        data = {
            file: [{"message": problem.message, "hint": problem.hint} for problem in problems]
            for file, problems in found.items()
        }
        print(json.dumps(data, indent=2))
    else:
        for file, problems in found.items():
            _print_problems(file, problems)
    return 2 if any(found.values()) else 0


def _print_problems(file: str, problems: list[StepFlowError]) -> None:
    if not problems:
        print(f"{file}: valid")
        return
    for problem in problems:
        print(f"hf-stepflow: error: {' '.join(problem.message.split())}", file=sys.stderr)
    hint = next((problem.hint for problem in problems if problem.hint), "docs/presets.md explains the fields")
    print(f"hint: {hint}", file=sys.stderr)


def _verify_code(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.verify import verify_code

    found = verify_code(args.source, revision=args.revision)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0 if found.is_released else 2


def _data(preset: "Preset") -> dict[str, Any]:
    """Returns a preset as JSON-ready data, provenance first, so that nobody reads the settings without it."""
    data = preset.to_dict()
    path = None if preset.path is None else str(preset.path)
    return {"provenance": data.pop("provenance")} | data | {"path": path}


def _lines(preset: "Preset") -> list[str]:
    """Returns a preset as lines of text, provenance first."""
    about = {"name": preset.name, "base model": preset.base_model or "unknown", "revision": preset.base_model_revision}
    about |= {"architecture": str(preset.architecture or "not stated"), "notes": preset.notes or None}
    figures, deltas = (preset.provenance.get(key) or [] for key in ("figures", "deltas"))
    stated = {
        key.replace("_", " "): value
        for key, value in preset.provenance.items()
        if key not in ("kind", "figures", "deltas")
    }
    measured = {
        each["metric"]: f"{each['delta']:+g} points [{each['low']:+g}, {each['high']:+g}] at {each['confidence']:g}"
        for each in deltas
    }
    settings = preset.to_dict()["settings"]
    lines = [*textwrap.wrap(preset.claim, _WIDTH, break_on_hyphens=False), "", *_fields(about.items())]
    lines += ["", f"where it comes from: {preset.kind}", *_fields(stated.items())]
    if figures:
        rows = [(each["benchmark"], f"{each['base']:.1f}", f"{each['stepflow']:.1f}") for each in figures]
        table = _table([("the paper's figures, %", "base", "with StepFlow"), *rows])
        lines += ["", *(f"  {line}" for line in table)]
    lines += [*_fields(measured.items()), "", "settings"]
    return lines + _fields(((key, json.dumps(value, ensure_ascii=False)) for key, value in settings.items()), 26)


def _fields(pairs: Iterable[tuple[str, Any]], width: int = 16) -> list[str]:
    """Returns names and values as wrapped lines; leaves out values of None."""
    wrapper = textwrap.TextWrapper(
        _WIDTH, initial_indent="  ", subsequent_indent=" " * (width + 2), break_on_hyphens=False
    )
    named = (f"{name:<{width - 1}} {value}" for name, value in pairs if value is not None)
    return [line for text in named for line in wrapper.wrap(text)]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns rows as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
