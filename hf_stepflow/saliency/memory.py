"""Estimates the memory of a pass, so that a trace that would not fit is refused before it starts."""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.runtime.attention import AttentionCall, Output
from hf_stepflow.runtime.attention_interface import query_heads
from hf_stepflow.runtime.errors import StepFlowError

from .capture import Capture, KeptOutputs
from .kernel import chunk_length, salient_attention, tile_heads
from .loss import LOGITS

# Traces of at least this many tokens have their layers computed a second time instead of being kept whole.
CHECKPOINTS_FROM = 4096

# Tokens of the trial that measures the memory of a token.
_TRIAL = 16

# Tensors of the size of a tile's logits that are alive at once in the backward pass of a plain and of a bridged layer.
_TILES_PLAIN, _TILES_BRIDGED = 5, 14

# The same for the vocabulary's logits, and, in units of what autograd keeps of a layer, for the gradients inside it.
_TENSORS_OF_LOGITS, _INSIDE_LAYER = 4, 4

# The share of the free memory that may be used; workspaces of kernels, fragmentation and the loss take the rest.
_SHARE = 0.8


class StepFlowMemoryError(StepFlowError, MemoryError):
    """A trace would not fit into memory."""


class Budget:
    """Chooses how much is computed at a time, and refuses what does not fit.

    Args:
        capture: The model.
        layers: The layers whose saliency is wanted.
        chunk_size: Queries of a tile; None chooses.
        checkpoints: Whether layers are computed a second time; None does for long traces.
    """

    def __init__(self, capture: Capture, layers: list[int], chunk_size: int | None, checkpoints: bool | None):
        self._capture = capture
        self._layers = layers
        self._chunk_size = chunk_size
        self._checkpoints = checkpoints
        self._bytes_per_token = 0.0
        self._tile_heads = 1
        self._output_bytes = 0

    def plan(self, batches: list[list[int]], rows: list[torch.Tensor]) -> list[list[int]]:
        """Splits batches that do not fit, before any is computed.

        Args:
            batches: The rows of each batch, by number.
            rows: Token ids, long [T] each.

        Raises:
            StepFlowMemoryError: If a row does not fit by itself.
        """
        self._try(rows[batches[0][0]])
        planned: list[list[int]] = []
        for batch in batches:
            try:
                self.chunk(len(batch), max(len(rows[index]) for index in batch))
                planned.append(batch)
            except StepFlowMemoryError:
                for index in batch:
                    self.chunk(1, len(rows[index]))
                planned += [[index] for index in batch]
        return planned

    def checkpoints(self, tokens: int) -> bool:
        """Whether the layers of a trace of this length are computed a second time."""
        return tokens >= CHECKPOINTS_FROM if self._checkpoints is None else self._checkpoints

    def chunk(self, batch: int, tokens: int) -> int:
        """Chooses the queries of a tile: `chunk_size`, or a number that is fast and fits.

        Raises:
            StepFlowMemoryError: If the batch does not fit; the hint names a chunk size that does, if there is one.
        """
        capture, model = self._capture, self._capture.model
        text = model.config.get_text_config(decoder=True)
        size = torch.promote_types(model.dtype, torch.float32).itemsize
        hidden = text.hidden_size * model.dtype.itemsize
        layers = text.num_hidden_layers - self._layers[0]  # those below are not in the graph
        layer = self._bytes_per_token / layers
        # Kept for the backward pass, the gradients inside one layer, and hidden states with their gradient.
        graph = self._bytes_per_token + _INSIDE_LAYER * layer + 3 * hidden
        if self.checkpoints(tokens):  # the outputs of attention are kept all the same
            graph = (1 + _INSIDE_LAYER) * layer + (layers + 3) * hidden + layers * self._output_bytes
        fixed = int(graph * batch * tokens) + _TENSORS_OF_LOGITS * min(LOGITS, tokens * text.vocab_size) * size

        rules = capture.rules
        bridged = rules is not None and bool(rules.plan.tau)
        heads = self._tile_heads
        if bridged:
            heads = max(query_heads(model, module) for module in capture.modules.values())
        tile = batch * heads * tokens * size * (_TILES_BRIDGED if bridged else _TILES_PLAIN)  # of one query
        chunk = self._chunk_size or chunk_length(batch, heads, tokens, capture.device)
        free = free_bytes(capture.device)
        if free is None:
            return chunk
        usable = int(free * _SHARE)
        largest = (usable - fixed) // tile
        if self._chunk_size is None:
            chunk = max(1, min(chunk, largest))
        if largest >= chunk:
            return chunk
        hint = f"pass chunk_size={largest} or less"
        if largest < 1:
            longest = max(0, int(tokens * free * _SHARE / (fixed + tile)))
            hint = f"about {longest} tokens would fit; take a shorter trace, another device or half precision"
        raise StepFlowMemoryError(
            f"a trace of {tokens} tokens needs about {_size(fixed + chunk * tile)} with chunk_size={chunk}, and "
            f"{_size(usable)} of the free memory may be used",
            hint=hint,
        )

    def _try(self, row: torch.Tensor) -> None:
        """Measures the bytes of a token that autograd and attention keep, and the heads of a tile, in a short pass."""
        capture = self._capture
        trial = row[None, :_TRIAL].to(capture.device)

        def attend(call: AttentionCall, kept: KeptOutputs | None) -> Output:
            heads = tile_heads(call.query.shape[1], call.key.shape[1], call.query.device, bridged=False)
            self._tile_heads = max(self._tile_heads, heads)
            self._output_bytes = call.query.shape[1] * (call.value.shape[-1] * call.value.element_size() + 4)
            # The saliency of a trial is dropped.
            return salient_attention(call, _TRIAL, (lambda *tile: None) if call.layer in self._layers else None)

        def run() -> Any:
            call = functools.partial(capture.model, input_ids=trial, use_cache=False)
            with capture.running(call, attend, checkpoints=False) as decoded:
                return decoded

        with capture.stepflow_off():
            self._bytes_per_token = saved_bytes(capture.model, run) / trial.shape[1]


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device still has, or None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, KeyError):
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(table["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a control group without a limit says "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    return min(found, default=None)


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Counts the bytes that autograd keeps for the backward pass of the result of `run`, each storage once.

    Weights do not count: they exist already and do not grow with the trace.
    """
    kept_anyway = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept_anyway:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(seen.values())


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
