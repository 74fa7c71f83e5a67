"""Model cards: the committed ones are up to date, say what stands behind a preset, and nothing breaks out of them."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_stepflow import Preset, StepFlowConfig, list_presets, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub.cards import custom_generate_card, inline_code, inline_text, json_code, preset_card
from hf_stepflow.presets.architecture import Architecture
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.settings import StepFlowSettings
from tests.support.presets import MEASURED, NOTHING_COMPARED, OFF, edited, written

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
PRESETS = {preset.name: preset for preset in list_presets()}
LOCAL_PATH = re.compile(r"(?<![\w.:/`])/(home|root|tmp|usr|work|Users|mnt|var)\b|[A-Z]:\\\\|file:")
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/pixel.png)",
    "[a]: https://evil.example",
    "---\nlicense: mit\n---",
    "\n---\nbase_model: evil/model\n---\n# Owned",
    "\n\n# Owned\n\n* list\n\n> quote",
    "x | y | z |\n| --- | --- |",
    "`` ` ``` <b>x</b> `",
    "\\| <b>x</b> `\\|` \\",
    "**bold** __bold__ *it* _it_ ~~gone~~ $$x$$ \\\\(y\\\\)",
    "&lt;b&gt; &#60;b&#62;",
    "{{ card_data }} {% for x in y %} {# c #}",
    "\u202eevil\u202c \u2028# Owned \x1b[2J \x00 \ud800",
    "!!python/object/apply:os.system ['true'] &anchor *anchor : - ? {a: b}",
]


class Seen(HTMLParser):
    """The elements, attributes and text of a rendered card."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.text.append(data)


def rendered(markdown):
    seen = Seen()
    seen.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    seen.close()
    return seen


def hostile_preset(text, kind="measured"):
    """A preset with this text wherever a text can be."""
    provenance = {
        "measured": MEASURED
        | {"dataset": text, "command": text, "machine": text, "library_version": text, "date": text}
        | {"deltas": [MEASURED["deltas"][0] | {"metric": text}]},
        "paper": PRESETS["qwq-32b"].provenance
        | {"statement": text, "section": text, "figures": [{"benchmark": text, "base": 1.0, "stepflow": 2.0}]},
        "rule": {"kind": "rule", "calibrated": False, "statement": text},
        "unstated": {"kind": "unstated"},
    }[kind]
    settings = StepFlowSettings(thinking_start=text, summary_start=[text, "</think>"], base_model_name_or_path=text)
    architecture = Architecture(text, 4, 4, 2)
    return Preset(text, text, text, architecture, settings, provenance, None, notes=text)


def reloaded(card, tmp_path):
    path = tmp_path / "README.md"
    card.save(path)
    return ModelCard.load(path)


# The committed cards


def test_every_preset_has_a_card():
    assert {file.stem for file in CARDS.iterdir()} == set(PRESETS)
    assert {file.suffix for file in CARDS.iterdir()} == {".md"}


@pytest.mark.parametrize("name", PRESETS)
def test_committed_cards(name):
    file, preset = CARDS / f"{name}.md", PRESETS[name]
    text = file.read_text(encoding="utf-8")
    assert text == str(preset_card(preset)), "run `hf-stepflow presets card --all model_cards`"
    card = ModelCard.load(file)
    assert str(card) == text
    data = card.data.to_dict()
    assert ("model-index" in data) == bool(preset.provenance.get("deltas"))
    data.pop("model-index", None)
    assert data == {
        "base_model": preset.base_model,
        "base_model_relation": "adapter",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stepflow"],
    }
    assert not LOCAL_PATH.search(text)
    assert preset.base_model in card.text
    assert f"YOUR-NAME/{name}-stepflow` stands for the id of this repository" in card.text
    assert ("**A rule, NOT calibrated" in card.text) == (preset.kind == "rule")
    assert ("NOT measured by this project" in card.text) == (preset.kind == "paper")
    assert all(
        f"{figure['base']:.1f} | {figure['stepflow']:.1f}" in card.text
        for figure in preset.provenance.get("figures", [])
    )
    assert ("Measured on this model" in card.text) == (preset.kind == "measured")
    links = {f"https://huggingface.co/{preset.base_model}", "https://arxiv.org/abs/2604.06695"}
    assert set(rendered(card.text).links) == links


def test_every_setting_is_in_the_table():
    seen = rendered(preset_card(PRESETS["gpt-oss-20b"]).text)
    text = "".join(seen.text)
    for name, value in PRESETS["gpt-oss-20b"].to_dict()["settings"].items():
        assert name in text
        assert json.dumps(value) in text
    assert "Layers of the bridge: 0, 1, 2, 3, 4, 5. Layers of the injection: 18, 19, 20, 21, 22, 23." in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"tau_max": 0.0}, "In this preset the bridge is switched off."),
        ({"smi_layers": "none", "oeb_layers": []}, "In this preset the bridge and the injection are switched off."),
        (
            {"length_temperature": 1.0, "length_temperature_base": 300},
            "It sets a length temperature.*from 300",
        ),
    ],
)
def test_what_a_preset_does_not_use(changes, told):
    preset = PRESETS["qwen3-8b"]
    text = preset_card(dataclasses.replace(preset, settings=preset.settings.replace(**changes))).text
    words = ("In this preset the", "It sets a length temperature")
    assert [word in text for word in words] == [told is not None and word in told for word in words]
    assert told is None or re.search(told, text)


def test_the_citation_is_that_of_the_readme():
    citation = re.search(r"```bibtex\n.*?```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert citation in preset_card(PRESETS["qwq-32b"]).text
    assert citation in custom_generate_card().text


@pytest.mark.parametrize("card", [preset_card(PRESETS["qwq-32b"]), custom_generate_card()])
def test_the_code_of_a_card_is_python(card):
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "card", "exec")


# Kinds of cards


def test_nothing_compared_is_no_result(tmp_path):
    path = written(tmp_path, edited(provenance=NOTHING_COMPARED, **OFF))
    card = reloaded(preset_card(load_preset(path), "me/qwen3-8b-stepflow"), tmp_path)
    assert "model-index" not in card.content
    assert "Nothing was compared with the base" in card.text
    assert "p-value" not in card.text
    assert "None" not in card.text


def test_measured_presets_get_a_model_index(tmp_path):
    path = written(tmp_path, edited(provenance=MEASURED, settings__tau_max=0.3, notes="Mind the *gap*."))
    card = reloaded(preset_card(load_preset(path), "me/qwen3-8b-stepflow"), tmp_path)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy_difference", 0.4)
    assert result.metric_args == {"n": 500, "low": -1.2, "high": 2.0, "confidence": 0.95, "p_value": 0.61}
    assert result.metric_name == "accuracy, with StepFlow minus without in points, 95 % interval [-1.2, 2], n = 500"
    assert (result.dataset_type, result.dataset_name) == ("math500", "math500 (n = 500)")
    assert result.verified is None
    assert card.data.model_name == "qwen3-8b"
    assert "**Measured on this model: NO measurable gain.**" in card.text
    assert "NOT calibrated" not in card.text
    assert "Mind the *gap*." in "".join(rendered(card.text).text)
    assert "me/qwen3-8b-stepflow" in card.text
    assert "YOUR-NAME" not in card.text
    assert str(tmp_path) not in str(card)


def test_a_trade_says_so_in_the_first_line_of_its_card(tmp_path):
    deltas = [{**MEASURED["deltas"][0], "low": 0.1}]
    provenance = {**MEASURED, "verdict": "trade", "deltas": deltas, "p_value": 0.01}
    path = written(tmp_path, edited(provenance=provenance, settings__tau_max=0.3))
    title, first = [line for line in preset_card(load_preset(path)).text.splitlines() if line][:2]
    assert title.startswith("# StepFlow for")
    assert first.startswith(
        "**A TRADE: on this model these settings gain on some kinds of problems and lose on others"
    )
    assert "a gain." not in preset_card(load_preset(path)).text


def test_unstated_presets(tmp_path):
    folder = tmp_path / "My Folder"
    StepFlowConfig(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(folder)
    card = preset_card(load_preset(folder))
    assert "**Not stated.**" in card.text
    assert str(tmp_path) not in str(card)
    assert "base_model" not in card.data.to_dict()
    assert "YOUR-NAME/PRESET-stepflow" in card.text
    assert 'base = "ORGANISATION/BASE-MODEL"' in card.text


def test_revisions_are_pinned(tmp_path):
    path = written(tmp_path, edited(base_model_revision="refs/pr/1"))
    assert 'from_pretrained(base, stepflow=repo, revision="refs/pr/1")' in preset_card(load_preset(path)).text


def test_merged_cards():
    text = preset_card(PRESETS["qwq-32b"], "me/merged", kind="merged").text
    assert "holds the weights of" in text
    assert 'repo = "me/merged"\nmodel = StepFlowModelForCausalLM.from_pretrained(repo)' in text
    assert "no weights" in preset_card(PRESETS["qwq-32b"]).text


def test_custom_generate_card(tmp_path):
    card = reloaded(custom_generate_card("me/stepflow-generate"), tmp_path)
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["custom_generate", "stepflow"],
    }
    assert 'custom_generate="me/stepflow-generate"' in card.text
    assert "Settings" not in re.findall("^## (.*)$", card.text, re.MULTILINE)
    assert "YOUR-NAME/stepflow-generate" in custom_generate_card().text


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "a b", "x" * 200, "a--b", "", "me/x\n# Owned", "me/<b>"])
def test_ids_that_the_hub_refuses(repo_id):
    for make in (lambda: preset_card(PRESETS["qwq-32b"], repo_id), lambda: custom_generate_card(repo_id)):
        with pytest.raises(StepFlowInputError, match="repo_id is ") as caught:
            make()
        assert repr(repo_id)[:20] in caught.value.message


def test_another_kind():
    with pytest.raises(StepFlowInputError, match=r"got 'custom_generate'\n.*custom_generate_card"):
        preset_card(PRESETS["qwq-32b"], kind="custom_generate")


# Texts from outside


@pytest.mark.parametrize("kind", ["measured", "paper", "rule", "unstated"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_text(tmp_path, text, kind):
    card = preset_card(hostile_preset(text, kind))
    plain = preset_card(hostile_preset("plain", kind))
    loaded = reloaded(card, tmp_path)
    assert str(loaded) == str(card)
    assert loaded.data.to_dict().keys() == plain.data.to_dict().keys()
    assert "base_model" not in loaded.data.to_dict()
    seen, expected = rendered(loaded.text), rendered(plain.text)
    code = {"code"}  # inline code is written either way; everything else has to be the same elements in the same order
    assert [tag for tag in seen.tags if tag not in code] == [tag for tag in expected.tags if tag not in code]
    assert seen.links == expected.links
    visible = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert visible in " ".join("".join(seen.text).split())


@given(st.text(max_size=60))
def test_any_text_stays_text(text):
    """Between two words of a paragraph and in a cell, any text comes back as itself and as nothing else."""
    visible = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    seen = rendered(f"before {inline_text(text)} after")
    assert seen.tags == ["p"]
    assert "".join(seen.text).split() == f"before {visible} after".split()
    cells = [inline_code(text), json_code(text), inline_text(text)]
    seen = rendered(f"| a | b | c |\n| --- | --- | --- |\n| {' | '.join(cells)} |")
    assert [tag for tag in seen.tags if tag not in ("tr", "thead", "tbody")] == [
        "table", "th", "th", "th", "td", "code", "td", "code", "td"
    ]  # fmt: skip


@given(st.text(max_size=60))
def test_any_text_in_the_metadata(text):
    content = str(preset_card(hostile_preset(text or "x")))
    head = content.split("\n---\n")[0].removeprefix("---\n")
    data = yaml.safe_load(head)
    assert data["tags"] == ["stepflow"]
    assert ModelCard(content).data.to_dict() == data


# The command


def test_printing(capsys):
    assert main(["presets", "card", "Qwen/QwQ-32B"]) == 0
    assert capsys.readouterr().out == (CARDS / "qwq-32b.md").read_text(encoding="utf-8") + "\n"
    assert main(["presets", "card", "qwq-32b", "--repo-id", "me/it", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["metadata"]["base_model"] == "Qwen/QwQ-32B"
    assert data["card"] == str(preset_card(PRESETS["qwq-32b"], "me/it"))
    assert data["path"] is None


def test_files(capsys, tmp_path):
    file = tmp_path / "new" / "README.md"
    assert main(["presets", "card", "qwq-32b", "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    assert file.read_text(encoding="utf-8") == (CARDS / "qwq-32b.md").read_text(encoding="utf-8")
    assert main(["presets", "card", "--all", str(tmp_path / "all"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(PRESETS)
    assert {file.stem for file in (tmp_path / "all").iterdir()} == set(PRESETS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen3-9b"], "there is no preset 'qwen3-9b'"),
        (["qwq-32b", "--repo-id", "../x"], "repo_id is '../x'"),
        (["qwq-32b", "--out", "{here}/file/README.md"], "cannot be written"),
        (["--all", "{here}/all", "--repo-id", "me/it"], "--all takes no --repo-id"),
    ],
)
def test_refusals(capsys, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    assert main(["presets", "card", *(word.format(here=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error or message in error.splitlines()[0]
    assert "hint: " in error
    assert {file.name for file in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("words", [[], ["qwq-32b", "--all", "x"]])
def test_usage(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(["presets", "card", *words])
    assert caught.value.code == 2
    assert "NAME" in capsys.readouterr().err
