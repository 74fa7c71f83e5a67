"""`hf-stepflow push`: a preset's repository on the Hub."""

import argparse
import json

from hf_stepflow.cli.export import add_preset_arguments, check_choice, told


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Exports a preset and uploads it to the Hub as one commit. Running the same again completes a push that was\n"
        "interrupted, and changes nothing where all is there. The token is that of HF_TOKEN or of `hf auth login`."
    )
    parser.epilog = "example: hf-stepflow push qwen3-8b my-name/qwen3-8b-stepflow --dry-run"
    parser.add_argument("preset", metavar="PRESET", nargs="?", help="name, base model, path, or Hub id of a preset")
    parser.add_argument("repo_id", metavar="REPO_ID", nargs="?", help="of the repository, made where there is none")
    add_preset_arguments(parser)
    parser.add_argument(
        "--custom-generate", metavar="REPO_ID", help="push the repository for generate(custom_generate=...) instead"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where there is none")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be uploaded")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Exports, uploads, tells."""
    check_choice(args, "repo_id")
    from hf_stepflow.hub.push import push_custom_generate, push_preset

    where = {"private": args.private or None, "revision": args.revision, "dry_run": args.dry_run}
    if args.custom_generate is not None:
        push = push_custom_generate(args.custom_generate, **where)
    else:
        push = push_preset(
            args.preset,
            args.repo_id,
            base=args.base,
            base_revision=args.base_revision,
            merge_weights=args.merge_weights,
            **where,
        )
    if args.json:
        print(json.dumps(push.to_dict(), indent=2))
        return 0
    branch = "" if push.revision is None else f" (branch {push.revision})"
    print(f"{push.repo_id}{branch}: {told(push.export)}")
    if push.url is None:
        print("Nothing was uploaded: this was a dry run.")
    else:
        print(f"Pushed to {push.url}, commit {push.commit}")
    return 0
