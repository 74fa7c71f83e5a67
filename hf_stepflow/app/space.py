"""The app as a Hugging Face Space: three files that start from their folder alone."""

import json
import os
from importlib import metadata
from pathlib import Path

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .model import REASONER

# The release of gradio that the app is tested with, which a Space installs before anything else.
GRADIO = "6.31.0"

_APP = '''"""The StepFlow app: a model answers a problem with and without StepFlow."""

from hf_stepflow.app import launch_app, make_app

launch_app(make_app({model}, may_load=False))
'''
_README = """---
title: StepFlow
emoji: 🪜
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
short_description: A model thinks with and without StepFlow, step by step
tags:
  - stepflow
  - reasoning
  - interpretability{models}
---

# StepFlow

{model} answers a problem by itself and with StepFlow, an attention intervention for reasoning models without training
([arXiv 2604.06695](https://arxiv.org/abs/2604.06695)). Whether it helps depends on the model and the problems.

| tab | what it shows |
|---|---|
| Answers | both answers as they are written, steps aligned, and what StepFlow did by layer |
| Step-Saliency | which steps of either answer draw on which, layer by layer |
| More problems | both on the same problems, with the verdict while they run |

Written by hf-stepflow {version}. On a computer of your own: `pip install 'hf-stepflow[app]'`, then `hf-stepflow app`.
"""


def export_space(folder: "str | os.PathLike[str]", model: str = REASONER) -> dict[str, int]:
    """Writes a Space of the app.

    Args:
        folder: The folder to write: a new or empty one, or an earlier Space of the app.
        model: The Hub id of the model that the Space shows, or `reasoner`, which needs no download.

    Returns:
        The size of each file in bytes, by name.

    Raises:
        StepFlowInputError: The model is a folder of this machine.
        StepFlowFileError: The folder holds something else, or cannot be written.
    """
    if Path(model).exists():
        raise StepFlowInputError(
            f"the model {model!r} is a folder of this machine, which a Space does not have",
            hint="give the id of a model on the Hub, or `reasoner`",
        )
    version = metadata.version("hf-stepflow")
    is_reasoner = model == REASONER
    files = {
        "app.py": _APP.format(model=json.dumps(model)),
        "requirements.txt": f"hf-stepflow[app]=={version}\n",
        "README.md": _README.format(
            gradio=GRADIO,
            version=version,
            model="The tiny model that comes with hf-stepflow" if is_reasoner else model,
            models="" if is_reasoner else f"\nmodels:\n  - {json.dumps(model)}",
        ),
    }
    target = Path(folder)
    try:
        others = sorted({one.name for one in target.iterdir()} - files.keys() - {".git", ".gitattributes"})
    except FileNotFoundError:
        others = []
    except OSError as error:
        raise StepFlowFileError(f"{str(target)!r} is no folder: {error}", hint="name a new folder") from error
    if others:
        raise StepFlowFileError(
            f"{str(target)!r} holds {', '.join(others[:3])}, which is no Space of the app", hint="name a new folder"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (target / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise StepFlowFileError(f"{str(target)!r} cannot be written: {error}", hint="name another folder") from error
    return {name: len(text.encode()) for name, text in files.items()}
