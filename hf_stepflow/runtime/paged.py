"""Continuous batching: records at the slots of a paged cache, and attention sequence by sequence.

transformers packs new tokens of many sequences into one row, and keeps their keys and values in blocks of one cache. A
record depends on the tokens before it alone. So `PagedRecords` keeps it where the keys of its token are, and makes the
next one from it. Whatever happens to blocks (prefixes are shared, prompts arrive in chunks, requests are put off and
begun again) leaves the records right; where transformers copies blocks, they are copied along.

Each pass is labelled first. In layers where any sequence is bridged or injected, the cache is updated for all, and
each sequence then has attention of its own, with a `FlowPass` of its own, as if it ran alone. Other layers run the
base's packed attention.

Shapes: T packed queries, q those of one sequence, K its keys, N blocks of P slots, F record fields.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import transformers

from .errors import StepFlowError, StepFlowInputError, StepFlowUnsupportedError
from .flow_state import FlowState
from .forward import FlowPass, FlowRules
from .settings import FlowPlan
from .step_detector import FIELDS, Field, empty_record

# The layers whose keys stay for the whole sequence, and with them the slots of the records.
_FULL = "full_attention"

# What continuous batching hands to attention for the whole row; no sequence of its own gets it.
_PACKED_ARGUMENTS = frozenset(
    "block_table cache cu_seq_lens_k cu_seq_lens_q is_causal logits_indices logits_processor_args max_length_k "
    "max_length_q position_ids read_index use_cache write_index".split()
)

_HINT = "use generate(), or call inside `with model.disable_stepflow():`"


def start_manager(
    model: Any,
    start: Callable[..., Any],
    rules: FlowRules | None,
    generation_config: Any,
    config: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Starts continuous batching on an attached model.

    The settings in force now stay in force for all requests of the manager, which runs in a thread of its own.

    Args:
        model: The model.
        start: `init_continuous_batching` of its base.
        rules: The settings; None, or settings that ask for nothing, for the base model.
        generation_config: As `start` takes it.
        config: The `ContinuousBatchingConfig`, or None.
        kwargs: Other arguments of `start`.

    Raises:
        StepFlowUnsupportedError: StepFlow cannot follow this model or config in continuous batching.
        StepFlowInputError: The model keeps a manager that was started under other settings.
    """
    rules = None if rules is None or rules.plan.is_idle else rules
    if importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is None:
        raise _refused(
            f"of transformers {transformers.__version__}, only of 5.23", "install transformers 5.23 or later"
        )
    if config is None:
        config = getattr(generation_config or model.generation_config, "continuous_batching_config", None)
    config = copy.copy(transformers.ContinuousBatchingConfig() if config is None else config)
    config.auto_switch_to_flash = False  # StepFlow stays on the implementation that it was attached to
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None and getattr(kept, "stepflow_key", ()) != _key(rules):
        raise StepFlowInputError(
            "the model keeps a manager of continuous batching that was started under other settings",
            hint="call model.destroy_cached_continuous_batching_manager() first",
        )
    if rules is not None:
        _check(model, config, rules)
    manager = start(generation_config=generation_config, continuous_batching_config=config, **kwargs)
    if not isinstance(manager, _FlowManager):
        kind = type(manager)
        manager.__class__ = type(kind.__name__, (_FlowManager, kind), {"__module__": kind.__module__})
        manager.stepflow_rules = rules
    return manager


def _check(model: Any, config: Any, rules: FlowRules) -> None:
    """Refuses what StepFlow does not follow, by name, and turns off what transformers would choose by itself."""
    base = model.stepflow_runtime.base_implementation
    if base != "sdpa":
        raise _refused(f"on attn_implementation={base!r}", 'load the model with attn_implementation="sdpa"')
    if getattr(model, "_device_mesh", None) is not None:
        raise _refused("under tensor parallelism", "load the model without tp_plan")
    text_config = model.config.get_text_config()
    kinds = getattr(text_config, "layer_types", None)
    if _FULL not in kinds if kinds is not None else getattr(text_config, "sliding_window", None) is not None:
        raise _refused(
            f"of {type(model).__name__}, whose layers all have a sliding window: no slot stays for a whole sequence"
        )
    graphs = config.use_cuda_graph if isinstance(config.use_cuda_graph, tuple) else (config.use_cuda_graph,)
    compiles = config.varlen_compile_config, config.decode_compile_config, config.default_compile_level
    asked = {
        "cpu_offload_space": config.cpu_offload_space != 0,  # blocks would come back without their records
        "use_cuda_graph": any(graphs),
        "use_async_batching": bool(config.use_async_batching),
        "compilation": any(compiles) or getattr(text_config, "compile_config", None) is not None,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise _refused(f"with {name}: tokens are labelled on the host", f"leave out {name}")
    config.use_cuda_graph = config.use_async_batching = False
    if rules.plan.settings.implicit_thinking:
        # The same tokens are prompt in one request and thinking in another, so no block serves both.
        config.allow_block_sharing = False


def _refused(reason: str, hint: str | None = None) -> StepFlowUnsupportedError:
    return StepFlowUnsupportedError(
        f"StepFlow cannot follow continuous batching {reason}", hint=_HINT if hint is None else f"{hint}; or {_HINT}"
    )


def _key(rules: FlowRules | None) -> Any:
    """The key by which the settings of two managers differ."""
    return None if rules is None else (repr(rules.plan.settings), id(rules.vocabulary))


class _FlowManager:
    """A manager of continuous batching whose caches carry records."""

    stepflow_rules: FlowRules | None

    @property
    def stepflow_key(self) -> Any:
        """See `_key`."""
        return _key(self.stepflow_rules)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()  # type: ignore[misc]
        if getattr(processor.cache, "stepflow_records", None) is None:
            processor.cache.stepflow_records = PagedRecords(self.stepflow_rules, processor)
        return processor

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stops the manager, and raises the error of StepFlow that ended its thread, if one did."""
        super().stop(*args, **kwargs)  # type: ignore[misc]
        error = self.background_thread_status.fatal_error  # type: ignore[attr-defined]
        if isinstance(error, StepFlowError):
            raise error


@dataclass
class PackedSequence:
    """One sequence of a packed pass.

    Attributes:
        queries: Its queries in the row.
        keys: {kind of layer: its keys among those that the layer reads}.
        flow: Its pass, as if it ran alone; None where nothing is to be done.
        masks: {kind of layer: what its queries see, bool [1, 1, q, K], or None for all before them}.
    """

    queries: slice
    keys: dict[str, slice]
    flow: FlowPass | None
    masks: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, kind: str, packed: torch.Tensor) -> torch.Tensor | None:
        """The mask of a layer, which layers of a kind share.

        Args:
            kind: The kind of the layer.
            packed: The mask of the whole row, [1, 1, T, all keys], to be added.
        """
        if kind not in self.masks:
            queries, keys = self.queries.stop - self.queries.start, self.keys[kind].stop - self.keys[kind].start
            is_plain = queries == 1 or (kind == _FULL and queries == keys)
            own = None if is_plain else packed[..., self.queries, self.keys[kind]]
            self.masks[kind] = None if own is None else own > torch.finfo(own.dtype).min / 2
        return self.masks[kind]


@dataclass
class PagedPass:
    """One packed forward pass, in place of a `FlowPass`.

    Attributes:
        plan: What happens in which layer.
        queries: Number of queries in the row, T.
        sequences: The sequences in their order in the row.
        cache: The paged cache.
        reached: As in `FlowPass`.
    """

    plan: FlowPlan
    queries: int
    sequences: list[PackedSequence]
    cache: Any
    reached: dict[int, bool] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        attention: Callable[..., Any],
        module: torch.nn.Module,
        parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:
        """Attention of a layer.

        Args:
            layer: The layer.
            attention: StepFlow's attention function, for one sequence or, without a pass, the packed row.
            module: The attention module.
            parts: Query [1, H, T, D]; key and value [1, Hkv, T, D] of the new tokens where `kwargs` has the cache,
                else (from transformers 5.24 on) [1, Hkv, K, D] of all keys.
            mask: The mask of the whole row.
            kwargs: The other arguments of attention, those of the paged cache among them.
        """
        kind = self.cache.layer_to_allocator[layer].layer_type
        has_new = kwargs.get("cache") is not None
        is_whole = has_new or parts[1].shape[2] == self.sequences[-1].keys[kind].stop
        self.reached[layer] = is_whole
        if not is_whole or parts[0].shape[2] != self.queries or kwargs.get("position_bias") is not None:
            raise _refused(f"of {type(module).__name__}, which does not hand the packed row to attention as it is")
        if not any(self._acts(layer, one.flow) for one in self.sequences):
            return attention(module, *parts, mask, stepflow_pass=False, **kwargs)
        query, key, value = parts
        if has_new:
            key, value = self.cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=dict(kwargs))
        own = {name: value for name, value in kwargs.items() if name not in _PACKED_ARGUMENTS}
        outputs = []
        for one in self.sequences:
            keys = one.keys[kind]
            these = query[:, :, one.queries], key[:, :, keys], value[:, :, keys]
            output, _ = attention(module, *these, one.mask(kind, mask), stepflow_pass=one.flow or False, **own)
            outputs.append(output)
        return torch.cat(outputs, 1), None

    def _acts(self, layer: int, flow: FlowPass | None) -> bool:
        """Whether anything is to be done to a sequence in a layer."""
        if flow is None:
            return False
        bridges = layer in self.plan.tau and flow.active[0] < flow.active[1]
        return bridges or layer in self.plan.gamma or (layer in self.plan.inject and flow.has_trigger)


class PagedRecords:
    """The records of all tokens in a paged cache.

    Attributes:
        rules: The settings that the cache was filled under; None for the base model.
        records: int32 [N * P, F], a record for each slot that layers without a window share.
    """

    def __init__(self, rules: FlowRules | None, processor: Any):
        self.rules = rules
        if rules is None:
            return
        cache = processor.cache
        self._inputs = processor.inputs_and_outputs
        self._allocator = cache.cache_allocators[_FULL]
        self._kinds = list(cache.cache_allocators)
        # The first two sectors are trash; blocks are numbered from their start.
        blocks = self._allocator.num_blocks + 2 * self._allocator.blocks_per_sector
        slots = blocks * self._allocator.tokens_per_page
        self.records = torch.zeros(slots, FIELDS, dtype=torch.int32, device=cache.device)
        self._copy_keys = self._allocator.copy_blocks
        self._allocator.copy_blocks = self.copy_blocks

    def copy_blocks(self, source_block_ids: list[int], dest_block_ids: list[int]) -> None:
        """Copies whole blocks and their records: a fork shares the full blocks of a request and copies the last."""
        self._copy_keys(source_block_ids, dest_block_ids)
        by_block = self.records.view(-1, self._allocator.tokens_per_page, FIELDS)
        source, target = (torch.tensor(ids, device=by_block.device) for ids in (source_block_ids, dest_block_ids))
        by_block[target] = by_block[source]

    def _slots(self, physical: torch.Tensor) -> torch.Tensor:
        """Slots by the indices of the cache, in which a block holds keys and values of all layers."""
        stride, page = self._allocator.block_physical_stride, self._allocator.tokens_per_page
        return physical // stride * page + physical % stride

    def label(self, kwargs: dict[str, Any]) -> PagedPass:
        """Labels the new tokens of a packed pass.

        Args:
            kwargs: The arguments of the model's forward.

        Raises:
            StepFlowUnsupportedError: The pass is compiled or reads the cache by a block table; or a record is not
                where the token before it should be.
        """
        rules = self.rules
        assert rules is not None
        if torch.compiler.is_compiling() or kwargs.get("block_table") is not None:
            raise _refused("in compiled passes, or in those that read the cache by a block table")
        read, write = (kwargs[name][self._allocator.index] for name in ("read_index", "write_index"))
        edges, ids, before = self._read(kwargs, read)
        queries, keys = edges[0], dict(zip(self._kinds, edges[1:], strict=True))
        rows = []
        for number, (start, end) in enumerate(pairwise(queries)):
            past = keys[_FULL][number + 1] - keys[_FULL][number] - (end - start)
            record = before[number] if past else empty_record()
            if record[Field.COUNT] != past:
                raise _refused(
                    f"here: a sequence goes on at position {past}, but the record before that counts "
                    f"{record[Field.COUNT]} tokens, so its blocks were filled or moved without StepFlow",
                    "start a new manager",
                )
            opening = self._prompt_length(number) if rules.plan.settings.implicit_thinking else None
            rows.append(rules.vocabulary.scan(ids[start:end], record, start=past, prompt_length=opening))
        made = torch.tensor([record for row in rows for record in row], dtype=torch.int32).to(self.records.device)
        self.records.index_copy_(0, self._slots(write), made)
        sequences = []
        for number, row in enumerate(rows):
            own = slice(queries[number], queries[number + 1])
            spans = {kind: slice(edge[number], edge[number + 1]) for kind, edge in keys.items()}
            flow = self._pass_of(row, made[own], None if read.numel() == 0 else read[spans[_FULL]])
            sequences.append(PackedSequence(own, spans, flow))
        return PagedPass(rules.plan, len(ids), sequences, kwargs["cache"])

    def _read(self, kwargs: dict[str, Any], read: torch.Tensor) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """Reads what labelling needs from the device, at once.

        Returns:
            The first query of each sequence and the end of the last; the same of keys, for each kind of layer; the
            token ids [T]; and the record before each sequence's first query (anything where there is none), [S][F].
        """
        queries, ids = kwargs["cu_seq_lens_q"], kwargs["input_ids"][0]
        keys = [kwargs["cu_seq_lens_k"][kind] for kind in self._kinds]
        full = kwargs["cu_seq_lens_k"][_FULL]
        count = queries.shape[0]
        parts = [queries, *keys, ids]
        if read.numel():
            last = (full[1:] - queries.diff() - 1).clamp(min=0)
            parts.append(self.records[self._slots(read[last])].flatten())
        found = torch.cat([part.to(queries.dtype) for part in parts]).tolist()
        edges = [found[start : start + count] for start in range(0, count * (len(keys) + 1), count)]
        start = count * (len(keys) + 1)
        end = start + ids.shape[0]
        records = [found[place : place + FIELDS] for place in range(end, len(found), FIELDS)]
        return edges, found[start:end], records or [empty_record()] * (count - 1)

    def _pass_of(self, row: list[list[int]], made: torch.Tensor, read: torch.Tensor | None) -> FlowPass | None:
        """The pass of one sequence; None where nothing is to be done in any layer.

        Args:
            row: Its new records.
            made: The same on the device, int32 [q, F].
            read: Indices of its keys in the cache, [K], or None where it has no others than the new ones.
        """
        rules = self.rules
        assert rules is not None
        plan = rules.plan
        bridges = bool(plan.tau) and any(record[Field.ACTIVE] for record in row)
        injects = bool(plan.inject) and any(record[Field.TRIGGER] for record in row)
        if not (bridges or injects or plan.gamma):
            return None
        state = FlowState(rules.vocabulary, 1, made.device)
        state.records = (made if read is None else self.records[self._slots(read)])[None]
        state.set_length(state.records.shape[1])
        return FlowPass.of(plan, state, made[None], [row], state.count)

    def _prompt_length(self, number: int) -> int:
        """Length of a sequence's prompt: a request that is begun again has what it generated in its first tokens."""
        request = self._inputs.requests_in_batch[number].state
        return request._true_initial_tokens or len(request.initial_tokens)
