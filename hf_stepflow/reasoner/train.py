"""Trains the embedded reasoner: `python -m hf_stepflow.reasoner.train --out FOLDER --seed 0`.

Training is deterministic for a seed and a machine. FOLDER keeps the checkpoint (safetensors) and the log (JSON lines);
a run that was stopped resumes from the checkpoint.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError

from .initial import initialise
from .levels import Problem, draw, make_chain
from .prompts import build_tokenizer, encode_problem

LONGEST = 8192
# The problems of the training have at most this many sentences of counting, in this many counts.
LONGEST_COUNTING = 30
_COUNTS = 4
_CHECKPOINT_SECONDS = 60.0
_IGNORED = -100
# The number of parts that a batch is split into, so that rows of similar length are padded together.
_PARTS = 4
# Coefficients of the quintic iteration of Muon, which raise small singular values fast and leave all near one.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The checkpoint holds the recipe, and a run with another one cannot resume from it.

    Attributes:
        seed: The seed of weights and data.
        steps: The number of optimizer steps.
        batch_tokens: The number of tokens in a batch.
        hidden_size: The width of the model.
        layers: The number of layers.
        muon_rate: The peak learning rate of the matrices inside the layers.
        adam_rate: The peak learning rate of embeddings and norms.
        warmup: The share of the steps over which the rates rise.
        decay: The share of the steps, at the end, over which the rates fall to zero.
        curriculum: The share of the steps, after the warmup, over which problems grow to full size; 0 starts at full
            size.
        positions: The highest position that random gaps may lead to.
        chains: The share of chains among the problems; the rest are errands.
    """

    seed: int = 0
    steps: int = 3000
    batch_tokens: int = 4096
    hidden_size: int = 128
    layers: int = 8
    muon_rate: float = 0.02
    adam_rate: float = 0.01
    warmup: float = 0.02
    decay: float = 0.45
    curriculum: float = 0.2
    positions: int = 1024
    chains: float = 0.5


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Builds an untrained reasoner: Qwen3 architecture, float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // 32,
        num_key_value_heads=recipe.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(config)
    initialise(model, recipe.seed)
    return model


def draw_training_problem(recipe: Recipe, step: int, number: int) -> Problem:
    """Draws one problem of a step's batch, whose size grows with the curriculum."""
    generator = random.Random(f"sizes/{recipe.seed}/{step}/{number}")
    grown = max(0.0, step / recipe.steps - recipe.warmup)
    size = min(1.0, grown / recipe.curriculum) if recipe.curriculum else 1.0
    people = generator.randint(1, 1 + round(5 * size))
    distractors = generator.randint(0, round(4 * size))
    counts = sentences = 0
    if generator.random() >= recipe.chains:
        counts = generator.randint(1, min(people, _COUNTS))
        sentences = round(LONGEST_COUNTING * size * generator.random())
    make = partial(make_chain, people=people, distractors=distractors, counts=counts, sentences=sentences)
    return draw(f"training/{recipe.seed}/{step}", make, "train", number)


def draw_batch(recipe: Recipe, tokenizer: Any, step: int) -> list[dict[str, torch.Tensor]]:
    """Draws the batch of a step, in parts: input_ids, labels, attention_mask and position_ids, int64 [B, T] each."""
    rows: list[tuple[list[int], int]] = []
    tokens = 0
    while tokens < recipe.batch_tokens:
        problem = draw_training_problem(recipe, step, len(rows))
        prompt, response = encode_problem(tokenizer, problem)
        rows.append((prompt + response, len(prompt)))
        tokens += len(rows[-1][0])
    rows.sort(key=lambda row: len(row[0]))
    parts: list[list[tuple[list[int], int]]] = [[] for _ in range(_PARTS)]
    done = 0
    for row in rows:
        parts[done * _PARTS // tokens].append(row)
        done += len(row[0])
    generator = random.Random(f"gaps/{recipe.seed}/{step}")
    full_stop = tokenizer.convert_tokens_to_ids(".")
    return [_collate(part, tokenizer.pad_token_id, full_stop, generator, recipe) for part in parts if part]


def _collate(
    rows: list[tuple[list[int], int]], pad: int, full_stop: int, generator: random.Random, recipe: Recipe
) -> dict[str, torch.Tensor]:
    width = max(len(row) for row, _ in rows)
    ids, labels, positions = [], [], []
    for row, prompt_length in rows:
        filler = [pad] * (width - len(row))
        ids.append(row + filler)
        labels.append([_IGNORED] * prompt_length + row[prompt_length:] + [_IGNORED] * len(filler))
        positions.append(_positions(row + filler, full_stop, generator, recipe.positions))
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    # Padding stands on the right, where causal attention does not see it; the mask of ones says that no row is packed.
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return tensors


def _positions(row: list[int], full_stop: int, generator: random.Random, highest: int) -> list[int]:
    """Returns the positions of a row; in half of the rows with random gaps after sentences, to train far positions."""
    spare = int((highest - len(row)) * generator.random() ** 2) if generator.random() < 0.5 else 0
    ends = [place for place, token in enumerate(row[:-1]) if token == full_stop]
    gaps: dict[int, int] = {}
    if spare > 0 and ends:
        chosen = generator.sample(ends, min(len(ends), generator.randint(1, 8)))
        cuts = sorted(generator.randint(0, spare) for _ in chosen)
        gaps = {place + 1: right - left for place, left, right in zip(chosen, [0, *cuts], cuts, strict=False)}
    at, found = -1, []
    for place in range(len(row)):
        at += 1 + gaps.get(place, 0)
        found.append(at)
    return found


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Brings the singular values of matrices [N, rows, columns] near one (Newton-Schulz iteration)."""
    tall = matrices.shape[1] > matrices.shape[2]
    now = matrices.mT if tall else matrices
    now = now / now.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = now @ now.mT
        now = first * now + (second * square + third * square @ square) @ now
    return now.mT if tall else now


class Muon(torch.optim.Optimizer):
    """SGD with momentum and orthogonalised steps, scaled by sqrt(max(1, rows / columns)) (Jordan et al. 2024).

    It works in float32 and batches matrices of one shape. torch.optim.Muon orthogonalises one matrix after another in
    bfloat16, which takes as long as the model itself on a processor without bfloat16 units.

    Args:
        matrices: The parameters, with two dimensions each.
        rate: The learning rate.
        momentum: The decay of the running mean of gradients (Nesterov's form).
        weight_decay: The decoupled weight decay, multiplied by the rate.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        rate: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        super().__init__(matrices, {"lr": rate, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step along the gradients, which all parameters must have."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                steps = orthogonalise(torch.stack(directions)) * max(1.0, rows / columns) ** 0.5
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(step, alpha=group["lr"])


class _Optimizers:
    """Muon for the matrices inside the layers and AdamW for the rest, on one schedule."""

    def __init__(self, model: Any, recipe: Recipe):
        self.recipe = recipe
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
        self.all: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, rate=recipe.muon_rate),
            torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.peaks = (recipe.muon_rate, recipe.adam_rate)

    def step(self, step: int) -> float:
        """Takes a step with both, and returns the share of their peak rates at this step."""
        done = (step + 1) / self.recipe.steps
        share = min(1.0, done / self.recipe.warmup, (1 - step / self.recipe.steps) / self.recipe.decay)
        for optimizer, peak in zip(self.all, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        return share

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the states of both as tensors by name."""
        return {
            f"optimizer.{number}.{parameter}.{name}": torch.as_tensor(value).contiguous()
            for number, optimizer in enumerate(self.all)
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores the states from the tensors that `tensors` returned."""
        for number, optimizer in enumerate(self.all):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    _, _, parameter, name = key.split(".")
                    state.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def train(recipe: Recipe, out: Path, threads: int = 2, device: str = "cpu") -> Any:
    """Trains to the planned end and returns the model, float32.

    Args:
        recipe: The recipe.
        out: The folder of checkpoint and log; a run that stopped there is resumed.
        threads: The number of parts of a batch to process in parallel on a CPU, which does not change the result.
        device: The device. A GPU processes one part after another.

    Raises:
        StepFlowInputError: The folder holds a run with another recipe.
    """
    kept = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed for determinism on a GPU
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    try:
        return _train(recipe, out, threads if device == "cpu" else 1, device)
    finally:
        torch.use_deterministic_algorithms(kept[0])
        torch.set_num_threads(kept[1])


def _train(recipe: Recipe, out: Path, threads: int, device: str) -> Any:
    from huggingface_hub.utils import tqdm

    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    torch.nn.Module.to(model, device)
    optimizers = _Optimizers(model, recipe)
    out.mkdir(parents=True, exist_ok=True)
    done, seconds = _resume(out, recipe, model, optimizers)
    begun = saved = time.monotonic()
    bar = tqdm(total=recipe.steps, initial=done, unit="step", desc="training")
    with open(out / "log.jsonl", "a") as log, ThreadPoolExecutor(threads) as pool:
        for step in range(done, recipe.steps):
            parts = draw_batch(recipe, tokenizer, step)
            parts = [{name: tensor.to(device) for name, tensor in part.items()} for part in parts]
            loss, exact = _accumulate(model, parts, pool)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {step} is {loss}")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            share = optimizers.step(step)
            bar.update()
            now = time.monotonic()
            spent = seconds + now - begun
            if step % 20 == 19 or step + 1 == recipe.steps:
                line = {"step": step + 1, "loss": round(loss, 5), "exact": round(exact, 4), "rate": round(share, 4)}
                log.write(json.dumps(line | {"seconds": round(spent)}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{loss:.4f}", exact=f"{exact:.3f}")
            if now - saved > _CHECKPOINT_SECONDS or step + 1 == recipe.steps:
                _save(out, recipe, model, optimizers, step + 1, spent)
                saved = now
    bar.close()
    return model


def _accumulate(model: Any, parts: list[dict[str, torch.Tensor]], pool: Executor) -> tuple[float, float]:
    """Sets the gradients of a batch, and returns its loss and the share of its rows with every token right.

    The parts run in parallel and are summed in their order, so that the number of threads does not matter.
    """
    parameters = list(model.parameters())
    total = sum(int((part["labels"] != _IGNORED).sum()) for part in parts)

    def work(part: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor, tuple[torch.Tensor, ...]]:
        output = model(**part, use_cache=False)
        loss = output.loss * (int((part["labels"] != _IGNORED).sum()) / total)
        wanted = part["labels"][:, 1:]
        right = ((output.logits[:, :-1].argmax(-1) == wanted) | (wanted == _IGNORED)).all(-1)
        return loss.item(), right, torch.autograd.grad(loss, parameters)

    results = list(pool.map(work, parts))
    for parameter, *gradients in zip(parameters, *(result[2] for result in results), strict=True):
        parameter.grad = torch.stack(gradients).sum(0)
    rights = torch.cat([result[1] for result in results])
    return sum(result[0] for result in results), float(rights.float().mean())


def _save(out: Path, recipe: Recipe, model: Any, optimizers: _Optimizers, step: int, seconds: float) -> None:
    from safetensors.torch import save_file

    weights = {f"model.{name}": value.contiguous() for name, value in model.named_parameters()}
    about = {"recipe": json.dumps(dataclasses.asdict(recipe)), "step": str(step), "seconds": str(round(seconds))}
    partial = out / "checkpoint.part"
    save_file(weights | optimizers.tensors(), partial, metadata=about)
    os.replace(partial, out / "checkpoint.safetensors")


def _resume(out: Path, recipe: Recipe, model: Any, optimizers: _Optimizers) -> tuple[int, float]:
    """Restores the last checkpoint, if there is one, and returns the steps done and the seconds spent."""
    from safetensors import safe_open

    path = out / "checkpoint.safetensors"
    if not path.exists():
        (out / "log.jsonl").unlink(missing_ok=True)
        return 0, 0.0
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if json.loads(about["recipe"]) != dataclasses.asdict(recipe):
        raise StepFlowInputError(
            f"{out} holds a run with another recipe: {about['recipe']}", hint="train into another folder, or remove it"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    optimizers.load(tensors)
    step = int(about["step"])
    lines = (out / "log.jsonl").read_text().split("\n")[:-1]  # a last line without its end was cut off
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (out / "log.jsonl").write_text("".join(f"{line}\n" for line in kept))
    return step, float(about["seconds"])


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m hf_stepflow.reasoner.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and log")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    train(Recipe(seed=args.seed), args.out, args.threads, args.device)


if __name__ == "__main__":
    main()
