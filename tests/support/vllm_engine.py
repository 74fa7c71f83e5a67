"""One engine of vLLM in a process of its own: `python -m tests.support.vllm_engine JOB RESULT`, both JSON files.

A process makes one engine: vLLM keeps global state, and an engine that fails takes its process with it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# One block of memory that is enough for tiny models, and one thread, as everywhere in the tests.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

KERNELS = {"HF_STEPFLOW_ROUTE": "device", "TRITON_INTERPRET": "1"}


def run_engine(
    model: Any,
    prompts: list[list[int]],
    *,
    settings: Any = None,
    rounds: int = 1,
    switches: list[Any] | None = None,
    max_tokens: int = 200,
    wants_prompt: bool = False,
    environment: dict[str, str] | None = None,
    by_kernels: bool = False,
    timeout: float = 900,
    **arguments: Any,
) -> dict[str, Any]:
    """Generates greedily in an engine of its own.

    Args:
        model: Folder of the model.
        prompts: Token ids.
        settings: `stepflow` of additional_config; None for none.
        rounds: How often all prompts are asked, one batch after the other.
        switches: `stepflow` of each request's extra_args; None for none.
        max_tokens: Tokens to generate.
        wants_prompt: Whether the log probabilities of the prompts' tokens are wanted.
        environment: Environment variables.
        by_kernels: Whether StepFlow runs by its kernels, interpreted, on plain copies of the caches.
        timeout: In seconds.
        **arguments: Those of `vllm.LLM`.

    Returns:
        "rounds": for each round and prompt "ids", "logprobs", "prompt_logprobs" and "cached" tokens; "metrics";
        "counts" of StepFlow.

    Raises:
        RuntimeError: The process failed; its last lines are the message.
    """
    job = {
        "model": str(model),
        "prompts": prompts,
        "rounds": rounds,
        "switches": switches or [None] * len(prompts),
        "max_tokens": max_tokens,
        "wants_prompt": wants_prompt,
        "by_kernels": by_kernels,
        "arguments": {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "seed": 0} | arguments,
    }
    if settings is not None:
        job["arguments"]["additional_config"] = {"stepflow": settings}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.vllm_engine", str(asked), str(answered)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | (KERNELS if by_kernels else {}) | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if not answered.is_file():
            raise RuntimeError(done.stdout[-6000:])
        return json.loads(answered.read_text())


def _main() -> None:
    from vllm import LLM, SamplingParams

    from hf_stepflow.vllm.engine import counters_in

    job = json.loads(Path(sys.argv[1]).read_text())
    if job["by_kernels"]:
        _copy_caches()
    engine = LLM(job["model"], disable_log_stats=False, **job["arguments"])
    rounds = []
    for _ in range(job["rounds"]):
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=job["max_tokens"],
                logprobs=1,
                prompt_logprobs=0 if job["wants_prompt"] else None,
                extra_args=None if switch is None else {"stepflow": switch},
            )
            for switch in job["switches"]
        ]
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
        rounds.append([_plain(output) for output in outputs])
    metrics = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    counters = counters_in(engine.llm_engine.vllm_config, 0)
    counts = {} if counters is None else counters.read()
    Path(sys.argv[2]).write_text(json.dumps({"rounds": rounds, "metrics": metrics, "counts": counts}))


def _copy_caches() -> None:
    """Lets the plugin find plain caches in the CPU backend: copies, made whenever a layer's cache is read."""
    import torch

    from hf_stepflow.vllm import device_attention, worker

    class Copied(worker.LayerCache):
        def __init__(self, layer: Any, read: Any, table: Any):
            super().__init__(layer, read, table)
            self.cache = torch.cat(read(self.cache, torch.arange(len(self.cache))), -1)

    device_attention.is_plain = lambda layer: True
    worker.LayerCache = Copied


def _plain(output: Any) -> dict[str, Any]:
    made, prompt = output.outputs[0], output.prompt_logprobs
    ids = list(made.token_ids)
    return {
        "ids": ids,
        "logprobs": [found[token].logprob for found, token in zip(made.logprobs, ids, strict=True)],
        "prompt_logprobs": None
        if prompt is None
        else [found[token].logprob for found, token in zip(prompt[1:], output.prompt_token_ids[1:], strict=True)],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    _main()
