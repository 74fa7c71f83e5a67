"""Traces in the middle of thinking, KV caches for them without a prefill, and the arms that continue from there."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.flow_state import FlowState
from hf_stepflow.runtime.report import Tally
from tests.support.flow import byte_tokenizer, encode

STEP = encode("We add the next number now. ")
ARMS = ("base", "off", "on")


def trace(length: int) -> list[int]:
    """Makes a trace: a question that fills an eighth of it, then thinking."""
    ids = encode("Q" * (length // 8) + "<think>")
    while len(ids) < length:
        ids += STEP
    return ids[:length]


def ragged(context: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes traces whose lengths fall from the whole context to about half of it, padded on the left.

    Returns:
        Token ids and mask, int64 [B, context].
    """
    lengths = [context - row * context // (2 * batch) for row in range(batch)]
    ids = [[0] * (context - length) + trace(length) for length in lengths]
    mask = [[0] * (context - length) + [1] * length for length in lengths]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Makes a model with random weights on its device."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def twin(model: Any) -> Any:
    """Makes a second model that shares the weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def arms_of(base: Any) -> dict[str, Any]:
    """Returns the base model, and a second one on the same weights with StepFlow attached at the paper's settings."""
    other = StepFlowModelForCausalLM.attach(twin(base), None, tokenizer=byte_tokenizer())
    return {"base": base, "off": other, "on": other}


@contextmanager
def switched(arm: str, model: Any) -> Iterator[None]:
    """Turns StepFlow off inside the block if the arm is "off"."""
    if arm != "off":
        yield
        return
    with model.disable_stepflow():
        yield


def random_cache(config: Any, batch: int, context: int, like: Any, capacity: int | None = None) -> Any:
    """Makes a KV cache with random contents, the same at each call.

    Args:
        config: The model's config.
        batch: The number of rows.
        context: The number of tokens in each row.
        like: A model with the dtype and the device.
        capacity: The number of slots of a static cache; None makes a cache that grows.
    """
    torch.manual_seed(1)
    shape = (batch, config.num_key_value_heads, context, head_width(config))
    made = DynamicCache(config=config) if capacity is None else StaticCache(config=config, max_cache_len=capacity)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        made.update(key, value, layer)
    return made


def head_width(config: Any) -> int:
    """Returns the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: Any, batch: int, context: int, dtype: torch.dtype) -> int:
    """Returns the size of a KV cache, in bytes."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * batch * context
    return elements * dtype.itemsize


def step_bytes(config: Any, batch: int, context: int, dtype: torch.dtype) -> int:
    """Estimates the memory of a decode step beside weights and cache, in bytes, in the arm that needs most.

    The keys and values of one layer exist a second time while they grow, once for each query head if there is a mask,
    and the keys once in float32.
    """
    layer = cache_bytes(config, batch, context, dtype) // config.num_hidden_layers
    copies = 2 + config.num_attention_heads // config.num_key_value_heads
    return copies * layer + 16 * batch * config.vocab_size


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Returns the size of the weights, in bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def labelled(model: Any, ids: torch.Tensor, mask: torch.Tensor, capacity: int | None = None) -> FlowState:
    """Makes the state that a cache of these tokens carries if StepFlow is on.

    Args:
        model: The attached model.
        ids: Token ids, int64 [B, T].
        mask: 0 for padding, [B, T].
        capacity: The number of slots of a static cache; None for a cache that grows.
    """
    runtime = model.stepflow_runtime
    state = FlowState(runtime.vocabulary_for(runtime.settings), len(ids), ids.device, capacity)
    state.append(state.read(ids, mask == 0), None, ids.device)
    state.tally = Tally(len(ids), model.stepflow_runtime.heads, ids.device)
    return state
