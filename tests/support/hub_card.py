"""The metadata of model cards on the test Hub: what is wrong with it, and what a model's page shows of it."""

import re
from typing import Any

import yaml

from tests.support.hub_repository import Commit

FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LISTS = ("tags", "datasets", "metrics")


def card_problems(card: str) -> tuple[list[dict], list[dict]]:
    """Checks a card as the Hub does before a commit: its YAML, its lists, and that a base model is a Hub id.

    Args:
        card: The whole README.md.

    Returns:
        Errors, which refuse the commit, and warnings.
    """
    header = FRONT_MATTER.match(card)
    if header is None:
        return [], [{"message": "empty or missing yaml metadata in repo card"}]
    try:
        data = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        return [{"message": f"Invalid YAML: {' '.join(str(error).split())}"}], []
    if not isinstance(data, dict):
        return [{"message": "The metadata is not a mapping"}], []
    errors = [f'"{name}" must be an array' for name in LISTS if not isinstance(data.get(name, []), list)]
    for base in _base_models(data):
        if not isinstance(base, str) or not REPO_ID.fullmatch(base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from the Hub.')
    return [{"message": message} for message in errors], []


def card_fields(commit: Commit) -> dict[str, Any]:
    """What the information about a model takes from the card in a commit."""
    file = commit.files.get("README.md")
    header = FRONT_MATTER.match(file.content.decode()) if file else None
    data = yaml.safe_load(header[1]) if header else None
    if not data:
        return {"tags": []}
    tags = [data[name] for name in ("library_name", "pipeline_tag") if name in data] + data.get("tags", [])
    tags += [f"base_model:{base}" for base in _base_models(data)]
    tags += [f"license:{data['license']}"] if "license" in data else []
    shown = {name: data[name] for name in ("library_name", "pipeline_tag") if name in data}
    return {"cardData": data, "tags": list(dict.fromkeys(tags))} | shown


def _base_models(data: dict[str, Any]) -> list[Any]:
    named = data.get("base_model") or []
    return named if isinstance(named, list) else [named]
