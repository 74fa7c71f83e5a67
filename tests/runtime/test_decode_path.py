"""The way of one token through the code: the files that a decode step enters, counted."""

import sys
from pathlib import Path

import torch
from transformers import DynamicCache

import hf_stepflow
from tests.support.flow import attached, encode

RUNTIME = Path(hf_stepflow.__file__).parent / "runtime"
# Labels, the pass, attention with the bridge, and the sums of the report.
ORDINARY = {"attention", "bridge", "flow_state", "forward", "modeling_stepflow", "report", "step_detector"}


def entered(model, token: int, cache: DynamicCache) -> set[str]:
    """The files of the runtime whose functions run in one decode step."""
    files = set()

    def profile(frame, event: str, argument: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        model(torch.tensor([[token]]), past_key_values=cache)
    finally:
        sys.setprofile(None)
    return {Path(file).stem for file in files if Path(file).parent == RUNTIME}


@torch.no_grad()
def test_a_decode_step_enters_few_files() -> None:
    model = attached("llama", "paper", "sdpa")
    *before, last = encode("Two eggs?<think>Add one to the eggs. N")
    cache = DynamicCache(config=model.config)
    model(torch.tensor([before]), past_key_values=cache)
    starts_step = entered(model, last, cache)
    assert int(cache.stepflow_state.records[0, len(before), 2]) == 1
    assert starts_step == ORDINARY | {"momentum", "step_rules"}
    assert entered(model, encode("e")[0], cache) == ORDINARY
