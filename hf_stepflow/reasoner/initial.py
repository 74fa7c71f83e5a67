"""Initial weights of the reasoner: a previous-token head, and attention between similar tokens.

Looking a premise up takes an induction head (Olsson et al. 2022): one head copies the previous token into each
position, and a later head finds the position whose copy matches the current token. Neither helps without the other, so
from random weights a short training forms both only by chance. Therefore the first head is there from the start, and
the queries, keys, values and outputs of all others are tied as in trained models (mimetic initialization, Trockman and
Kolter 2023).
"""

from typing import Any

import torch

# The embeddings: the spread of each entry, and the length of the vector that all share, which the first layer reads.
_SPREAD, _SHARED = 0.1, 0.8
# The share of the key's projection in the query's.
_TIED = 0.9
# The first layer attends by position: the number of the fastest rotations that it uses, and the length of its vectors.
_ROTATIONS, _LENGTH = 6, 1.8


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Sets the embeddings and the attention of an untrained Qwen3 model, in place."""
    config = model.config
    width, size = config.hidden_size, config.head_dim
    groups = config.num_key_value_heads
    heads = config.num_attention_heads // groups
    generator = torch.Generator().manual_seed(seed)
    shared = torch.full((width,), width**-0.5)
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0.0, _SPREAD, generator=generator).add_(_SHARED * shared)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, size, width, generator=generator) / width**0.5

        keys = drawn(groups, 1)
        keys -= (keys @ shared)[..., None] * shared
        queries = _TIED * keys + (1 - _TIED) * drawn(groups, heads)
        if number == 0:
            query, key = _one_before(size, config.rope_parameters["rope_theta"])
            keys[0] = 2 * key[:, None] * shared + 0.05 * keys[0]
            queries[0] = 2 * query[:, None] * shared + 0.05 * queries[0]
            attention.q_norm.weight.fill_(_LENGTH)
            attention.k_norm.weight.fill_(_LENGTH)
        values = drawn(groups, 1)
        outputs = values.expand(-1, heads, -1, -1) / (heads * groups / 2) ** 0.5
        attention.q_proj.weight.copy_(queries.flatten(0, 2))
        attention.k_proj.weight.copy_(keys.flatten(0, 2))
        attention.v_proj.weight.copy_(values.flatten(0, 2))
        attention.o_proj.weight.copy_(outputs.flatten(0, 2).T)


def _one_before(size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a query and a key [size] whose product is largest if the key is one position before the query."""
    half = size // 2
    angles = theta ** -(torch.arange(half) / half)
    query = torch.zeros(size)
    query[:_ROTATIONS] = 1.0
    return query, torch.cat([query[:half] * angles.cos(), query[:half] * angles.sin()])
