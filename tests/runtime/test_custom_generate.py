"""custom_generate: any loaded model gets StepFlow for one call, and is the model that it was afterwards."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TextIteratorStreamer

from hf_stepflow.hub.export import export_custom_generate, transformers_range
from hf_stepflow.hub.push import push_custom_generate
from hf_stepflow.runtime import generate as generate_module
from tests.runtime.test_attaching import appearance
from tests.support.flow import SHORT_TEXT, VARIANTS, attach, byte_tokenizer, encode
from tests.support.hub_models import save_base
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([encode(SHORT_TEXT)])
ASKED = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
SETTINGS = VARIANTS["step"].to_dict()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The repository's folder."""
    return export_custom_generate(tmp_path_factory.mktemp("generate") / "stepflow-generate").folder


@pytest.fixture
def call(repository):
    return {"custom_generate": str(repository), "trust_remote_code": True, "tokenizer": byte_tokenizer()}


def made(model, **options) -> torch.Tensor:
    return torch.cat(model.generate(IDS, **ASKED, **options).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_call_with_stepflow_and_the_model_as_before(family, call):
    model = tiny_model(family)
    plain = made(model)
    before = copy.deepcopy(appearance(model))
    kind = type(model)
    expected = made(attach(tiny_model(family), "step"))
    assert not torch.equal(expected, plain)
    assert torch.equal(made(model, stepflow=SETTINGS, **call), expected)
    assert type(model) is kind
    assert appearance(model) == before
    assert torch.equal(made(model), plain)
    assert torch.equal(made(model, stepflow=False, **call), plain)


def test_what_generate_takes_goes_on_to_the_model(call):
    model, reference = tiny_model("llama"), attach(tiny_model("llama"), "step")
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), stepflow=SETTINGS, **call, **options)
    assert torch.equal(found, reference.generate(IDS, **options))
    streamer = TextIteratorStreamer(byte_tokenizer())
    found = model.generate(IDS, stepflow=SETTINGS, streamer=streamer, max_new_tokens=5, do_sample=False, **call)
    assert "".join(streamer) == byte_tokenizer().decode(found[0])
    with pytest.raises(ValueError, match="no_such"):
        model.generate(IDS, stepflow=SETTINGS, no_such=1, **call)
    model.generation_config.stepflow = SETTINGS
    assert torch.equal(made(model, **call), made(reference))
    assert model.generation_config.stepflow is SETTINGS


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("in the middle")


def test_an_exception_leaves_nothing_behind(call):
    model = tiny_model("llama")
    before = copy.deepcopy(appearance(model))
    with pytest.raises(RuntimeError, match="in the middle"):
        made(model, stepflow=SETTINGS, logits_processor=[Broken()], **call)
    for wrong in ({"tau": 1}, {"tau_max": 7}, {"oeb_layers": [9]}, 3):
        with pytest.raises(ValueError, match=r"tau|oeb_layers|StepFlowConfig"):
            made(model, stepflow=wrong, **call)
    assert appearance(model) == before


def test_a_model_that_has_stepflow_keeps_it(call):
    model = attach(tiny_model("llama"), "step")
    kind, runtime = type(model), model.stepflow_runtime
    assert torch.equal(made(model, **call), made(model))
    weak = made(model, stepflow={"tau_max": 0.1})
    assert not torch.equal(weak, made(model))
    assert torch.equal(made(model, stepflow={"tau_max": 0.1}, **call), weak)
    assert torch.equal(made(model, stepflow=False, **call), made(model, stepflow=False))
    assert (type(model), model.stepflow_runtime) == (kind, runtime)
    # Called as a function, as tools may do it.
    assert torch.equal(
        torch.cat(generate_module.generate(model, IDS, stepflow={"tau_max": 0.1}, **ASKED).logits), weak
    )


def test_trust_is_asked_for(hub):
    """For a repository on the Hub; a folder's code is run without asking by older releases of transformers."""
    push_custom_generate("test-org/generate", token=hub.token)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        made(tiny_model("llama"), custom_generate="test-org/generate", trust_remote_code=False, stepflow=SETTINGS)


def test_a_tokenizer_is_loaded_once_and_let_go_with_its_model(repository, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"))
    number = []
    load = AutoTokenizer.from_pretrained

    def counted(*args, **kwargs):
        number.append(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    made(model, custom_generate=str(repository), trust_remote_code=True, stepflow=SETTINGS, tokenizer=byte_tokenizer())
    assert not number  # one that a call brings is for that call
    for _ in range(2):
        made(model, custom_generate=str(repository), trust_remote_code=True, stepflow=SETTINGS)
    assert len(number) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_calls_of_threads_take_turns(call):
    model = tiny_model("llama")
    before = copy.deepcopy(appearance(model))
    names = ("step", "paper", "absolute")
    calls = {name: {"stepflow": VARIANTS[name].to_dict()} | call for name in names} | {"plain": {}}
    expected = {name: made(attach(tiny_model("llama"), name)) for name in names} | {"plain": made(model)}
    wrong = []

    def work(name: str) -> None:
        for _ in range(4):
            if not torch.equal(made(model, **calls[name]), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=[name]) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert appearance(model) == before


def test_an_adapter_around_the_model(call):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"])).eval()
    expected = made(attach(tiny_model("llama"), "step"))
    assert torch.equal(made(wrapped, stepflow=SETTINGS, **call), expected)
    assert not hasattr(wrapped.get_base_model(), "stepflow_runtime")


def test_what_the_repository_requires(repository):
    lines = (repository / "custom_generate" / "requirements.txt").read_text().split()
    assert set(lines) == {f"transformers{bound}" for bound in transformers_range()}
    assert not (repository / "config.json").exists()
