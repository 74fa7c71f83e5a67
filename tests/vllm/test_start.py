"""What an engine is asked for is found, checked and refused before any worker starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.runtime.errors import (
    StepFlowConfigError,
    StepFlowFileError,
    StepFlowInputError,
    StepFlowUnsupportedError,
)
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.vllm import block_layout, plugin
from hf_stepflow.vllm.engine import settings_in
from hf_stepflow.vllm.requests import EngineSettings, salt
from tests.support.vllm_models import SETTINGS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def config_of(model: Any, stepflow: Any = None, **arguments: Any) -> Any:
    extra = {} if stepflow is None else {"additional_config": {"stepflow": stepflow}}
    return EngineArgs(str(model), dtype="float32", enforce_eager=True, **extra, **arguments).create_engine_config()


def test_without_settings_nothing_changes() -> None:
    config = config_of(FOLDER)
    assert settings_in(config) is None
    assert config.additional_config == {}
    assert settings_in(config_of(FOLDER, False)) is None


def test_settings_are_found_by_dict_preset_and_auto() -> None:
    assert settings_in(config_of(FOLDER, SETTINGS)).own.tau_max == 0.3
    assert settings_in(config_of(FOLDER, "stepflow-tiny-reasoner")).own.oeb_layers == [0, 1, 2, 3]
    assert settings_in(config_of(FOLDER, "auto")).own.tau_max > 0


def test_a_preset_repository_serves_its_base(tmp_path: Path) -> None:
    model = StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=SETTINGS)
    model.save_pretrained(tmp_path, preset_only=True)
    config = config_of(tmp_path)
    assert config.model_config.model == config.model_config.tokenizer == str(FOLDER)
    assert config.model_config.served_model_name == str(tmp_path)
    assert settings_in(config).own.alpha == 0.3
    changed = settings_in(config_of(tmp_path, {"alpha": 0.1})).own
    assert changed == settings_in(config).own.replace(alpha=0.1)


def test_a_saved_model_brings_its_settings(tmp_path: Path) -> None:
    model = StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=SETTINGS)
    model.save_pretrained(tmp_path)
    model.stepflow_runtime.tokenizer.save_pretrained(tmp_path)
    assert settings_in(config_of(tmp_path)).own.alpha == 0.3
    assert settings_in(config_of(tmp_path, False)) is None


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ("qwen3-9b", StepFlowFileError, "qwen3-9b"),
        ("qwen3-8b", StepFlowConfigError, "is for qwen3 with 36 layers"),
        ({"tau": 0.1}, StepFlowConfigError, "tau"),
        ({"oeb_layers": [99]}, StepFlowConfigError, "99"),
        ({"oeb_heads": {"0": [7]}}, StepFlowConfigError, "oeb_heads"),
        (3, StepFlowInputError, "expected a preset's name"),
    ],
)
def test_what_does_not_fit_is_refused(asked: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        config_of(FOLDER, asked)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_prompt_embeds": True}, "prompts as embeddings"),
        ({"kv_cache_dtype": "fp8"}, "a cache in fp8"),
        ({"runner": "pooling"}, "the runner 'pooling'"),
    ],
)
def test_modes_that_cannot_be_followed_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(StepFlowUnsupportedError, match=words):
        config_of(FOLDER, SETTINGS, **arguments)


def test_other_releases_of_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "RELEASES", ("0.9", "0.10"))
    with pytest.raises(StepFlowUnsupportedError, match=r"vLLM >= 0.9, < 0.10; this is 0\."):
        config_of(FOLDER, SETTINGS)
    assert settings_in(config_of(FOLDER)) is None  # an engine without StepFlow is none of its business


def asks(value: Any) -> Any:
    return SimpleNamespace(extra_args={"stepflow": value})


@pytest.mark.parametrize("asked", ["no", "", 2, {"tau_max": 0.1}, 0.5])
def test_a_switch_is_true_or_false(asked: Any) -> None:
    with pytest.raises(StepFlowInputError, match="expected true or false"):
        EngineSettings(StepFlowSettings()).check(asks(asked))
    if not isinstance(asked, dict):
        with pytest.raises(StepFlowInputError, match="expected true or false"):
            SamplingParams(extra_args={"stepflow": asked})


def test_a_switch_needs_an_engine_with_stepflow() -> None:
    none, own = EngineSettings(None), EngineSettings(StepFlowSettings())
    for fine in (None, {}, {"other": 1}, {"stepflow": False}):
        none.check(SimpleNamespace(extra_args=fine))
    with pytest.raises(StepFlowInputError, match="runs without it"):
        none.check(asks(True))
    for on in (SimpleNamespace(extra_args=None), asks(True), asks(1)):
        assert own.chosen(on) is own.own
        assert none.chosen(on) is None
    for off in (asks(0), asks(False), None):
        assert own.chosen(off) is None


def test_requests_may_bring_settings_where_the_engine_allows_it() -> None:
    arguments = {"additional_config": {"stepflow": SETTINGS, "stepflow_requests": True}}
    found = settings_in(EngineArgs(str(FOLDER), dtype="float32", **arguments).create_engine_config())
    found.check(asks({"tau_max": 0.1}))
    assert found.chosen(asks({"tau_max": 0.1})) == found.own.replace(tau_max=0.1)
    with pytest.raises(StepFlowConfigError, match="tau"):
        found.check(asks({"tau": 0.1}))
    with pytest.raises(StepFlowInputError, match="'stepflow_requests' of additional_config is 'yes'"):
        EngineArgs(str(FOLDER), additional_config={"stepflow_requests": "yes"}).create_engine_config()


def test_salts_tell_settings_and_users_apart() -> None:
    one, other = (settings_in(config_of(FOLDER, given)).own for given in (SETTINGS, {"alpha": 0.1}))
    assert len({salt(one, None), salt(other, None), salt(one, "mine"), salt(other, "mine")}) == 4
    assert salt(one, None) == salt(one.replace(), None)


@pytest.mark.parametrize("kind", ["plain", "transposed", "shuffled"])
def test_any_order_inside_a_block_is_undone(kind: str) -> None:
    """The CPU kernel packs blocks for its processor; other processors have other orders than this one."""
    tokens, width = 32, 64
    wanted = torch.randn(3, 2, tokens, width)
    place = {
        "plain": torch.arange(tokens * width),
        "transposed": torch.arange(tokens * width).view(tokens, width).T.flatten(),
        "shuffled": torch.randperm(tokens * width),
    }[kind]
    packed = wanted.flatten(2)[..., place]
    assert torch.equal(block_layout._unpacked(place, (tokens, width))(packed), wanted)


def test_an_architecture_without_vllms_attention_is_refused(tmp_path: Path) -> None:
    from hf_stepflow.vllm.worker import attention_layers

    with pytest.raises(StepFlowUnsupportedError, match="no decoder attention"):
        attention_layers(torch.nn.Linear(2, 2))
