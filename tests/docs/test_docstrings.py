"""The public names have an example in their docstring, and every example in the package runs.

Examples may use these names: `model` (the embedded reasoner with StepFlow attached), its `tokenizer`, `inputs` (what
the chat template gives for a problem), `ids` (a whole trace) and `problems` (five of the reasoner's). The current
folder is empty and temporary. Output is compared if the example shows any.
"""

import doctest
import inspect
from importlib import import_module
from pkgutil import walk_packages

import pytest

import hf_stepflow
from hf_stepflow import load_problems, load_reasoner
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.reasoner.prompts import encode_problem

DOCUMENTED = [
    *(f"hf_stepflow.{name}" for name in hf_stepflow.__all__),
    "hf_stepflow.calibration.calibrate",
    "hf_stepflow.hub.export.export_preset",
    "hf_stepflow.hub.push.push_preset",
    "hf_stepflow.reasoner.levels.problems_of",
    "hf_stepflow.reasoner.prompts.encode_problem",
    "hf_stepflow.saliency.compare.compare",
]


def examples() -> list[doctest.DocTest]:
    """Every docstring of the package that holds `>>>`, but for the plugin of vLLM, which is not installed here."""
    modules = [one.name for one in walk_packages(hf_stepflow.__path__, "hf_stepflow.")]
    modules = [name for name in modules if "__main__" not in name and not name.startswith("hf_stepflow.vllm.")]
    found = [doctest.DocTestFinder().find(import_module(name)) for name in modules]
    return sorted((test for tests in found for test in tests if test.examples), key=lambda test: test.name)


EXAMPLES = examples()


class ShownOutput(doctest.OutputChecker):
    """Compares output if an example shows any."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_reasoner()
    problem = problems_of("chains-2", "test", 1)[0]
    message = [{"role": "user", "content": problem.question}]
    prompt, response = encode_problem(tokenizer, problem)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "inputs": tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ),
        "ids": prompt + response,
        "problems": load_problems("reasoner:chains-2", 5),
    }


@pytest.mark.parametrize("path", DOCUMENTED)
def test_it_has_an_example(path: str) -> None:
    module, _, name = path.rpartition(".")
    documented = getattr(import_module(module), name)
    assert "\nExample:\n    >>> " in (inspect.getdoc(documented) or "")
    home = f"{documented.__module__}.{documented.__qualname__}"
    assert home in [test.name for test in EXAMPLES]


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_the_example_runs(test: doctest.DocTest, names: dict, hub) -> None:
    test.globs.update(names)
    log: list[str] = []
    runner = doctest.DocTestRunner(ShownOutput(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(test, out=log.append)
    assert not result.failed, "".join(log)
