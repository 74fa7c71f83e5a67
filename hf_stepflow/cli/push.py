"""`hf-stepflow push`: uploads a preset's repository to the Hub."""

import argparse
import json

from .export import add_preset_arguments, contents_of, preset_arguments


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Exports a preset and uploads it to the Hub as one commit. Run the same command again to complete a push\n"
        "that was interrupted; it changes nothing when all files are there. The token is that of HF_TOKEN or of\n"
        "`hf auth login`."
    )
    parser.epilog = "example: hf-stepflow push qwen3-8b my-name/qwen3-8b-stepflow --dry-run"
    add_preset_arguments(parser, "REPO_ID", "id of the repository, which is created if it does not exist")
    parser.add_argument("--code", metavar="REPO_ID", help="the code that presets with --code-repo run instead")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")


def run(args: argparse.Namespace) -> int:
    """Exports, uploads, and prints where it went."""
    given = preset_arguments(args, "PRESET REPO_ID")
    from hf_stepflow.hub.push import push_code, push_custom_generate, push_preset

    options = {"private": args.private or None, "revision": args.revision, "dry_run": args.dry_run}
    if given is not None:
        push = push_preset(repo_id=args.target, **given, **options)
    elif args.code is not None:
        push = push_code(args.code, **options)
    else:
        push = push_custom_generate(args.custom_generate, **options)
    if args.json:
        print(json.dumps(push.to_dict(), indent=2))
        return 0
    branch = "" if push.revision is None else f" (branch {push.revision})"
    print(f"{push.repo_id}{branch}: {contents_of(push.export)}")
    if push.url is None:
        print("Nothing was uploaded: this was a dry run.")
    else:
        print(f"Pushed to {push.url}, commit {push.commit}")
    return 0
