"""A cache that StepFlow does not find, under a name that it does not know, is an error and never a new trace."""

import pytest

from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.reasoner.prompts import encode_problem
from hf_stepflow.runtime import forward
from hf_stepflow.runtime.errors import StepFlowUnsupportedError


def test_generation_stops_where_the_cache_is_not_found(monkeypatch) -> None:
    model, tokenizer = load_reasoner()
    prompt, _ = encode_problem(tokenizer, problems_of("chains-2", "test", 1)[0])
    inputs = tokenizer.pad({"input_ids": [prompt]}, return_tensors="pt")
    monkeypatch.setattr(forward, "_CACHE_NAMES", ())
    with pytest.raises(StepFlowUnsupportedError, match="did not find the cache"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
