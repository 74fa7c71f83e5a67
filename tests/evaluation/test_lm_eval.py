"""The lm-evaluation-harness runs an attached model as it runs any other, and finds what our own runner finds."""

import json
from pathlib import Path

import pytest

from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner

TASK = """
task: chains
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<|end|>"]
  do_sample: false
  max_gen_toks: 300
filter_list:
  - name: answer
    filter:
      - function: regex
        regex_pattern: "answer is (\\\\d+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_an_attached_model_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    problems = [*load_problems("reasoner:chains-2", 3), *load_problems("reasoner:chains-6", 5)]
    lines = [json.dumps({"question": one.question, "answer": one.answer}) for one in problems]
    (tmp_path / "chains.jsonl").write_text("\n".join(lines))
    (tmp_path / "chains.yaml").write_text(TASK.format(data=tmp_path / "chains.jsonl"))
    model, tokenizer = load_reasoner({"tau_max": 0.5, "alpha": 0.3, "oeb_layers": [0, 1, 2]})
    own = evaluate(model, problems, max_new_tokens=300, progress=False)
    expected = {arm.name: arm.accuracy.value for arm in own.arms()}
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)

    def accuracy() -> float:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=["chains"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
        )
        return found["results"]["chains"]["exact_match,answer"]

    assert accuracy() == expected["stepflow"]
    assert model.stepflow_report().rows
    with model.disable_stepflow():
        assert accuracy() == expected["base"]
