"""`hf-stepflow export`: a preset as a repository that transformers loads."""

import argparse
import json
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Writes a preset as a folder: settings, the name of the base model, and code, without weights. Transformers\n"
        "loads it with trust_remote_code=True, where nothing but torch and transformers is installed."
    )
    parser.epilog = "example: hf-stepflow export qwen3-8b my-preset"
    parser.add_argument("preset", metavar="PRESET", nargs="?", help="name, base model, path, or Hub id of a preset")
    parser.add_argument("folder", metavar="DIR", nargs="?", help="where to: a new folder, or an earlier export")
    add_preset_arguments(parser)
    parser.add_argument(
        "--custom-generate", metavar="DIR", help="write the repository for generate(custom_generate=...) instead"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_preset_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what of a preset is written."""
    parser.add_argument("--base", help="another base model than the preset's: a Hub id, or for trials a folder")
    parser.add_argument("--base-revision", metavar="REVISION", help="revision of the base model, which is loaded then")
    parser.add_argument(
        "--merge-weights", action="store_true", help="with the base's weights and tokenizer, to load on its own"
    )


def check_choice(args: argparse.Namespace, target: str) -> None:
    """Refuses a preset and `--custom-generate` together, or neither.

    Args:
        args: of the command.
        target: the name of the argument that says where to.

    Raises:
        StepFlowInputError: they do not go together.
    """
    given = [args.preset, getattr(args, target), args.base, args.base_revision, args.merge_weights or None]
    if args.custom_generate is not None and any(value is not None for value in given):
        raise StepFlowInputError(
            "--custom-generate stands for itself, without a preset or a base model", hint="leave the others out"
        )
    if args.custom_generate is None and None in given[:2]:
        names = "PRESET DIR" if target == "folder" else "PRESET REPO_ID"
        raise StepFlowInputError(f"expected {names}, or --custom-generate", hint="`hf-stepflow presets list`")


def run(args: argparse.Namespace) -> int:
    """Writes the folder and tells what is in it."""
    check_choice(args, "folder")
    from hf_stepflow.hub.export import export_custom_generate, export_preset

    if args.custom_generate is not None:
        export = export_custom_generate(args.custom_generate)
        how = f'model.generate(..., custom_generate="{export.folder}", trust_remote_code=True, tokenizer=tokenizer)'
    else:
        export = export_preset(
            args.preset,
            args.folder,
            base=args.base,
            base_revision=args.base_revision,
            merge_weights=args.merge_weights,
        )
        how = f'AutoModelForCausalLM.from_pretrained("{export.folder}", trust_remote_code=True)'
    if args.json:
        print(json.dumps(export.to_dict(), indent=2))
        return 0
    print(f"{export.folder}: {told(export)}")
    print(f"Load it: {how}" if export.preset is not None else f"Use it: {how}")
    return 0


def told(export: Any) -> str:
    """An export in lines of text: what it is, and its files."""
    lines = [f"{len(export.files)} files, {size(export.size)}"]
    preset = export.preset
    if preset is not None:
        revision = "" if preset.base_model_revision is None else f" at {preset.base_model_revision}"
        lines.append(f"  preset   {preset.name}: {preset.claim}")
        lines.append(f"  base     {preset.base_model}{revision}")
    code = {name: count for name, count in export.files.items() if name.endswith(".py")}
    for name, count in export.files.items():
        if name not in code:
            lines.append(f"  {size(count):>8} {name}")
    lines.append(f"  {size(sum(code.values())):>8} code, {len(code)} files")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes as people read them."""
    number, unit = float(count), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, bigger
    return f"{count} B" if unit == "B" else f"{number:.1f} {unit}"
