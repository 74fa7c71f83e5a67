"""How the reasoner starts: with heads that look at the token before, and attention between tokens that are alike.

Looking a premise up takes an induction head (Olsson et al. 2022): one head that tells each token what stands before
it, and a later one that finds the token told what is now being read. From random weights neither helps without the
other, and whether both have come about by the end of a short training is chance. So the first is there from the start,
and queries, keys, values and outputs of all others are tied at first as they are in trained models (mimetic
initialization, Trockman and Kolter 2023).
"""

from typing import Any

import torch

# Of the embeddings: spread of each entry, and length of what all of them share, which heads of the first layer see.
_SPREAD, _SHARED = 0.1, 0.8
# How much of a query's map is its key's map.
_TIED = 0.9
# The first layer looks by position: along so many of the fastest rotations, with queries and keys this long.
_ROTATIONS, _LENGTH = 6, 1.8


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Sets embeddings and attention of an untrained Qwen3 model; the rest stays as it is."""
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
    """A query and a key [size] whose product is largest where the key stands one position before."""
    half = size // 2
    angles = theta ** -(torch.arange(half) / half)
    query = torch.zeros(size)
    query[:_ROTATIONS] = 1.0
    return query, torch.cat([query[:half] * angles.cos(), query[:half] * angles.sin()])
