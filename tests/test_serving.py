"""Servers on loopback, asked by the client of OpenAI: transformers' own on repositories, and `hf-stepflow serve`."""

import gc
import json
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager
from transformers.utils import logging

from hf_stepflow import load_reasoner
from hf_stepflow.cli import main
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.serving import build_app
from tests.support.tiny_models import tiny_model

SETTINGS = {"tau_max": 0.4, "oeb_layers": "bottom:0.5"}
LENGTH = 120
(PROBLEM,) = problems_of("chains-7", "test", 1)
MESSAGES = [{"role": "user", "content": PROBLEM.question}]
# How the chat template of the reasoner is read; without it transformers takes that of Qwen 3, its model type.
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close_pattern": r"\s*<\|end\|>", "content": "text"},
    },
}
# The field of a request, as `stepflow` of `generate`.
SWITCHES = {"default": None, "on": True, "off": False, "weaker": {"tau_max": 0.2}}


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner(SETTINGS)


@pytest.fixture(scope="module")
def prompt(reasoner) -> str:
    return reasoner[1].decode(encode_prompt(reasoner[1], PROBLEM.question))


@pytest.fixture(scope="module")
def expected(reasoner) -> dict[str, str]:
    """The answer to the problem under each switch, by `generate`."""
    model, tokenizer = reasoner
    ids = torch.tensor([encode_prompt(tokenizer, PROBLEM.question)])
    texts = {}
    for name, switch in SWITCHES.items():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), stepflow=switch, max_new_tokens=LENGTH)
        texts[name] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert texts["default"] == texts["on"]
    assert len(set(texts.values())) == 3
    return texts


def client_at(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=100)


@pytest.fixture(scope="module")
def client():
    """A client of the server for the reasoner."""
    model, tokenizer = load_reasoner(SETTINGS)
    tokenizer.response_template = TEMPLATE
    app = build_app(model, tokenizer, "reasoner")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        with client_at(listening.getsockname()[1]) as client:
            yield client
        server.should_exit = True
        thread.join()


def asked(switch) -> dict:
    return {} if switch is None else {"extra_body": {"stepflow": switch}}


def completed(client, prompt: str, model: str = "reasoner", stream: bool = False, **options) -> str:
    made = client.completions.create(model=model, prompt=prompt, max_tokens=LENGTH, stream=stream, **options)
    return "".join(chunk.choices[0].text for chunk in made) if stream else made.choices[0].text


def chatted(client, stream: bool, **options) -> str:
    made = client.chat.completions.create(
        model="reasoner", messages=MESSAGES, max_tokens=LENGTH, stream=stream, **options
    )
    parts = [chunk.choices[0].delta for chunk in made] if stream else [made.choices[0].message]
    return "".join((getattr(part, "reasoning_content", None) or "") + (part.content or "") for part in parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_completions_are_those_of_generate(client, prompt, expected, name, stream):
    assert completed(client, prompt, stream=stream, **asked(SWITCHES[name])) == expected[name]


@pytest.mark.parametrize("stream", [False, True])
def test_the_switch_in_chats(client, expected, stream):
    for name, switch in SWITCHES.items():
        assert chatted(client, stream, **asked(switch)).strip() == expected[name].strip(), name


def test_the_switch_in_responses(client, expected):
    for name in ("default", "off"):
        made = client.responses.create(
            model="reasoner",
            input=PROBLEM.question,
            max_output_tokens=LENGTH,
            stream=False,
            **asked(SWITCHES[name]),
        )
        texts = [part.text for item in made.output for part in item.content or ()]
        assert "".join(texts).strip() == expected[name].strip(), name


def test_requests_at_once_keep_their_switches(client, prompt, expected):
    names = [*SWITCHES, *reversed(SWITCHES)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: completed(client, prompt, stream=True, **asked(SWITCHES[name])), names))
    assert found == [expected[name] for name in names]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stepflow": "yes"}, ["stepflow", "'yes'", "true, false or an object"]),
        ({"stepflow": 1}, ["stepflow", "'1'"]),
        ({"stepflow": {"tau": 0.1}}, ["stepflow", "'tau'", "tau_max"]),
        ({"stepflow": {"tau_max": 7}}, ["stepflow", "tau_max", "7"]),
        ({"stepflow": {"oeb_layers": [99]}}, ["stepflow", "oeb_layers", "99"]),
        ({"step_flow": True}, ["step_flow"]),
        ({"prompt": ""}, ["empty"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, prompt, body, words):
    request = {"model": "reasoner", "prompt": prompt, "max_tokens": 2} | body
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.post("/completions", body=request, cast_to=object)
    detail = refused.value.body["detail"]
    assert all(word in detail for word in words), detail


def test_the_server_names_its_model(client):
    assert [model.id for model in client.models.list()] == ["reasoner"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="another", prompt="x")
    assert "pinned to 'reasoner'" in refused.value.body["detail"]


def test_a_model_without_stepflow_is_not_served(reasoner):
    with pytest.raises(StepFlowInputError, match="not attached"):
        build_app(tiny_model("llama"), reasoner[1], "tiny")


# transformers serve


@pytest.fixture(scope="module")
def repositories(reasoner, tmp_path_factory):
    """A preset, and a whole model."""
    home = tmp_path_factory.mktemp("served")
    reasoner[0].save_pretrained(home / "preset", preset_only=True)
    reasoner[0].save_pretrained(home / "whole")
    return home


@contextmanager
def served(name: str, **options):
    """A client of `transformers serve --trust-remote-code` for a repository."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    verbosity = logging.get_verbosity()
    where = {"device": "cpu", "dtype": "float32", "host": "127.0.0.1", "port": port, "non_blocking": True}
    server = Serve(force_model=name, trust_remote_code=True, **where, **options)
    try:
        wait_for(port)
        with client_at(port) as client:
            yield client
    finally:
        server.kill_server()
        del server
        logging.set_verbosity(verbosity)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()  # transformers leaves the server's event loop open


@pytest.mark.parametrize("kind", ["preset", "whole"])
def test_transformers_serve_runs_stepflow(repositories, prompt, expected, kind):
    name = str(repositories / kind)
    with served(name) as client:
        assert completed(client, prompt, name) == expected["default"]
        assert completed(client, prompt, name, stream=True) == expected["default"]
        for switch in ("off", "weaker"):
            generation = json.dumps({"stepflow": SWITCHES[switch], "eos_token_id": 1, "pad_token_id": 0})
            found = completed(client, prompt, name, extra_body={"generation_config": generation})
            assert found == expected[switch]


# As docs/serving.md says, a whole model has no StepFlow there: only its `generate` is replaced, which is not called.
@pytest.mark.parametrize(("kind", "name"), [("preset", "default"), ("whole", "off")])
def test_transformers_serve_with_continuous_batching(repositories, prompt, expected, kind, name):
    model = str(repositories / kind)
    options = {"continuous_batching": True, "cb_num_blocks": 20, "cb_max_batch_tokens": 256}
    with served(model, **options) as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: completed(client, prompt, model, stream=number % 2 == 0), range(6)))
    assert set(found) == {expected[name]}


def wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_transformers_serve_without_trust(repositories):
    with pytest.raises(ValueError, match="Unrecognized processing class"):
        ModelManager(device="cpu", force_model=str(repositories / "preset"))
    # As docs/hub.md says, a whole model without trust is the base model, everywhere.
    manager = ModelManager(device="cpu", force_model=str(repositories / "whole"))
    ((_, timed),) = manager.loaded_models.items()
    assert type(timed.model) is type(AutoModelForCausalLM.from_pretrained(FOLDER))
    assert "generate" not in vars(timed.model)
    manager.shutdown()


# The command


@pytest.mark.parametrize("kind", ["preset", "whole", "reasoner"])
def test_the_command_serves(repositories, prompt, expected, kind):
    model = "reasoner" if kind == "reasoner" else str(repositories / kind)
    options = ["--stepflow", "tau_max=0.4,oeb_layers=bottom:0.5"] if kind == "reasoner" else []
    command = [sys.executable, "-m", "hf_stepflow.cli", "serve", model, "--host", "127.0.0.1", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            first, settings = process.stdout.readline(), process.stdout.readline()
            assert first.startswith(f"Serving {model} with StepFlow at http://127.0.0.1:")
            assert settings == "Settings: oeb_layers=bottom:0.5, tau_max=0.4\n"
            with client_at(int(first.rpartition(":")[2].removesuffix("/v1\n"))) as client:
                assert completed(client, prompt, model, stream=True) == expected["default"]
                assert completed(client, prompt, model, **asked(False)) == expected["off"]
        finally:
            process.terminate()


def test_what_the_command_refuses(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "reasoner", "--host", "127.0.0.1", "--port", port]) == 2
    assert f"cannot listen on --host 127.0.0.1 --port {port}" in capsys.readouterr().err
    assert main(["serve", "reasoner", "--stepflow", "no-such-preset"]) == 2
    assert "no-such-preset" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "reasoner"]) == 2
    assert "pip install 'hf-stepflow[serve]'" in capsys.readouterr().err
