"""`hf-stepflow presets`: the settings that come with the package, their cards, and the check of a file."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError, StepFlowInputError

_WIDTH = 100
_KINDS = {
    "paper": "published settings for this model; figures are the paper's, not measured by this project",
    "rule": "the paper's constants carried over; NOT calibrated for this model",
    "measured": "an evaluation on this very model, with its verdict",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Presets: settings for models as data, each with where it comes from (its kind):\n"
        + "\n".join(f"  {kind:<9} {meaning}" for kind, meaning in _KINDS.items())
    )
    parser.epilog = "example: hf-stepflow presets show qwen3-8b"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _action(actions, "list", "one line a preset", "hf-stepflow presets list --kind paper")
    listing.add_argument("--kind", choices=_KINDS, help="only this kind of provenance")
    show = _action(actions, "show", "all of one preset", "hf-stepflow presets show Qwen/Qwen3-8B --json")
    show.add_argument("name", metavar="NAME", help="name, base model, path, or Hub id of a preset repository")
    show.add_argument("--revision", help="of the preset repository")
    card = _action(actions, "card", "the model card of a preset's repository", "hf-stepflow presets card qwen3-8b")
    wanted = card.add_mutually_exclusive_group(required=True)
    wanted.add_argument("name", metavar="NAME", nargs="?", help="as for `show`")
    wanted.add_argument("--all", metavar="FOLDER", type=Path, help="one file for each preset of `list`, NAME.md")
    card.add_argument(
        "--repo-id", help="id of the repository that the card is for; without it a placeholder stands there"
    )
    card.add_argument("--out", metavar="FILE", type=Path, help="write it to a file")
    card.add_argument("--revision", help="of the preset repository")
    validate = _action(
        actions, "validate", "check files before they are contributed", "hf-stepflow presets validate my-model.json"
    )
    validate.add_argument("files", metavar="FILE", nargs="+", type=Path, help="preset file, or folder with one")
    verify = _action(
        actions, "verify-code", "compare a repository's code with the releases", "hf-stepflow presets verify-code DIR"
    )
    verify.add_argument("source", metavar="DIR|REPO_ID", help="folder, or repository on the Hub")
    verify.add_argument("--revision", help="branch, tag or commit of the repository")


def run(args: argparse.Namespace) -> int:
    """Runs the action; `validate` and `verify-code` return 2 where a file is wrong."""
    actions = {"list": _list, "show": _show, "card": _card, "validate": _validate, "verify-code": _verify_code}
    return actions[args.action](args)


def _action(actions: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _list(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.preset import list_presets

    presets = [preset for preset in list_presets() if args.kind in (None, preset.kind)]
    if args.json:
        print(json.dumps([_as_json(preset) for preset in presets], indent=2))
        return 0
    presets.sort(key=lambda preset: (list(_KINDS).index(preset.kind), preset.name))
    rows = [("kind", "name", "base model", "layers")]
    for preset in presets:
        layers = str(preset.architecture.num_hidden_layers) if preset.architecture else "?"
        rows.append((preset.kind, preset.name, preset.base_model or "?", layers))
    print(_table(rows))
    print()
    for kind in dict.fromkeys(preset.kind for preset in presets):
        print(f"{kind}: {_KINDS[kind]}")
    if not presets:
        print(f"There is no preset of the kind {args.kind} yet.")
    return 0


def _show(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.preset import load_preset

    preset = load_preset(args.name, revision=args.revision)
    print(json.dumps(_as_json(preset), indent=2, ensure_ascii=False) if args.json else _described(preset))
    return 0


def _card(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.cards import preset_card
    from hf_stepflow.presets.preset import list_presets, load_preset

    if args.all is not None:
        if args.repo_id or args.out or args.revision:
            raise StepFlowInputError("--all takes no --repo-id, --out or --revision", hint="leave them out")
        cards = {args.all / f"{preset.name}.md": preset_card(preset) for preset in list_presets()}
    else:
        cards = {args.out: preset_card(load_preset(args.name, revision=args.revision), args.repo_id)}
    for file, card in cards.items():
        if file is not None:
            _save(card, file)
    if args.json:
        data = [_card_as_json(card, file) for file, card in cards.items()]
        print(json.dumps(data if args.all is not None else data[0], indent=2, ensure_ascii=False))
    else:
        print("\n".join(str(card) if file is None else f"wrote {file}" for file, card in cards.items()))
    return 0


def _save(card: Any, file: Path) -> None:
    try:
        card.save(file)
    except OSError as error:
        raise StepFlowFileError(f"{str(file)!r} cannot be written: {error}", hint="choose another path") from error


def _card_as_json(card: Any, file: Path | None) -> dict[str, Any]:
    return {"metadata": card.data.to_dict(), "card": str(card), "path": None if file is None else str(file)}


def _validate(args: argparse.Namespace) -> int:
    from hf_stepflow.presets.preset import find_problems

    found = {str(file): find_problems(file) for file in args.files}
    if args.json:
        print(
            json.dumps(
                {
                    file: [{"message": problem.message, "hint": problem.hint} for problem in problems]
                    for file, problems in found.items()
                },
                indent=2,
            )
        )
    for file, problems in found.items():
        if not args.json:
            _tell(file, problems)
    return 2 if any(found.values()) else 0


def _tell(file: str, problems: list[StepFlowError]) -> None:
    if not problems:
        print(f"{file}: valid")
    for problem in problems:
        print(f"hf-stepflow: error: {' '.join(problem.message.split())}", file=sys.stderr)
    hint = next((problem.hint for problem in problems if problem.hint), "docs/presets.md explains the fields")
    if problems:
        print(f"hint: {hint}", file=sys.stderr)


def _verify_code(args: argparse.Namespace) -> int:
    from hf_stepflow.hub.verify import verify_code

    found = verify_code(args.source, revision=args.revision)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0 if found.is_released else 2


def _as_json(preset: Any) -> dict[str, Any]:
    """A preset with its provenance first, so that nobody reads the settings without it."""
    data = preset.to_dict()
    path = None if preset.path is None else str(preset.path)
    return {"provenance": data.pop("provenance")} | data | {"path": path}


def _described(preset: Any) -> str:
    """A preset as text, provenance first."""
    stated = [(key, value) for key, value in preset.provenance.items() if key not in ("kind", "figures", "deltas")]
    lines = [*textwrap.wrap(preset.claim, _WIDTH, break_on_hyphens=False), ""]
    lines += _fields([("name", preset.name), ("base model", preset.base_model or "unknown")])
    if preset.base_model_revision is not None:
        lines += _fields([("revision", preset.base_model_revision)])
    lines += _fields([("architecture", str(preset.architecture or "not stated"))])
    lines += _fields([("notes", preset.notes)]) if preset.notes else []
    lines += ["", f"where it comes from: {preset.kind}"]
    lines += _fields([(key.replace("_", " "), value) for key, value in stated if value is not None])
    figures = preset.provenance.get("figures") or []
    rows = [(each["benchmark"], f"{each['base']:.1f}", f"{each['stepflow']:.1f}") for each in figures]
    if rows:
        table = _table([("the paper's figures, %", "base", "with StepFlow"), *rows])
        lines += ["", *(f"  {line}" for line in table.splitlines())]
    for each in preset.provenance.get("deltas") or []:
        bounds = f"[{each['low']:+g}, {each['high']:+g}] at {each['confidence']:g}"
        lines += _fields([(each["metric"], f"{each['delta']:+g} points {bounds}")])
    lines += ["", "settings"]
    settings = preset.to_dict()["settings"]
    lines += _fields([(key, json.dumps(value, ensure_ascii=False)) for key, value in settings.items()], 26)
    return "\n".join(lines)


def _fields(pairs: list[tuple[str, Any]], width: int = 16) -> list[str]:
    return [
        line
        for name, value in pairs
        for line in textwrap.wrap(
            f"{name:<{width - 1}} {value}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
