"""The examples in the docstrings of the entry points run, and show what they promise."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "name", ["evaluation.arms", "evaluation.result", "evaluation.run", "evaluation.scoring", "problems"]
)
def test_examples_run(name: str) -> None:
    found = doctest.testmod(import_module(f"hf_stepflow.{name}"))
    assert found.attempted
    assert not found.failed
