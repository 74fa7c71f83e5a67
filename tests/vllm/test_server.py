"""vLLM's own OpenAI-compatible server, asked over loopback by the client of OpenAI."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.reasoner.levels import problems_of
from tests.support.vllm_engine import ENVIRONMENT
from tests.support.vllm_models import SETTINGS

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    model = StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=SETTINGS)
    model.save_pretrained(folder, preset_only=True)
    return folder


@pytest.fixture(scope="module")
def server(preset: Path) -> Iterator[str]:
    """A server of the preset repository, without a flag of StepFlow's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
    log = preset / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command.split(), "--model", str(preset), "--max-model-len", "1024"],
            env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(log.read_text()[-4000:])
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(client: Any, name: str, question: str, switch: Any = None) -> tuple[str, int]:
    """The streamed answer, and the number of pieces it came in."""
    stream = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=200,
        stream=True,
        extra_body=None if switch is None else {"vllm_xargs": {"stepflow": switch}},
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    return "".join(pieces), len(pieces)


def counts(address: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    lines = [line.split() for line in text.splitlines() if line.startswith("vllm:stepflow_") and "_total" in line]
    return {name.split("{")[0]: float(value) for name, value in lines}


def test_a_preset_is_served_with_a_switch_in_each_request(server: str, preset: Path) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    assert name == str(preset)
    model, tokenizer = (
        StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=SETTINGS),
        AutoTokenizer.from_pretrained(FOLDER),
    )
    for problem in problems_of("chains-4", "test", 3):
        message = [{"role": "user", "content": problem.question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for switch, kwargs in ((None, {}), (False, {"stepflow": False})):
            answer, pieces = ask(client, name, problem.question, switch)
            made = model.generate(**ids, do_sample=False, max_new_tokens=200, **kwargs)[0, ids["input_ids"].shape[1] :]
            assert answer.split() == tokenizer.decode(made, skip_special_tokens=True).split()
            assert pieces > 20
    found = counts(server)
    assert found["vllm:stepflow_requests_total"] == 3
    assert found["vllm:stepflow_bridged_tokens_total"] > 100
    assert found["vllm:stepflow_injections_total"] > 10


def test_anything_else_is_refused_by_name(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match="'stepflow' of a request is 'yes'"):
        ask(client, name, "Ann has 2 points.", "yes")
