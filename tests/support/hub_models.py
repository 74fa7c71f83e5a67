"""A base model in a folder, a preset for it, and an environment with torch and transformers but not hf_stepflow."""

import copy
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from transformers import GenerationConfig

from tests.support.flow import VARIANTS, byte_tokenizer
from tests.support.presets import MEASURED, tiny_preset
from tests.support.tiny_models import tiny_model

CHAT = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)
SETTINGS = VARIANTS["step"]


def save_base(folder: Path, family: str = "llama", **overrides) -> Path:
    """A tiny model and its tokenizer, as they lie on the Hub."""
    model = tiny_model(family, **overrides)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=12
    )
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def strong_preset(folder: Path, name: str = "tiny") -> Path:
    """A preset file for the tiny models, with settings that show."""
    given = SETTINGS.to_dict()
    changes = {f"settings__{key}": value for key, value in given.items() if not key.startswith("base_model")}
    return tiny_preset(folder, name=name, provenance=MEASURED, **changes)


def bare_environment(folder: Path, *names: str) -> Path:
    """The interpreter of a virtual environment with torch, transformers and what they require, as installed here.

    Args:
        folder: The folder to make it in.
        *names: Further distributions that it gets, with what they require.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in _required("torch", "transformers", *names):
        distribution = metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(part)))
            if source.exists() and not (site / part).exists():
                (site / part).symlink_to(source)
    return folder / "bin" / "python"


def _required(*names: str) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            requires = metadata.requires(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        if name not in found:
            found.add(name)
            for requirement in map(Requirement, requires or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name)
    return found


def run_script(python: Path, script: str, home: Path, *arguments: object) -> str:
    """What a script prints in a fresh process with an empty cache, offline."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = kept | {
        "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [str(python), "-W", "error::UserWarning", "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(
        command,
        env=environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
