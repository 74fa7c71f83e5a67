"""The contracts: names, settings, commands, files and repositories that users rely on, listed as literal data.

Additions are allowed: a new name, an optional argument, a setting, a command. What is listed here must neither go nor
change its meaning. `tests/fixtures` holds files of an earlier release, which must stay usable; its README says more.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

import hf_stepflow
from hf_stepflow import EvaluationResult, StepFlowConfig, StepFlowModelForCausalLM, StepSaliency, load_preset
from hf_stepflow.cli import main

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
ROWS = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))["rows"]
BASE_IDS = [row["base"] for row in ROWS]
STEPFLOW_IDS = [row["stepflow"] for row in ROWS]

# Every name of hf_stepflow.__all__, with its kind and signature. "=..." marks an optional argument; None marks a class
# whose instances users receive and do not make.
NAMES = {
    "Arm": (
        "class",
        "stepflow=..., samples=..., temperature=..., min_steps=..., max_steps=..., length_factor=..., instruction=...",
    ),
    "EvaluationResult": ("class", None),
    "FlowReport": ("class", None),
    "Preset": ("class", None),
    "StepBoundaryLogitsProcessor": (
        "class",
        "vocabulary, on_step=..., *, tokenizer=..., prompt_length=..., pad_token_id=...",
    ),
    "StepBudgetLogitsProcessor": (
        "class",
        "vocabulary, min_steps=..., max_steps=..., *, summary_ids=..., prompt_length=..., pad_token_id=...",
    ),
    "StepFlowConfig": ("class", "**kwargs"),
    "StepFlowError": ("class", "message, hint=..."),
    "StepFlowModelForCausalLM": ("class", None),
    "StepSaliency": ("class", "sums, layers, trace, pooling=..., about=..."),
    "StepStreamer": (
        "class",
        "tokenizer, vocabulary=..., skip_prompt=..., timeout=..., prompt_length=..., **decode_kwargs",
    ),
    "StepVocabulary": ("class", None),
    "Trace": ("class", "segment_ids, step_ids, round_ids=..., steps=..."),
    "TraceStep": ("class", "label, round, index, start, end, text=..."),
    "combine_arms": ("function", "arms, methods"),
    "evaluate": (
        "function",
        "model, problems, arms=..., *, tokenizer=..., n_samples=..., seed=..., batch_size=..., max_new_tokens=..., "
        "out=..., progress=..., run_code=..., template=..., keep_ids=..., **generation",
    ),
    "list_presets": ("function", ""),
    "load_preset": ("function", "name_or_path_or_hub_id, *, revision=..., token=..."),
    "load_problems": ("function", "source, limit=..., *, split=..., seed=..."),
    "load_reasoner": ("function", "stepflow=..., *, dtype=..."),
    "odds_equal_bridge": ("function", "logits, same, bridge, *, tau_max, floor=..., sink_logits=..."),
    "score_traces": ("function", "model, rows, stepflow=..., *, batch_tokens=..., progress=..."),
    "segment_trace": ("function", "tokenizer, input_ids, config=..., prompt_length=..."),
    "step_momentum": ("function", "value, start, end, window=..., *, members=..."),
    "step_saliency": (
        "function",
        "model, input_ids, trace=..., *, tokenizer=..., loss=..., layers=..., pooling=..., chunk_size=..., "
        "per_head=..., attention_mask=..., prompt_length=..., config=..., checkpoints=..., progress=...",
    ),
}

# Public members of the classes.
MEMBERS = {
    "Arm": "to_dict",
    "EvaluationResult": "arms comparisons compute is_complete load reference to_dict verdicts",
    "FlowReport": "to_dict",
    "Preset": "check_model claim for_model kind to_config to_dict",
    "StepFlowModelForCausalLM": "from_pretrained attach",
    "StepSaliency": "indices load maps plot plot_profile save steps to_html",
    "StepVocabulary": "from_tokenizer",
}

FROM_PRETRAINED = "pretrained_model_name_or_path, *args, stepflow=..., tokenizer=..., config=..., **kwargs"
ATTACH = "model, config=..., *, tokenizer=..."

# The methods of an attached model.
METHODS = {
    "attach": ATTACH,
    "detach_stepflow": "",
    "disable_stepflow": "",
    "generate": "inputs=..., *args, stepflow=..., **kwargs",
    "push_to_hub": "repo_id, *, preset_only=..., **kwargs",
    "save_pretrained": ("save_directory, *args, preset_only=..., push_to_hub=..., is_main_process=..., **kwargs"),
    "stepflow_report": "",
    "use_stepflow": "settings=...",
}

# Documented import paths below hf_stepflow.
PATHS = {
    "calibration.calibrate": (
        "model, tokenizer, problems, *, budget=..., seed=..., work=..., force=..., stepflow=..., samples=..., "
        "temperature=..., max_new_tokens=..., batch_size=..., scored=..., run_code=..., template=..., progress=..."
    ),
    "hub.export.export_preset": (
        "preset, folder, *, base=..., base_revision=..., merge_weights=..., repo_id=..., token=..."
    ),
    "hub.push.push_preset": (
        "preset, repo_id, *, base=..., base_revision=..., merge_weights=..., private=..., revision=..., token=..., "
        "dry_run=..."
    ),
    "reasoner.levels.problems_of": "level, split, number, start=...",
    "reasoner.load_reasoner": "stepflow=..., *, dtype=...",
    "reasoner.prompts.encode_problem": "tokenizer, problem",
    "saliency.compare.compare": "correct, wrong, *, paired=..., seed=..., level=..., resamples=...",
}

# The settings and their defaults, as flat fields of config.json and in the block "stepflow" of generation_config.json.
SETTINGS = {
    "base_model_name_or_path": None,
    "base_model_revision": None,
    "oeb_layers": "bottom:0.25",
    "oeb_heads": None,
    "tau_max": 0.15,
    "bridge_scope": "segment",
    "bridge_floor": "share",
    "sink_tokens": 0,
    "oeb_span": None,
    "smi_layers": "top:0.25",
    "alpha": 0.06,
    "smi_window": None,
    "length_temperature": 0.0,
    "length_temperature_base": None,
    "length_temperature_layers": "all",
    "length_temperature_heads": None,
    "tool_start": None,
    "tool_end": None,
    "thinking_start": "<think>",
    "summary_start": "</think>",
    "implicit_thinking": False,
    "step_rule": "sentence",
    "min_step_chars": 15,
}

# The commands, as argparse prints their usage. Names of values, such as FILE, may change.
USAGE = {
    "app": (
        "[--revision REVISION] [--dtype DTYPE] [--device DEVICE] [--stepflow CONFIG] [--host HOST] [--port PORT] "
        "[--open] [MODEL]"
    ),
    "calibrate": (
        "[--revision REVISION] [--dtype DTYPE] [--device DEVICE] [--problems PROBLEMS] [--limit LIMIT] "
        "[--budget BUDGET] [--out OUT] [--report REPORT] [--work WORK] [--base-model BASE_MODEL] "
        "[--stepflow CONFIG] [--force] [--samples SAMPLES] [--temperature TEMPERATURE] "
        "[--max-new-tokens MAX_NEW_TOKENS] [--batch-size BATCH_SIZE] [--scored SCORED] [--run-code] [--seed SEED] "
        "[--json] MODEL"
    ),
    "demo": (
        "[--difficulty DIFFICULTY] [--seed SEED] [--problem TEXT] [--problems PROBLEMS] [--html HTML] [--svg SVG] "
        "[--json]"
    ),
    "diagnose": (
        "--model MODEL [--revision REVISION] [--dtype DTYPE] [--device DEVICE] "
        "(--trace FILE | --prompt TEXT | --compare CORRECT WRONG) [--paired] [--stepflow CONFIG] [--steps CONFIG] "
        "[--implicit-thinking] [--loss {trace,summary}] [--max-new-tokens MAX_NEW_TOKENS] [--seed SEED] [--out OUT] "
        "[--json]"
    ),
    "doctor": "[--revision REVISION] [--json] [MODEL]",
    "eval": (
        "--model MODEL [--revision REVISION] [--dtype DTYPE] [--device DEVICE] [--stepflow CONFIG] "
        "--problems PROBLEMS [--split SPLIT] [--limit LIMIT] [--arm ARM] [--with METHOD] [--samples SAMPLES] "
        "[--max-new-tokens MAX_NEW_TOKENS] [--temperature TEMPERATURE] [--top-p TOP_P] [--seed SEED] "
        "[--batch-size BATCH_SIZE] [--run-code] [--out OUT] [--report REPORT] [--json]"
    ),
    "export": (
        "[--base BASE] [--base-revision REVISION] [--merge-weights] [--custom-generate DIR] [--json] [--space DIR] "
        "[--model ID] [PRESET] [DIR]"
    ),
    "generate": (
        "--model MODEL [--revision REVISION] [--dtype DTYPE] [--device DEVICE] [--prompt TEXT] [--prompt-file FILE] "
        "[--system TEXT] [--no-chat-template] [--stepflow CONFIG] [--max-new-tokens MAX_NEW_TOKENS] "
        "[--temperature TEMPERATURE] [--top-p TOP_P] [--seed SEED] [--compare] [--json]"
    ),
    "presets card": "[--json] [--all FOLDER] [--repo-id REPO_ID] [--out FILE] [--revision REVISION] [NAME]",
    "presets list": "[--json] [--kind {paper,rule,measured}]",
    "presets show": "[--json] [--revision REVISION] NAME",
    "presets validate": "[--json] FILE [FILE ...]",
    "serve": (
        "[--revision REVISION] [--dtype DTYPE] [--device DEVICE] [--stepflow CONFIG] [--host HOST] [--port PORT] MODEL"
    ),
    "verify": "[--revision REVISION] [--dtype DTYPE] [--device DEVICE] [--stepflow CONFIG] [--json] MODEL",
    "view": "[--out OUT] [--problems PROBLEMS] [--split SPLIT] RESULTS",
    "push": (
        "[--base BASE] [--base-revision REVISION] [--merge-weights] [--custom-generate REPO_ID] [--private] "
        "[--revision BRANCH] [--dry-run] [--json] [PRESET] [REPO_ID]"
    ),
}

MODEL_MAP = {"AutoModelForCausalLM": "modeling_stepflow.StepFlowModelForCausalLM"}
PRESET_MAP = {"AutoConfig": "configuration_stepflow.StepFlowConfig", **MODEL_MAP}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_stepflow.StepFlowTokenizer", None]}

SCHEMA_REQUIRED = ["schema_version", "name", "base_model", "architecture", "settings", "provenance"]
SCHEMA_OPTIONAL = ["base_model_revision", "notes"]
PROVENANCE = {
    "paper": ["kind", "arxiv", "section", "statement", "figures"],
    "rule": ["kind", "calibrated", "statement"],
    "measured": [
        "kind", "date", "library_version", "dataset", "n", "deltas", "p_value", "command", "verdict",
    ],
}  # fmt: skip

RESULTS_RUN = """problems n_problems model tokenizer dtype settings generation_config attention device arms n_samples
    seed batch_size max_new_tokens generation"""
RESULT = "arm problem sample batch of outcome right answer tokens seconds steps text"
SALIENCY_STEPS = [("question", 0, 0), ("thinking", 1, 1), ("summary", 1, 2), ("summary", 1, 3)]
CALIBRATION_RUN = """problems n_problems model tokenizer dtype device attention settings sampling seed budget scored
    library"""

# Loads repositories where hf_stepflow cannot be imported, and prints the token ids that their models generate.
ALONE = """
import json, sys
sys.modules["hf_stepflow"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
given = json.loads(sys.argv[1])
prompts = [torch.tensor([ids]) for ids in given["prompts"]]
greedy = {"do_sample": False, "max_new_tokens": given["length"]}
out = {}


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def run(name, model, number=1, **options):
    out[name] = []
    for ids in prompts[:number]:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy, **options)
        out[name].append(made[0, ids.shape[1]:].tolist())


for age in ("earlier", "present"):
    here = f"{given['folder']}/{age}"
    model = load(f"{here}/preset", trust_remote_code=True)
    run(f"{age} preset", model, len(prompts))
    tokenizer = AutoTokenizer.from_pretrained(f"{here}/preset", trust_remote_code=True)
    out[f"{age} tokenizer"] = [tokenizer.encode(text, add_special_tokens=False) for text in given["texts"]]
    run(f"{age} whole", load(f"{here}/whole", trust_remote_code=True))
    run(f"{age} whole without trust", load(f"{here}/whole"))
    # Saved again by the code of the repository.
    model.save_pretrained(f"{here}/preset-again", preset_only=True)
    model.save_pretrained(f"{here}/whole-again")
    run(f"{age} preset again", load(f"{here}/preset-again", trust_remote_code=True))
    run(f"{age} whole again", load(f"{here}/whole-again", trust_remote_code=True))
    base = load(given["base"])
    called = {"custom_generate": f"{here}/custom_generate", "trust_remote_code": True, "tokenizer": tokenizer}
    run(f"{age} custom_generate", base, stepflow=given["settings"], **called)
    run(f"{age} base after custom_generate", base)
assert not any(name.startswith("hf_stepflow.") for name in sys.modules)
print("OUT" + json.dumps(out))
"""


def signature(text: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {text}: 0"))


def assert_accepts(function, promised: str, name: str) -> None:
    """Checks that a callable takes every call that a promised signature allows."""
    listed = signature(promised).parameters.values()
    present = dict(inspect.signature(function).parameters)
    positional = [one for one in listed if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert [one.name for one in positional] == list(present)[: len(positional)], name
    for one in listed:
        found = present.pop(one.name, None)
        assert found is not None, f"{name} lacks {one.name}"
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            assert found.kind in (one.kind, one.POSITIONAL_OR_KEYWORD), f"{name}: {one.name}"
            assert one.default is one.empty or found.default is not one.empty, f"{name} demands {one.name}"
        else:
            assert found.kind is one.kind, f"{name}: {one.name}"
    for found in present.values():
        variable = found.kind in (found.VAR_POSITIONAL, found.VAR_KEYWORD)
        assert variable or found.default is not found.empty, f"{name} demands {found.name}, which is new"


def arguments(usage: str) -> tuple[dict[str, tuple[int, set[str], bool]], list[bool]]:
    """Reads an argparse usage line.

    Args:
        usage: The line, without the name of the program.

    Returns:
        The flags, each with its number of values, its choices and whether it is required; and for each positional
        argument whether it is required.
    """
    flags: dict[str, tuple[int, set[str], bool]] = {}
    positional = []
    depth, flag = 0, None
    for token in re.findall(r"--[a-z][a-z-]*|\{[^}]*\}|[A-Z][A-Z_]*|[\[\]()|]|\.\.\.", usage):
        if token in "[](":
            depth += -1 if token == "]" else 1
            flag = None
        elif token in (")", "|"):
            depth -= token == ")"
            flag = None
        elif token.startswith("--"):
            flag = token
            flags[flag] = (0, set(), depth == 0)
        elif token == "...":
            positional[-2:] = positional[-2:-1]  # FILE [FILE ...] is one argument
        elif flag is None:
            positional.append(depth == 0)
        else:
            values, choices, is_required = flags[flag]
            choices = set(token[1:-1].split(",")) if token.startswith("{") else choices
            flags[flag] = (values + 1, choices, is_required)
    return flags, positional


def usage_of(verb: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    return printed.split("\n\n")[0].removeprefix(f"usage: hf-stepflow {verb} ")


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def generated(model, rows=ROWS, **options) -> list[list[int]]:
    """The greedy continuation of the prompts."""
    made = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        asked = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": len(row["base"])}
        made.append(model.generate(ids, **asked, **options)[0, ids.shape[1] :].tolist())
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return Path(shutil.copytree(FIXTURES / "base", tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture(scope="module")
def earlier(base, tmp_path_factory) -> Path:
    """The repositories of the earlier release, with all their modules, naming the base model by its path."""
    folder = tmp_path_factory.mktemp("repositories") / "earlier"
    for name in ("preset", "whole", "custom_generate"):
        shutil.copytree(FIXTURES / name, folder / name)
    for file in (FIXTURES / "preset").glob("*.py"):
        shutil.copy(file, folder / "whole")
        shutil.copy(file, folder / "custom_generate" / "custom_generate")
    for name in ("config.json", "generation_config.json"):
        data = read(folder / "preset" / name)
        data.get("stepflow", data)["base_model_name_or_path"] = str(base)
        (folder / "preset" / name).write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def present(base, earlier) -> Path:
    """The same repositories, written by this release."""
    from hf_stepflow.hub.export import export_preset

    folder = earlier.with_name("present")
    folder.mkdir()
    export_preset(FIXTURES / "tiny.json", folder / "preset", base=base)
    StepFlowModelForCausalLM.from_pretrained(folder / "preset").save_pretrained(folder / "whole")
    assert main(["export", "--custom-generate", str(folder / "custom_generate")]) == 0
    return folder


def test_public_names():
    assert set(NAMES) <= set(hf_stepflow.__all__)
    for name, (kind, promised) in NAMES.items():
        found = getattr(hf_stepflow, name)
        assert (inspect.isclass(found), callable(found)) == (kind == "class", True), name
        assert found.__module__.startswith("hf_stepflow."), name
        if promised is not None:
            assert_accepts(found, promised, name)
    for name, members in MEMBERS.items():
        assert [member for member in members.split() if not hasattr(getattr(hf_stepflow, name), member)] == [], name
    assert hf_stepflow.__version__ == metadata.version("hf-stepflow")
    assert issubclass(hf_stepflow.StepFlowError, Exception)


@pytest.mark.parametrize("path", PATHS)
def test_documented_paths(path):
    module, _, name = f"hf_stepflow.{path}".rpartition(".")
    assert_accepts(getattr(importlib.import_module(module), name), PATHS[path], path)


def test_the_reasoner_where_the_documentation_names_it():
    from hf_stepflow.reasoner import FOLDER, load_reasoner
    from hf_stepflow.reasoner.levels import problems_of
    from hf_stepflow.reasoner.prompts import encode_problem

    assert read(Path(FOLDER) / "config.json")["architectures"]
    reasoner, tokenizer = load_reasoner()
    assert isinstance(reasoner, StepFlowModelForCausalLM)
    (problem,) = problems_of("chains-7", "test", 1)
    prompt, response = encode_problem(tokenizer, problem)
    assert all(isinstance(one, int) for one in prompt + response)


def test_methods_of_an_attached_model(model):
    plain = type(model)
    assert_accepts(StepFlowModelForCausalLM.from_pretrained, FROM_PRETRAINED, "from_pretrained")
    attached = StepFlowModelForCausalLM.attach(model)
    assert attached is model
    assert isinstance(attached, StepFlowModelForCausalLM)
    assert isinstance(attached, plain)
    for name, promised in METHODS.items():
        assert_accepts(getattr(attached, name), promised, name)
    config = attached.stepflow_config
    assert isinstance(config, StepFlowConfig)
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    attached.stepflow_config = load_preset(FIXTURES / "tiny.json").settings
    assert attached.generation_config.stepflow["tau_max"] == 0.9
    assert generated(attached) == STEPFLOW_IDS
    assert isinstance(attached.stepflow_report(), hf_stepflow.FlowReport)
    one, plain_ids, stepflow_ids = ROWS[:1], BASE_IDS[:1], STEPFLOW_IDS[:1]
    with attached.disable_stepflow():
        assert generated(attached) == BASE_IDS
    with attached.use_stepflow(False):
        assert generated(attached, one) == plain_ids
    with attached.use_stepflow({"tau_max": 0.0, "alpha": 0.0}):
        assert generated(attached, one) == plain_ids
    assert generated(attached, one, stepflow=False) == plain_ids
    assert generated(attached, one, stepflow={"tau_max": 0.0, "alpha": 0.0}) == plain_ids
    assert generated(attached, one) == stepflow_ids
    assert attached.detach_stepflow() is model
    assert type(model) is plain
    assert generated(model, one) == plain_ids


def test_setting_keys_and_defaults(base, model, tmp_path):
    attached = StepFlowModelForCausalLM.attach(model, {"base_model_name_or_path": str(base)})
    attached.save_pretrained(tmp_path / "preset", preset_only=True)
    attached.save_pretrained(tmp_path / "whole")
    here = SETTINGS | {"base_model_name_or_path": str(base)}
    assert StepFlowConfig.model_type == "stepflow"
    config = read(tmp_path / "preset" / "config.json")
    assert config["model_type"] == "stepflow"
    blocks = {
        "StepFlowConfig": (StepFlowConfig().to_dict(), SETTINGS),
        "generation_config": (attached.generation_config.stepflow, here),
        "config.json": (config, here),
        "generation_config.json": (read(tmp_path / "preset" / "generation_config.json")["stepflow"], here),
        "whole": (read(tmp_path / "whole" / "generation_config.json")["stepflow"], SETTINGS),
    }
    for name, (found, promised) in blocks.items():
        assert {key: found.get(key, "no such key") for key in SETTINGS} == promised, name


def test_preset_schema_version_1(tmp_path, capsys):
    schema = read(ROOT / "calibrations" / "schema.json")
    assert schema["properties"]["schema_version"] == {"const": 1}
    assert schema["required"] == SCHEMA_REQUIRED
    assert {*SCHEMA_REQUIRED, *SCHEMA_OPTIONAL} <= set(schema["properties"])
    assert {name for name in SETTINGS if not name.startswith("base_model")} <= set(
        schema["properties"]["settings"]["properties"]
    )
    for kind, required in PROVENANCE.items():
        assert schema["$defs"][kind]["required"] == required, kind
    preset = load_preset(FIXTURES / "tiny.json")
    assert (preset.name, preset.base_model, preset.kind) == ("tiny", "org/Tiny", "measured")
    data = read(FIXTURES / "tiny.json")
    stored = preset.to_dict()
    assert {name: stored.get(name) for name in data} == data
    assert main(["presets", "validate", str(FIXTURES / "tiny.json")]) == 0
    (tmp_path / "tiny.json").write_text(json.dumps(data | {"schema_version": 2}), encoding="utf-8")
    assert main(["presets", "validate", str(tmp_path / "tiny.json")]) == 2
    shipped = [file for file in (ROOT / "calibrations").glob("*.json") if file.name != "schema.json"]
    assert {read(file)["schema_version"] for file in shipped} == {1}
    assert {file.stem for file in shipped} <= {each.name for each in hf_stepflow.list_presets()}


def test_a_preset_repository_is_a_preset(earlier):
    preset = load_preset(earlier / "preset")
    assert (preset.name, preset.kind) == ("tiny", "measured")
    assert preset.provenance == read(FIXTURES / "tiny.json")["provenance"]


@pytest.mark.parametrize("verb", USAGE)
def test_commands_and_flags(verb, capsys, monkeypatch):
    promised, places = arguments(USAGE[verb])
    present, found_places = arguments(usage_of(verb, capsys, monkeypatch))
    for flag, (values, choices, is_required) in promised.items():
        assert flag in present, f"{verb} lacks {flag}"
        found_values, found_choices, is_demanded = present[flag]
        assert found_values == values, f"{verb} {flag}"
        assert choices <= found_choices if choices else not found_choices, f"{verb} {flag}"
        assert is_required or not is_demanded, f"{verb} demands {flag}"
    assert [flag for flag in present.keys() - promised.keys() if present[flag][2]] == [], verb
    assert len(found_places) >= len(places), verb
    assert not any(is_demanded > is_required for is_demanded, is_required in zip(found_places, places, strict=False))
    assert not any(found_places[len(places) :]), verb


def test_the_usage_reader_sees_changes():
    assert arguments("[-h] --model MODEL [--loss {a,b}] (--one A | --two A B) FILE [FILE ...]") == (
        {"--model": (1, set(), True), "--loss": (1, {"a", "b"}, False), "--one": (1, set(), False),
         "--two": (2, set(), False)},
        [True],
    )  # fmt: skip
    for promised in ("path", "path, *, revision", "path, revision=..., *, token=...", "path, *args"):
        with pytest.raises(AssertionError):
            assert_accepts(lambda path, new, *, token=None: 0, promised, "f")


def test_the_command_is_installed():
    scripts = metadata.entry_points(group="console_scripts")
    assert [script.value for script in scripts if script.name == "hf-stepflow"] == ["hf_stepflow.cli:main"]


def test_exit_0_is_success_and_1_a_finding_of_doctor(base, tmp_path, capsys):
    assert main(["presets", "list"]) == 0
    assert main(["doctor", str(base)]) == 0
    unsupported = shutil.copytree(base, tmp_path / "unsupported")
    MambaConfig(vocab_size=261, hidden_size=16, num_hidden_layers=1).save_pretrained(unsupported)
    assert main(["doctor", str(unsupported)]) == 1


def test_exit_2_is_an_error(tmp_path, capsys):
    assert main(["presets", "show", "no-such-preset"]) == 2
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
    assert "hf-stepflow: error: " in capsys.readouterr().err
    for words in (["no-such-command"], ["presets", "list", "--no-such-flag"], []):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2


def test_exit_3_is_a_calibration_that_finds_nothing_and_what_it_keeps(tmp_path, capsys):
    words = "calibrate reasoner --problems reasoner:chains-2 --limit 28 --budget 2 --max-new-tokens 44 --seed 0"
    work, out = tmp_path / "work", tmp_path / "found.json"
    words = [*words.split(), "--work", str(work), "--out", str(out)]
    assert main(words) == 3
    header = read(work / "run.json")
    assert header["format"] == "hf-stepflow-calibration/2"
    assert {"run", "about"} <= set(header)
    assert set(CALIBRATION_RUN.split()) <= set(header["run"])
    parts = [file for file in work.glob("*/*.json") if not file.name.startswith(".")]
    assert "answers" in {part.parent.name for part in parts}
    for part in parts:
        assert re.fullmatch("[0-9a-f]{16}", part.stem)
        assert {"seconds", "found"} <= set(read(part))
    preset = read(out)
    assert (preset["schema_version"], preset["provenance"]["verdict"]) == (1, "no measurable gain")
    assert (preset["settings"]["tau_max"], preset["settings"]["alpha"]) == (0, 0)
    before = {file: file.read_bytes() for file in work.rglob("*.json")}
    assert main(words) == 3  # continued
    assert before == {file: file.read_bytes() for file in work.rglob("*.json")}


def test_results_of_the_earlier_release_are_read_and_continued(model, tmp_path):
    lines = [json.loads(line) for line in (FIXTURES / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    header, results = lines[0], lines[1:]
    loaded = EvaluationResult.load(FIXTURES / "results.jsonl")
    assert loaded.is_complete
    assert loaded.run == header["run"]
    assert loaded.reference == "base"

    problems = [
        {"id": "1", "question": "Two eggs?", "answer": "2"},
        {"id": "2", "question": "How many?", "answer": "9"},
    ]
    arms = {name: arm["stepflow"] for name, arm in header["run"]["arms"].items()}
    options = {"tokenizer": AutoTokenizer.from_pretrained(FIXTURES / "base"), "max_new_tokens": 8, "progress": False}
    fresh = tmp_path / "fresh.jsonl"
    hf_stepflow.evaluate(model, problems, arms, out=fresh, **options)
    written = [json.loads(line) for line in fresh.read_text(encoding="utf-8").splitlines()]
    assert written[0]["format"] == header["format"] == "hf-stepflow-results/1"
    assert set(RESULTS_RUN.split()) <= set(written[0]["run"])
    for one in written[1:]:
        assert set(RESULT.split()) <= set(one)

    def content(one):
        return {key: one[key] for key in RESULT.split() if key != "seconds"}

    assert list(map(content, written[1:])) == list(map(content, results))
    # Only settings and the generation config may gain keys; the file is continued once these are up to date.
    for key in header["run"].keys() - {"settings", "generation_config"}:
        assert written[0]["run"][key] == header["run"][key], key
    header["run"] |= {key: written[0]["run"][key] for key in ("settings", "generation_config")}
    continued = tmp_path / "continued.jsonl"
    continued.write_text("".join(json.dumps(one) + "\n" for one in (header, *results)), encoding="utf-8")
    before = continued.read_bytes()
    result = hf_stepflow.evaluate(model, problems, arms, out=continued, **options)
    assert result.is_complete
    assert continued.read_bytes() == before


def test_saliency_of_the_earlier_release_is_read(model, tmp_path):
    from safetensors import safe_open

    earlier = StepSaliency.load(FIXTURES / "saliency.safetensors")
    assert earlier.layers == [0, 1, 2, 3]
    assert earlier.pooling == "causal"
    assert earlier.maps.shape == (4, 4, 4)
    assert [(step.label, step.round, step.index) for step in earlier.steps] == SALIENCY_STEPS
    earlier.save(tmp_path / "again.safetensors")
    for path in (FIXTURES / "saliency.safetensors", tmp_path / "again.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["stepflow"])
            assert {"sums", "segment_ids", "step_ids", "round_ids"} <= set(file.keys())
        assert header["format"] == "stepflow-saliency-1"
        assert {"layers", "pooling", "steps", "about"} <= set(header)
    again = StepSaliency.load(tmp_path / "again.safetensors")
    assert torch.equal(again.sums, earlier.sums)
    assert again.steps == earlier.steps


def test_auto_maps_and_modules(present, earlier):
    for folder in (present, earlier):
        config = read(folder / "preset" / "config.json")
        assert (config["model_type"], config["auto_map"]) == ("stepflow", PRESET_MAP)
        assert config["architectures"] == ["StepFlowModelForCausalLM"]
        assert config["stepflow_preset"]["name"] == "tiny"
        assert read(folder / "preset" / "tokenizer_config.json")["auto_map"] == TOKENIZER_MAP
        whole = read(folder / "whole" / "config.json")
        assert (whole["model_type"], whole["auto_map"]) == ("llama", MODEL_MAP)
        assert whole["architectures"] == ["LlamaForCausalLM"]
        for name in ("configuration_stepflow", "modeling_stepflow", "tokenization_stepflow"):
            assert (folder / "preset" / f"{name}.py").is_file()
            assert (folder / "whole" / f"{name}.py").is_file()
        assert not list((folder / "preset").glob("*.safetensors"))
        assert (folder / "whole" / "tokenizer.json").is_file()
        assert folder == earlier or (folder / "whole" / "custom_generate" / "generate.py").is_file()
        custom = folder / "custom_generate" / "custom_generate"
        assert (custom / "generate.py").is_file()
        assert "transformers" in (custom / "requirements.txt").read_text(encoding="utf-8")
        for kind in ("preset", "custom_generate"):
            assert (folder / kind / "README.md").is_file()


def test_the_fixtures_show_stepflow():
    assert len(ROWS) == 3
    for row in ROWS:
        assert sum(ours != plain for ours, plain in zip(row["stepflow"], row["base"], strict=True)) >= 10


def test_repositories_load_where_hf_stepflow_is_not_installed(base, earlier, present, tmp_path):
    given = {
        "folder": str(earlier.parent),
        "base": str(base),
        "prompts": [row["prompt_ids"] for row in ROWS],
        "texts": [row["prompt"] for row in ROWS],
        "length": len(BASE_IDS[0]),
        "settings": read(FIXTURES / "tiny.json")["settings"],
    }
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ALONE, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.rsplit("OUT", 1)[1])
    assert len(out) == 16
    for name, found in out.items():
        if name.endswith("tokenizer"):
            assert found == given["prompts"], name
        elif "without trust" in name or "base after" in name:
            assert found == BASE_IDS[:1], name
        else:
            assert found == STEPFLOW_IDS[: len(found)], name
            assert found


def test_the_package_loads_repositories_of_the_earlier_release(earlier, base, tmp_path):
    assert generated(AutoModelForCausalLM.from_pretrained(base)) == BASE_IDS
    for name in ("preset", "whole"):
        loaded = StepFlowModelForCausalLM.from_pretrained(earlier / name)
        assert type(loaded).__mro__[1].__module__.startswith("hf_stepflow."), name
        assert generated(loaded) == STEPFLOW_IDS, name
        loaded.save_pretrained(tmp_path / name, preset_only=name == "preset")
        again = StepFlowModelForCausalLM.from_pretrained(tmp_path / name)
        assert generated(again, ROWS[:1]) == STEPFLOW_IDS[:1], name
    attached = StepFlowModelForCausalLM.from_pretrained(base, stepflow=earlier / "preset")
    assert generated(attached, ROWS[:1]) == STEPFLOW_IDS[:1]


def test_repositories_of_the_earlier_release_find_presets_where_the_package_is_installed(earlier, base):
    preset = str(FIXTURES / "tiny.json")
    loaded = AutoModelForCausalLM.from_pretrained(earlier / "preset", trust_remote_code=True, stepflow=preset)
    assert not isinstance(loaded, StepFlowModelForCausalLM)  # the class is the repository's own
    assert generated(loaded, ROWS[:1]) == STEPFLOW_IDS[:1]
    loaded = AutoModelForCausalLM.from_pretrained(earlier / "preset", trust_remote_code=True, stepflow="auto")
    assert loaded.stepflow_config.tau_max == load_preset("qwen3-8b").settings.tau_max == 0.15
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    call = {"custom_generate": str(earlier / "custom_generate"), "trust_remote_code": True, "tokenizer": tokenizer}
    assert generated(plain, ROWS[:1], stepflow=preset, **call) == STEPFLOW_IDS[:1]
