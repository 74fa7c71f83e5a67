"""Settings from strangers: whatever a file, a folder or a name holds, it is right or refused with an error of ours.

What a preset's own file may hold is in test_preset_files.py. Here: the other ways in (plain settings, a config.json, a
repository, names), what attaching does with extreme values, and that nothing is run, fetched or written on the way.
"""

import json
import os
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM, load_preset, segment_trace
from hf_stepflow.cli import main
from hf_stepflow.presets import preset as preset_module
from hf_stepflow.runtime.configuration_stepflow import MAX_FILE_BYTES, read_settings
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowError, StepFlowFileError, shown
from hf_stepflow.runtime.repository import find_preset
from hf_stepflow.runtime.settings import MAX_COUNT, MAX_MARKERS, SETTING_NAMES
from hf_stepflow.runtime.token_text import build_marker_table
from tests.presets.test_preset_files import JSON_VALUES
from tests.runtime.test_bad_input import snapshot
from tests.support.flow import byte_tokenizer, encode
from tests.support.presets import edited, tiny_preset, written
from tests.support.tiny_models import tiny_model

BEYOND_A_FLOAT = 10**400


def tree(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def refuse_everywhere(source, words=None):
    """Attaching with it and looking it up are refused with an error of ours; the model is left as it was."""
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(StepFlowError, match=words) as caught:
        StepFlowModelForCausalLM.attach(model, source, tokenizer=byte_tokenizer())
    assert snapshot(model) == before
    assert len(str(caught.value)) < 2000
    return caught.value


def refusal(read, *args, **kwargs):
    """What it was refused with, None for something that is right."""
    try:
        read(*args, **kwargs)
    except StepFlowError as error:
        return str(error)
    return None


# Names


NAMES = [
    "../../etc/passwd",
    "..",
    ".",
    "/",
    "",
    "\0",
    "a\0/b",
    "x" * 5000,
    "x/" + "y" * 5000,
    "a/../../b",
    "~/x",
    "con:/x",
    "org/../x",
    "org/name\n",
    "https://evil.example/x.json",
    "file:///etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "$(touch x)",
    "`id`",
    "\ud800",
    "\u202e/x",
]


@pytest.mark.parametrize("name", NAMES)
def test_names(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StepFlowError):
        load_preset(name)
    with pytest.raises(StepFlowError):
        read_settings(name)
    refuse_everywhere(name)
    assert tree(tmp_path) == []


@given(st.text(max_size=300))
def test_any_name(name):
    for find in (load_preset, find_preset):
        message = refusal(find, name)
        assert name in ("auto", "") if message is None else len(message) < 2000


def test_a_pipe_is_no_file(tmp_path):
    """Opening a named pipe would wait for a writer for ever."""
    os.mkfifo(tmp_path / "config.json")
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(StepFlowFileError):
            load_preset(source)
        with pytest.raises(StepFlowFileError):
            read_settings(source)
        refuse_everywhere(source)


# Plain settings and config.json


FILES = {
    "an endless integer": ('{"alpha": ' + "9" * 5000 + "}", "not JSON"),
    "deep": ('{"alpha": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    "no UTF-8": (b'{"alpha": "\xff"}', "not JSON"),
    "a list": ("[1]", "holds list"),
    "too long": ('{"alpha": 0.1, "x": "' + " " * MAX_FILE_BYTES + '"}', "longer than"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", ["plain.json", "config.json"])
def test_files(tmp_path, case, name):
    content, words = FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StepFlowFileError, match=words) as caught:
        read_settings(path)
    assert str(path) in caught.value.message
    for source in (path, str(path), *([tmp_path] if name == "config.json" else [])):
        refuse_everywhere(source, "plain|config")


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("place", ["preset/config.json", "preset/generation_config.json", "base/config.json"])
def test_files_of_repositories(tmp_path, case, place):
    """What is read of a preset's repository and of its base's, before transformers reads it."""
    content, words = FILES[case]
    for name in ("preset", "base"):
        (tmp_path / name).mkdir()
    preset = {"model_type": "stepflow", "base_model_name_or_path": str(tmp_path / "base")}
    written(tmp_path / "preset", preset, "config.json")
    (tmp_path / place).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StepFlowFileError, match=words) as caught:
        StepFlowModelForCausalLM.from_pretrained(tmp_path / "preset")
    assert place.split("/")[1] in caught.value.message
    assert len(str(caught.value)) < 2000


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = written(tmp_path, {"alpha": 0.1}, "plain.json")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(StepFlowFileError, match=r"cannot be read: .*denied\n.*permissions"):
        read_settings(path)


NESTED = []
for _ in range(50_000):
    NESTED = [NESTED]

VALUES = [
    {"alpha": BEYOND_A_FLOAT},
    {"alpha": -BEYOND_A_FLOAT},
    {"alpha": float("nan")},
    {"tau_max": float("inf")},
    {"tau_max": "0.1"},
    {"length_temperature": BEYOND_A_FLOAT},
    {"length_temperature": 11.0},
    {"length_temperature_base": "8"},
    {"length_temperature_base": float("nan")},
    {"length_temperature_base": 1.0},
    {"sink_tokens": MAX_COUNT + 1},
    {"oeb_span": 2**63},
    {"smi_window": -(2**63)},
    {"min_step_chars": BEYOND_A_FLOAT},
    {"oeb_heads": {"0": [float("inf")]}},
    {"oeb_heads": {"0": [1.9]}},
    {"oeb_heads": {"0": "12"}},
    {"oeb_heads": {"0": [True]}},
    {"oeb_heads": {"9" * 5000: [0]}},
    {"oeb_heads": {"0": [2**63]}},
    {"oeb_heads": {"0": {}}, "oeb_layers": [2**63]},
    {"oeb_layers": [2**63]},
    {"oeb_layers": list(range(100_000))},
    {"oeb_layers": "bottom:nan"},
    {"oeb_layers": "bottom:1e-400"},
    {"smi_layers": "top:" + "9" * 10_000},
    {"thinking_start": "x" * 201},
    {"thinking_start": ["ab" * 50] * 11},
    {"summary_start": [["</think>"]]},
    {"tool_end": "x", "tool_start": {"a": 1}},
    {"step_rule": "(a+)+$"},
    {"step_rule": ["sentence"]},
    {"implicit_thinking": "yes"},
    {"base_model_name_or_path": {"a": 1}},
    {"base_model_revision": 3},
    {"bridge_floor": NESTED},
    {"oeb_layers": NESTED},
]


def words_for(changes):
    """What the message has to name."""
    if changes.get("thinking_start") == ["ab" * 50] * 11:
        return f"markers must have {MAX_MARKERS} characters at most together, got 1108"
    return list(changes)[-1]


@pytest.mark.parametrize("changes", VALUES, ids=[shown(changes)[:60] for changes in VALUES])
def test_values(changes):
    refuse_everywhere(changes, words_for(changes))


@given(st.dictionaries(st.sampled_from(SETTING_NAMES), JSON_VALUES, max_size=3))
def test_any_settings(data):
    """Whatever JSON may hold, through each way that settings come in."""
    message = refusal(read_settings, data)
    assert message == refusal(StepFlowConfig, **data)
    if message is None:
        assert read_settings(json.loads(json.dumps(read_settings(data).to_dict()))) == read_settings(data)
    else:
        assert len(message) < 2000


@given(st.dictionaries(st.sampled_from([*SETTING_NAMES, "stepflow_preset", "auto_map", "x"]), JSON_VALUES, max_size=4))
def test_any_config(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    path = written(folder, {"model_type": "stepflow"} | data, "config.json")
    assert all(isinstance(problem, StepFlowError) for problem in preset_module.find_problems(path))
    assert str(path) in (refusal(load_preset, folder) or str(path))
    for find in (find_preset, read_settings):
        refusal(find, folder)


@given(JSON_VALUES)
def test_any_preset_block(tmp_path_factory, value):
    data = load_preset("qwen3-8b").to_config().to_dict() | {"model_type": "stepflow", "stepflow_preset": value}
    path = written(tmp_path_factory.mktemp("any"), data, "config.json")
    assert str(path) in refusal(load_preset, path)


@given(JSON_VALUES)
def test_the_command_never_falls_over(tmp_path_factory, value):
    path = written(tmp_path_factory.mktemp("any"), json.dumps(value), "preset.json")
    for words in (["validate", str(path)], ["show", str(path.parent)], ["card", str(path)]):
        assert main(["presets", *words]) == 2


# Extreme but right


EXTREMES = [
    {"sink_tokens": MAX_COUNT, "oeb_span": MAX_COUNT, "smi_window": MAX_COUNT, "min_step_chars": MAX_COUNT},
    {"tau_max": 1.0, "bridge_floor": "absolute", "alpha": -100.0},
    {"tau_max": 5e-324, "alpha": 5e-324},
    {"oeb_layers": "bottom:0.000001", "smi_layers": "top:0.000001"},
    {"length_temperature": 10.0, "length_temperature_base": 2.0},
    {"length_temperature": 1.0, "length_temperature_base": float(MAX_COUNT)},
    {"oeb_heads": {0: []}, "min_step_chars": 0},
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_extreme_settings_run(settings):
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), settings, tokenizer=byte_tokenizer())
    ids = torch.tensor([encode("Two eggs?<think>Add one to it now. Then two of them.\n\nWait, three.</think>Four.")])
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] >= ids.shape[1]


# Time: the markers and the text of a model are anybody's


WORST_MARKERS = {
    "one letter": {1: ["a" * 200]},
    "prefixes of each other": {1: ["a" * size for size in range(1, 44)]},
    "two letters": {kind: ["".join("ab"[i * i // (kind + 2) % 2] for i in range(200))] for kind in (1, 2, 3, 4)},
    "nearly a marker": {1: ["<" * 199 + ">"], 2: ["</" * 99 + ">"], 3: ["<<>" * 66], 4: ["<" * 200]},
    "all different": {1: [chr(97 + i % 26) * 2 + f"{i:03}" for i in range(200)]},
}


@pytest.mark.parametrize("case", WORST_MARKERS)
def test_markers_take_no_time(case):
    """Processor time, so that a busy machine is no failure; reading every token in every state takes minutes."""
    markers = WORST_MARKERS[case]
    assert sum(len(text) for texts in markers.values() for text in texts) <= MAX_MARKERS
    letters = b"ab<>/ acdeghi0123"
    words = [bytes(letters[(i * k * k + i // 7 + k) % len(letters)] for k in range(1 + i % 9)) for i in range(30_000)]
    pieces = [bytes([byte]) for byte in range(256)] + words
    begun = time.process_time()
    table = build_marker_table(markers, pieces, {})
    for kind, texts in markers.items():
        for text in texts:
            assert table.read(text.encode()) == kind
    assert time.process_time() - begun < 30


TEXTS = ["a", ".", " ", "\n", "|", "1.", "- ", "e.g.", "?!", "\n\n", "Wait", "\nWait", "<think", "</think>",
         "<think></think>", "\u3002", "a. B", "| a |\n", "(", "\x00"]  # fmt: skip


@pytest.mark.parametrize("rule", ["sentence", "paragraph", "cue"])
def test_texts_take_no_time(rule):
    """Twenty times 3,000 tokens; if each token looked back at the others, this would take an hour."""
    tokenizer, begun = byte_tokenizer(), time.process_time()
    for text in TEXTS:
        ids = encode("<think>" + text * (3000 // len(text)))
        assert len(segment_trace(tokenizer, ids, {"step_rule": rule})) == len(ids)
    assert time.process_time() - begun < 120


# Code


EVIL = "from pathlib import Path\nPath(__file__).with_name('evil-was-here').touch()\nclass Evil:\n    pass\n"


def planted(folder, auto_map):
    """A folder with a module that leaves a trace when it is run, and files that point at it."""
    folder.mkdir(exist_ok=True)
    for name in ("evil", "configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(EVIL)
    for name, data in auto_map.items():
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | data))


@pytest.mark.parametrize(
    "target", ["evil.Evil", "other/repo--evil.Evil", "../evil.Evil", "os.system", ["evil.Evil", 3]]
)
def test_an_auto_map_is_never_followed(tmp_path, capsys, target):
    folder = tmp_path / "preset"
    load_preset(tiny_preset(tmp_path)).to_config().save_pretrained(folder)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), target)
    planted(folder, {"config.json": {"auto_map": auto_map, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}})
    before = tree(tmp_path)
    preset = load_preset(folder)
    assert "auto_map" not in preset.to_config().to_dict()
    assert preset_module.find_problems(folder) == []
    for action in ("show", "validate", "card"):
        assert main(["presets", action, str(folder)]) == 0
        assert "evil" not in capsys.readouterr().out
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), str(folder), tokenizer=byte_tokenizer())
    assert model.stepflow_config.settings == preset.settings
    assert tree(tmp_path) == before
    assert not {"evil", "modeling_evil"} & set(sys.modules)


def test_no_code_of_a_base_model_without_trust(tmp_path):
    """from_pretrained hands trust_remote_code on to transformers and gives it of its own accord to nobody."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    planted(folder, {"config.json": {"auto_map": auto_map}})
    before = tree(tmp_path)
    model = StepFlowModelForCausalLM.from_pretrained(folder, stepflow={"alpha": 0.1}, trust_remote_code=False)
    assert model.stepflow_config.alpha == 0.1
    planted(
        folder,
        {"tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}},
    )
    (folder / "tokenizer.json").unlink()
    with pytest.raises(StepFlowConfigError, match="none could be loaded"):
        StepFlowModelForCausalLM.from_pretrained(folder, stepflow={"alpha": 0.1})
    assert not (folder / "evil-was-here").exists()
    assert {path for path, _ in before} >= {path for path, _ in tree(tmp_path)}


# Files


def test_nothing_is_written_beside_the_target(tmp_path, capsys, monkeypatch):
    """A preset's texts never choose a path."""
    evil = ["../../escaped", "/" + "x" * 50, "~/escaped", "a\nb", "<b>", "$(touch escaped)"]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    monkeypatch.chdir(source)
    for number, text in enumerate(evil):
        StepFlowConfig(thinking_start=text, base_model_name_or_path=text).save_pretrained(source / f"p{number}")
        before = tree(source)
        assert main(["presets", "card", f"p{number}", "--out", str(target / f"{number}.md")]) == 0
        assert tree(source) == before
    assert sorted(path.name for path in target.iterdir()) == [f"{number}.md" for number in range(len(evil))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_links_of_a_preset_folder(tmp_path):
    secret = written(
        tmp_path, load_preset("qwen3-8b").to_config().to_dict() | {"model_type": "stepflow"}, "secret.json"
    )
    for name in ("config.json", "preset.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).symlink_to(secret)
        with pytest.raises(StepFlowFileError, match=f"{name}.* is a link out of its folder"):
            load_preset(folder)
        refuse_everywhere(folder, "is a link out of its folder")
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(StepFlowFileError, match="there is no preset"):
        load_preset(str(tmp_path / "loop.json"))


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\u2028", "\x9b", "\x7f"])
def test_characters_that_deceive(tmp_path, character):
    path = written(tmp_path, edited(notes=f"Calibrated{character}"))
    with pytest.raises(StepFlowFileError, match="control character"):
        load_preset(path)


def test_settings_that_a_message_shows_are_cut():
    assert len(shown("x" * 10**6)) < 200
    assert len(shown(NESTED)) < 200
    assert len(shown({str(i): list(range(1000)) for i in range(1000)})) < 3000
