"""`hf-stepflow export`: writes a preset as a repository that transformers loads."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from hf_stepflow.runtime.errors import StepFlowInputError

if TYPE_CHECKING:
    from hf_stepflow.hub.export import Export


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Writes a preset as a folder: settings, the name of the base model, and code, without weights. Transformers\n"
        "loads it with trust_remote_code=True, where nothing but torch and transformers is installed.\n\n"
        "--space writes the app (`hf-stepflow app`) as a Hugging Face Space instead, for the model that comes with\n"
        "the package or another: upload the folder to a Space of the kind gradio."
    )
    parser.epilog = "examples:\n  hf-stepflow export qwen3-8b my-preset\n  hf-stepflow export --space my-space"
    add_preset_arguments(parser, "DIR", "the folder to write: a new one, or an earlier export")
    parser.add_argument("--space", metavar="DIR", help="write the app as a Space instead")
    parser.add_argument("--model", metavar="ID", help="the model of the Space (default: reasoner)")


def add_preset_arguments(parser: argparse.ArgumentParser, target: str, text: str) -> None:
    """Adds the arguments that choose a preset, or the code alone, and where it goes.

    Args:
        parser: The parser of a subcommand.
        target: The placeholder of the target in the help.
        text: The help of the target.
    """
    parser.add_argument("preset", metavar="PRESET", nargs="?", help="name, base model, path, or Hub id of a preset")
    parser.add_argument("target", metavar=target, nargs="?", help=text)
    parser.add_argument("--base", help="another base model: a Hub id, or a folder to try it here")
    parser.add_argument("--base-revision", metavar="REVISION", help="revision of the base model")
    parser.add_argument(
        "--merge-weights", action="store_true", help="include the base's weights and tokenizer, to load on its own"
    )
    parser.add_argument(
        "--code-repo",
        metavar="ORG/NAME[@REVISION]",
        help="leave the code out and name the repository that holds it (`hf-stepflow push --code`)",
    )
    parser.add_argument(
        "--custom-generate", metavar=target, help="the repository for generate(custom_generate=...) instead"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def preset_arguments(args: argparse.Namespace, names: str) -> dict[str, Any] | None:
    """Reads the arguments of `export_preset` and `push_preset` that both take; None for code alone.

    Args:
        args: The arguments that `add_preset_arguments` adds.
        names: The positional arguments, for the error.

    Raises:
        StepFlowInputError: A preset or a target is missing, or given together with `--custom-generate` or `--code`.
    """
    options = {
        "base": args.base,
        "base_revision": args.base_revision,
        "merge_weights": args.merge_weights,
        "code_repo": args.code_repo,
    }
    alone = {"--custom-generate": args.custom_generate, "--code": getattr(args, "code", None)}
    chosen = [name for name, value in alone.items() if value is not None]
    if chosen:
        if len(chosen) > 1 or any(
            value not in (None, False) for value in (args.preset, args.target, *options.values())
        ):
            raise StepFlowInputError(
                f"{chosen[0]} stands for itself, without a preset or a base model", hint="leave the others out"
            )
        return None
    if args.preset is None or args.target is None:
        raise StepFlowInputError(f"expected {names}, or --custom-generate", hint="`hf-stepflow presets list`")
    return {"preset": args.preset, **options}


def run(args: argparse.Namespace) -> int:
    """Writes the folder and lists its files."""
    if args.space is not None or args.model is not None:
        return _write_space(args)
    given = preset_arguments(args, "PRESET DIR")
    from hf_stepflow.hub.export import export_custom_generate, export_preset

    if given is None:
        export = export_custom_generate(args.custom_generate)
        call = f'model.generate(..., custom_generate="{export.folder}", trust_remote_code=True, tokenizer=tokenizer)'
    else:
        export = export_preset(folder=args.target, **given)
        call = f'AutoModelForCausalLM.from_pretrained("{export.folder}", trust_remote_code=True)'
    if args.json:
        print(json.dumps(export.to_dict(), indent=2))
        return 0
    print(f"{export.folder}: {contents_of(export)}")
    print(f"{'Use' if given is None else 'Load'} it: {call}")
    return 0


def _write_space(args: argparse.Namespace) -> int:
    """Writes the Space and lists its files."""
    given = (args.preset, args.target, args.base, args.base_revision, args.code_repo, args.custom_generate)
    if args.space is None or args.merge_weights or any(one is not None for one in given):
        raise StepFlowInputError(
            "--space DIR stands for itself, with --model ID alone", hint="a Space starts from presets on its page"
        )
    from hf_stepflow.app.space import export_space

    files = export_space(args.space, args.model or "reasoner")
    if args.json:
        print(
            json.dumps({"folder": args.space, "kind": "space", "bytes": sum(files.values()), "files": files}, indent=2)
        )
        return 0
    print(f"{args.space}: {', '.join(files)}")
    print(f"Upload it: hf repos create NAME --type space --sdk gradio && hf upload NAME {args.space} --type space")
    print(f"Try it here: cd {args.space} && python app.py")
    return 0


def contents_of(export: "Export") -> str:
    """Returns an export as text: its preset and its files."""
    lines = [f"{len(export.files)} files, {_size(export.size)}"]
    preset = export.preset
    if preset is not None:
        revision = "" if preset.base_model_revision is None else f" at {preset.base_model_revision}"
        lines.append(f"  preset   {preset.name}: {preset.claim}")
        lines.append(f"  base     {preset.base_model}{revision}")
    code = [count for name, count in export.files.items() if name.endswith(".py")]
    lines += [f"  {_size(count):>8} {name}" for name, count in export.files.items() if not name.endswith(".py")]
    lines.append(f"  {_size(sum(code)):>8} code, {len(code)} files")
    return "\n".join(lines)


def _size(count: int) -> str:
    """Returns a number of bytes in the unit that keeps it short."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"
