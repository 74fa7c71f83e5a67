"""Scores of given traces: the same for pieces as for the whole, in little memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stepflow.evaluation.scoring import score_traces
from tests.support.tiny_models import tiny_model

LENGTHS = ((2, 1), (7, 1100), (3, 1300))  # of prompts and responses, shortest row first


class Largest(TorchDispatchMode):
    """Notes the elements of the largest result of a softmax."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._log_softmax.default:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_responses_are_scored_in_pieces(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, max_position_embeddings=2048)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(5, 320, (n,), generator=generator).tolist() for n in pair] for pair in LENGTHS]
    with Largest() as largest:
        scores = score_traces(model, rows, batch_tokens=10_000)
    assert 0 < largest.elements <= 512 * vocabulary
    # The same batch, all of it at once: prompts padded on the left, responses on the right.
    before, after = 7, 1300
    ids = torch.zeros(len(rows), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        place = slice(before - len(prompt), before + len(response))
        ids[row, place], mask[row, place] = torch.tensor(prompt + response), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=after + 1).logits[:, :-1]
    targets = ids[:, before:]
    likelihood = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    wrong = logits.argmax(-1) != targets
    for row, (score, (_, response)) in enumerate(zip(scores, rows, strict=True)):
        assert score.errors == int(wrong[row, : len(response)].sum())
        assert score.log_likelihood == float(likelihood[row, : len(response)].double().sum())
