"""What docs/security.md promises of the code that travels to Hub repositories: imports, files, network, processes."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

import hf_stepflow
from hf_stepflow.hub.export import export_preset
from hf_stepflow.runtime.repository import PRESET_CODE, code_files
from tests.support.hub_models import save_base, strong_preset

PACKAGE = Path(hf_stepflow.__file__).resolve().parent
RUNTIME = sorted((PACKAGE / "runtime").glob("*.py"))
SECURITY = (PACKAGE.parent / "docs" / "security.md").read_text(encoding="utf-8")

STANDARD_LIBRARY = set(
    "array ast collections contextlib copy dataclasses difflib functools hashlib importlib inspect itertools json "
    "math operator os pathlib queue re reprlib shutil sys textwrap threading types typing weakref".split()
)
# Runs code that is not in these files, whatever it is called on.
RUNS_CODE = {"eval", "exec", "compile", "__import__", "torch.load", "torch.hub", "os.system", "os.popen", "input"}
# Reads, writes or fetches files, by the last name of what is called.
TOUCHES_FILES = set(
    "open read_bytes read_text write_bytes write_text unlink remove rmdir rmtree mkdir makedirs rename touch "
    "symlink_to chmod copyfile copy2 copytree move to_json_file save_pretrained push_to_hub cached_file "
    "hf_hub_download snapshot_download urlopen from_pretrained getsource import_module listdir glob iterdir".split()
)
# All places where the code that travels does so, as docs/security.md says.
ALLOWED = {
    "attention_interface.py": {"Path(__file__).parent.glob", "file.read_bytes", "inspect.getsource"},
    "configuration_stepflow.py": {"cached_file", "file.open"},
    "modeling_stepflow.py": {"self.push_to_hub", "super().push_to_hub"},
    "repository.py": {
        "(folder / file.name).write_bytes", "(folder / name).write_text", "(inner / 'generate.py').write_bytes",
        "(inner / file.name).write_bytes", "inner.mkdir", "AutoModelForCausalLM.from_pretrained",
        "RepositoryFiles(MODEL_CODE).save_pretrained", "file.read_bytes", "files.push_to_hub", "folder.mkdir",
        "importlib.import_module", "model.stepflow_runtime.tokenizer.save_pretrained", "os.listdir",
        "preset_files(model).save_pretrained", "self.generation_config.to_json_file",
    },
    "tokenization_stepflow.py": {"AutoTokenizer.from_pretrained"},
}  # fmt: skip


def calls(file):
    """What a file calls, and the whole call, as text."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), ast.unparse(node)


@pytest.mark.parametrize("file", RUNTIME, ids=lambda file: file.name)
def test_imports(file):
    allowed = STANDARD_LIBRARY | {"torch", "transformers"} | ({"triton"} if file.name == "kernels.py" else set())
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert f"{node.module}.py" in {neighbour.name for neighbour in RUNTIME}


@pytest.mark.parametrize("file", RUNTIME, ids=lambda file: file.name)
def test_calls(file):
    found = {name for name, _ in calls(file)}
    assert not found & RUNS_CODE
    assert {name for name in found if name.split(".")[-1] in TOUCHES_FILES} == ALLOWED.get(file.name, set())


def test_what_some_calls_are_given():
    written = [text for file in RUNTIME for _, text in calls(file)]
    modules = [text for text in written if text.startswith("importlib.import_module(")]
    assert modules == ["importlib.import_module('hf_stepflow')"]
    assert [text for text in written if ".open(" in text] == ["file.open('rb')"]
    # Trust is handed on from the call, or denied; it is never given.
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in RUNTIME]
    keywords = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    trust = {ast.unparse(keyword.value) for keyword in keywords if keyword.arg == "trust_remote_code"}
    assert trust == {"trust"}
    assert not any("'trust_remote_code': True" in ast.unparse(tree) for tree in trees)


def test_files_hide_nothing():
    assert [path.name for path in (PACKAGE / "runtime").iterdir() if path.is_dir()] in ([], ["__pycache__"])
    for file in RUNTIME:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) < (900 if file.name == "kernels.py" else 600)
        assert max(map(len, lines), default=0) < 120
        assert not any(re.search(r"[A-Za-z0-9+/=]{100,}", line) for line in lines)


def test_the_document_names_every_file():
    listed = set(re.findall(r"`(\w+\.py)`", SECURITY))
    assert {file.name for file in RUNTIME} - {"__init__.py"} == listed
    travels = {file.name for file in code_files(*PRESET_CODE, "generate")}
    assert listed - travels == set(re.findall(r"`(\w+\.py)`", SECURITY.split("stays at home")[1]))


WATCHED = """
    import json, os, sys
    import torch
    from transformers import AutoModelForCausalLM

    seen, phase = {"loading": [], "using": []}, "loading"

    def watch(event, details):
        told = seen[phase]
        if event == "open" and isinstance(details[0], (str, bytes)):
            writes = details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            told.append(["write" if writes else "read", os.fsdecode(details[0])])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
            told.extend(["write", os.fsdecode(path)] for path in details if isinstance(path, (str, bytes)))
        elif event in ("shutil.copyfile", "shutil.move"):
            told.append(["write", os.fsdecode(details[1])])
        elif event.split(".")[0] in ("socket", "subprocess", "urllib", "http", "pty", "webbrowser"):
            told.append([event, repr(details)[:100]])
        elif event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pickle.find_class"):
            told.append([event, repr(details)[:100]])

    sys.addaudithook(watch)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    phase = "using"
    ids = torch.tensor([[9, 10, 4, 30, 31, 18, 225, 40, 41, 18, 225, 5, 50]])
    model.generate(ids, max_new_tokens=8, do_sample=False, stepflow={"alpha": 0.2})
    model(ids)
    report = str(model.stepflow_report())
    model.detach_stepflow()
    print(json.dumps(seen | {"report": report}))
"""


def test_a_preset_opens_no_connection_and_writes_no_file(tmp_path):
    """An audit hook sees every file, socket and process that Python opens, whoever asks for it."""
    base = save_base(tmp_path / "base")
    export_preset(strong_preset(tmp_path), tmp_path / "preset", base=base)
    home = tmp_path / "home"
    before = {path.name for path in tmp_path.iterdir()}
    settings = {
        "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "PYTHONPATH": "",
        "TORCHINDUCTOR_CACHE_DIR": str(home / "torch"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED), str(tmp_path / "preset")],
        capture_output=True, text=True, env=os.environ | settings, cwd=tmp_path, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "steps" in seen["report"]
    for phase, kinds in (("loading", {"read", "write"}), ("using", {"read"})):
        assert {kind for kind, _ in seen[phase]} <= kinds, phase
    # Transformers copies the code of a repository to its cache of modules before it imports it; torch makes its own.
    written = {Path(path) for kind, path in seen["loading"] if kind == "write"}
    assert written
    assert [path for path in written if home not in path.parents and home != path] == []
    code = [Path(path).resolve() for path in (*sysconfig.get_paths().values(), sys.base_prefix, sys.prefix, home)]
    own = [tmp_path / "base", tmp_path / "preset"]
    for kind, path in seen["loading"] + seen["using"]:
        place = Path(path).resolve()
        system = place.parts[1] in ("proc", "sys", "dev", "etc", "usr")  # what torch and the tokenizers look up
        assert system or any(root == place or root in place.parents for root in (*code, *own)), (kind, path)
    assert {path.name for path in tmp_path.iterdir()} - before == {"home"}
