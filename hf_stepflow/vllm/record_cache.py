"""The records of all tokens at the slots of vLLM's paged cache: a cache layer of its own.

A token's record (`step_detector.Field`) depends only on the tokens before it, so it belongs to its slot as its key
does. Whatever vLLM does to a block, it does to the records in it: sharing prefixes, preempting, chunking, drafts.

Shapes: n tokens, F record fields.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hf_stepflow.runtime.step_detector import FIELDS


class RecordCache(torch.nn.Module, AttentionLayerBase):
    """The cache layer: int32, F numbers a token.

    Args:
        vllm_config: The engine's config, in which the layer makes itself known.
        layers: Number of layers of the model; the name of the cache continues their numbers.

    Attributes:
        name: Its name among the layers.
        kv_cache: [blocks, 1, N, F], N tokens a block; bound by vLLM.
    """

    def __init__(self, vllm_config: Any, layers: int):
        super().__init__()
        self.name = f"stepflow.records.{layers}"
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[self.name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend, which only says where tokens are."""
        return _Records

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """Room for F numbers a token, as a key and a value of half as many."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=FIELDS // 2, dtype=torch.int32
        )

    def read(self, table: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """The records of some tokens, int32 [n, F].

        Args:
            table: The block table, int32 [requests, blocks].
            rows: The requests, long [n].
            positions: Positions in their sequences, long [n].
        """
        tokens = self.kv_cache.shape[2]
        blocks = table[rows, positions // tokens].long()
        return self.kv_cache[blocks, 0, positions % tokens]

    def write(self, slots: Tensor, records: Tensor) -> None:
        """Puts records, int32 [n, F], at slots of the cache, long [n]."""
        tokens = self.kv_cache.shape[2]
        self.kv_cache[slots // tokens, 0, slots % tokens] = records


@dataclass
class RecordMetadata(AttentionMetadata):
    """Where the tokens of a pass are.

    Attributes:
        starts: The first token of each request in the pass, and the number of all, int32 [requests + 1], on the host.
        starts_there: The same on the device.
        lengths: Tokens of each request with those of the pass, int32 [requests].
        longest: No request has more tokens.
        table: The block table, int32 [requests, blocks].
        slots: Slots of the tokens, long [n].
    """

    starts: Tensor
    starts_there: Tensor
    lengths: Tensor
    longest: int
    table: Tensor
    slots: Tensor


class _Builder(AttentionMetadataBuilder[RecordMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> RecordMetadata:
        common = common_attn_metadata
        return RecordMetadata(
            common.query_start_loc_cpu,
            common.query_start_loc,
            common.seq_lens,
            common.max_seq_len,
            common.block_table_tensor,
            common.slot_mapping,
        )


class _Records(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "STEPFLOW_RECORDS"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the cache of StepFlow's records computes nothing")

    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder
