"""Attaching touches one model and one thread, detaching gives back the very model, copies and files keep it all."""

import copy
import io
import threading
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime import modeling_stepflow
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError, StepFlowUnsupportedError
from tests.support.flow import SHORT_TEXT, VARIANTS, Script, attach, attached, byte_tokenizer, encode, error, logits_of
from tests.support.tiny_models import tiny_config, tiny_model

IDS = torch.tensor([encode(SHORT_TEXT)])
PROMPT = torch.tensor([encode("Two eggs?<think>Add one. Th")])


def test_other_models_are_untouched() -> None:
    config = tiny_config("llama")
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other, third = (AutoModelForCausalLM.from_config(config).eval() for _ in range(3))
    plain = logits_of(other, IDS)
    attach(one, "paper")
    assert torch.equal(logits_of(other, IDS), plain)
    attach(third, "step")
    with_stepflow = logits_of(third, IDS)
    one.detach_stepflow()
    assert torch.equal(logits_of(third, IDS), with_stepflow)
    assert torch.equal(logits_of(other, IDS), plain)
    third.detach_stepflow()
    assert torch.equal(logits_of(other, IDS), plain)


def appearance(model) -> list:
    """Everything that attaching could leave behind."""
    modules = [
        (name, type(module), id(getattr(module, "config", None)), sorted(module.__dict__), sorted(vars(type(module))))
        for name, module in model.named_modules()
    ]
    hooks = [
        len(value) for name, value in vars(model).items() if name.endswith("_hooks") and hasattr(value, "__len__")
    ]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [modules, hooks, [vars(config) for config in configs.values()], vars(model.generation_config), str(model)]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_detach_gives_back_the_very_model(family: str) -> None:
    model = tiny_model(family)
    logits_of(model, IDS)
    before = copy.deepcopy(appearance(model))
    kind = type(model)
    attach(model, "paper")
    assert isinstance(model, StepFlowModelForCausalLM)
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    logits_of(model, IDS)
    with pytest.raises(StepFlowInputError, match=r"already attached.*\n.*detach_stepflow"):
        attach(model, "paper")
    assert model.detach_stepflow() is model
    assert type(model) is kind
    assert appearance(model) == before


def test_copies_and_pickles_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_model("gemma3_text"), "step")
    expected = logits_of(model, IDS)
    copied = copy.deepcopy(model)
    model.detach_stepflow()
    assert torch.equal(logits_of(copied, IDS), expected)
    assert copied.stepflow_report().rows

    file = io.BytesIO()
    torch.save(copied, file)
    name = copied.model.layers[0].self_attn.config._attn_implementation
    monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name)  # as in a process that attaches nothing
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits_of(loaded, IDS), expected)
    loaded.detach_stepflow()
    assert not torch.equal(logits_of(loaded, IDS), expected)


def test_a_cache_survives_a_pickle_and_other_settings() -> None:
    model = attach(tiny_model("llama"), "paper")
    with torch.no_grad():
        expected = model(IDS).logits[0, 30:]
        cache = model(IDS[:, :30], use_cache=True).past_key_values
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        torch.testing.assert_close(model(IDS[:, 30:], past_key_values=loaded).logits[0], expected)
        # Other step rules label the cached tokens anew.
        model.stepflow_config = VARIANTS["paper"].replace(min_step_chars=4, oeb_span=1000)
        torch.testing.assert_close(model(IDS[:, 30:], past_key_values=cache).logits[0], expected)


def script_of(prompt: torch.Tensor, text: str) -> dict:
    """Arguments that make `generate` write a text."""
    script = Script(prompt.shape[1], [text])
    return {"logits_processor": [script], "max_new_tokens": len(script.rows[0]), "do_sample": False}


def made(model, **options) -> torch.Tensor:
    """Logits of a generation."""
    output = model.generate(
        PROMPT,
        **script_of(PROMPT, "en two.</think>Two."),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.cat(output.logits)


def test_threads_have_their_own_settings() -> None:
    model = attached("llama", "paper", "sdpa")
    calls = [
        {"stepflow": False},
        {},
        {"stepflow": {"tau_max": 0.9}},
        {"stepflow": {"alpha": 3.0, "min_step_chars": 2}},
    ]
    expected = [made(model, **call) for call in calls]
    assert all(not torch.equal(one, other) for one, other in pairwise(expected))
    wrong: list[int] = []
    barrier = threading.Barrier(len(calls))

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            if not torch.equal(made(model, **calls[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_settings_of_a_call() -> None:
    """The preset, under the model's generation config, under the call's generation config, under the call."""
    model = attach(tiny_model("llama"), "paper")
    plain, weak = made(model), made(model, stepflow={"tau_max": 0.2})
    both = made(model, stepflow={"tau_max": 0.2, "alpha": 0.1})
    assert not torch.equal(plain, weak)
    assert torch.equal(made(model, stepflow=None), plain)
    assert torch.equal(made(model, stepflow=VARIANTS["paper"].replace(tau_max=0.2)), weak)
    model.generation_config.stepflow = {"tau_max": 0.2}
    assert torch.equal(made(model), weak)
    assert torch.equal(made(model, stepflow={"alpha": 0.1}), both)
    assert torch.equal(made(model, stepflow={"tau_max": 0.4}), plain)
    model.generation_config.stepflow["tau_max"] = 0.4
    assert torch.equal(made(model), plain)

    model.generation_config.stepflow = False
    with model.disable_stepflow():
        off = made(model)
    assert torch.equal(made(model), off)
    assert torch.equal(made(model, stepflow={}), plain)
    model.generation_config.stepflow = {}

    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=2)
    config.stepflow = {"tau_max": 0.2}
    arguments = script_of(PROMPT, "en two.</think>Two.")
    for name in ("max_new_tokens", "do_sample"):
        setattr(config, name, arguments.pop(name))
    config.output_logits = config.return_dict_in_generate = True
    assert torch.equal(torch.cat(model.generate(PROMPT, generation_config=config, **arguments).logits), weak)
    assert torch.equal(made(model), plain)
    assert model.stepflow_config.tau_max == 0.4


def test_saved_and_loaded(tmp_path) -> None:
    """A saved model is a plain one for whoever knows nothing of StepFlow, and has its settings for whoever does."""
    model = attach(tiny_model("gemma3_text"), "heads")
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = StepFlowModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.stepflow_config.settings == VARIANTS["heads"]
    assert error(logits_of(loaded, IDS), expected) < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(plain) is type(model.detach_stepflow())
    assert error(logits_of(plain, IDS), logits_of(model, IDS)) < 1e-6


def test_lora_inside_and_outside() -> None:
    peft = pytest.importorskip("peft")
    model = attach(tiny_model("llama"), "paper")
    expected = made(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True))
    wrapped.eval()
    assert torch.equal(made(wrapped), expected)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted = made(wrapped)
    assert error(adapted, expected) > 0.01
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, StepFlowModelForCausalLM)
    assert error(made(merged), adapted) < 1e-5

    outer = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    outer.eval()
    attach(outer.get_base_model(), "paper")
    assert torch.equal(made(outer), expected)


@torch.no_grad()
def test_forward_called_directly_and_compiled() -> None:
    model = attached("llama", "paper", "sdpa")
    expected = model(IDS).logits
    assert torch.equal(model.forward(IDS).logits, expected)
    assert model.stepflow_report().rows
    compiled = torch.compile(model.forward, backend="eager")
    assert error(compiled(IDS).logits, expected) < 1e-6


@torch.no_grad()
def test_a_way_around_the_forward_is_refused() -> None:
    model = tiny_model("llama")
    kept = model.forward
    plain = kept(IDS).logits
    attach(model, "paper")
    for way in (kept, model.model):
        with pytest.raises(StepFlowUnsupportedError, match=r"without the model's forward\n.*call the attached model"):
            way(IDS)
    with model.disable_stepflow():
        assert torch.equal(kept(IDS).logits, plain)
        model.model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("first", ["attached", "dispatched"])
def test_a_dispatched_model(first: str) -> None:
    """Accelerate's hooks keep the forward that they found on the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama")
    plain = model(IDS).logits
    hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if first == "dispatched":
        hooks.add_hook_to_module(model, hook)
    attach(model, "paper")
    if first == "attached":
        expected = model(IDS).logits
        hooks.add_hook_to_module(model, hook)
    else:
        expected = attached("llama", "paper", model.stepflow_runtime.base_implementation)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model.forward(IDS).logits, expected)
    model.detach_stepflow()
    assert torch.equal(model(IDS).logits, plain)
    hooks.remove_hook_from_module(model)
    assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_settings_of_a_block() -> None:
    model = attach(tiny_model("llama"), "paper")
    plain = model(IDS).logits
    with model.disable_stepflow():
        off = model(IDS).logits
    weak = VARIANTS["paper"].replace(tau_max=0.2)
    found = {}
    for name, settings in (("same", None), ("on", True), ("off", False), ("dict", {"tau_max": 0.2}), ("whole", weak)):
        with model.use_stepflow(settings):
            found[name] = model(IDS).logits
    assert torch.equal(found["same"], plain)
    assert torch.equal(found["on"], plain)
    assert torch.equal(found["off"], off)
    assert torch.equal(found["dict"], found["whole"])
    assert not torch.equal(found["dict"], plain)
    with model.use_stepflow({"tau_max": 0.2}), model.use_stepflow({"alpha": 0.0}):
        both = model(IDS).logits
    with model.use_stepflow({"tau_max": 0.2, "alpha": 0.0}):
        assert torch.equal(model(IDS).logits, both)
    assert torch.equal(model(IDS).logits, plain)


def wrapped_by_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("wrap", "settings", "kind", "told"),
    [
        (wrapped_by_peft, None, StepFlowUnsupportedError, r"got PeftModel.*\n.*get_base_model"),
        (torch.compile, None, StepFlowUnsupportedError, r"got OptimizedModule\n.*before it is wrapped"),
        (lambda model: model, {"oeb_layers": [9]}, StepFlowConfigError, "oeb_layers"),
        (lambda model: model, {"oeb_heads": {3: [0]}}, StepFlowConfigError, r"layer 3, .* \[0\] are.*\n.*oeb_layers"),
    ],
)
@torch.no_grad()
def test_a_refused_model_is_left_as_it_was(wrap, settings, kind, told) -> None:
    model = tiny_model("llama")
    whole = wrap(model)
    before, plain = copy.deepcopy(appearance(model)), model(IDS).logits
    with pytest.raises(kind, match=told):
        StepFlowModelForCausalLM.attach(whole, settings, tokenizer=byte_tokenizer())
    assert appearance(model) == before
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("replace", [copy.deepcopy, lambda config: GenerationConfig(pad_token_id=0, eos_token_id=2)])
def test_another_generation_config(tmp_path, replace) -> None:
    """Users put one of their own in the place of the one that was there when StepFlow came."""
    model = tiny_model("llama")
    first, kind = model.generation_config, type(model)
    plain = logits_of(model, IDS)
    attach(model, "paper")
    expected = logits_of(model, IDS)
    own = model.generation_config = replace(model.generation_config)
    asked = copy.deepcopy(vars(own))
    assert torch.equal(logits_of(model, IDS), expected)
    model.save_pretrained(tmp_path)
    assert vars(own) == asked
    loaded = StepFlowModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert error(logits_of(loaded, IDS), expected) < 1e-6
    assert type(model.detach_stepflow()) is kind
    assert model.generation_config is own
    assert not hasattr(own, "stepflow")
    assert not hasattr(first, "stepflow")
    assert torch.equal(logits_of(model, IDS), plain)


@torch.no_grad()
def test_a_generation_config_by_position() -> None:
    model = attach(tiny_model("llama"), "paper")
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2)
    config.output_logits = config.return_dict_in_generate = True
    config.stepflow = False
    by_name = model.generate(PROMPT, generation_config=config)
    assert torch.equal(torch.cat(model.generate(PROMPT, config).logits), torch.cat(by_name.logits))
    config.stepflow = {"tau_maxx": 0.1}
    with pytest.raises(StepFlowConfigError, match="tau_maxx"):
        model.generate(PROMPT, config)


def test_another_attention_under_stepflow_is_refused() -> None:
    model = attached("llama", "paper", "sdpa")
    expected = logits_of(model, IDS)
    with pytest.raises(StepFlowUnsupportedError, match=r"eager.*attached on 'sdpa'\n.*detach_stepflow"):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(model, IDS), expected)
    model.detach_stepflow().set_attn_implementation("eager")
    assert error(logits_of(attach(model, "paper"), IDS), expected) < 1e-5


@torch.no_grad()
def test_the_model_runs_while_one_call_puts_stepflow_on_and_off(monkeypatch) -> None:
    """As in another thread: between any two steps of attaching for one call, and of detaching."""
    model = tiny_model("llama")
    plain, seen = model(IDS).logits, []
    change = modeling_stepflow._change_class

    def watched(*args) -> None:
        for _ in range(2):
            seen.append(torch.equal(model(IDS).logits, plain))
            change(*args)

    monkeypatch.setattr(modeling_stepflow, "_change_class", watched)
    kept = model.forward
    StepFlowModelForCausalLM._put_on(model, VARIANTS["paper"], byte_tokenizer(), is_on=False)
    entered = model.forward  # a thread that is inside already when StepFlow goes
    assert torch.equal(model(IDS).logits, plain)
    model.detach_stepflow()
    assert seen == [True] * 4
    assert torch.equal(entered(IDS).logits, plain)
    assert torch.equal(kept(IDS).logits, plain)
