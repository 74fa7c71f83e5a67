"""One call of step_saliency at work: batches go in, maps come out."""

import math
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch
from transformers.utils import logging

from hf_stepflow.runtime.attention import AttentionCall, Output
from hf_stepflow.runtime.attention_interface import query_heads
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.trace import Trace

from .capture import Watch
from .kernel import Collector, chunk_length, salient_attention, tile_heads
from .loss import LOGITS, decoder_output, hidden_gradient, loss_weights
from .memory import StepFlowMemoryError, cost_of, demand_fit, free_bytes, saved_bytes
from .pooling import StepSums, step_of_token
from .result import StepSaliency, describe
from .row_mask import NotATensorError

# Traces of at least so many tokens have their layers computed a second time instead of being kept whole.
CHECKPOINTS_FROM = 4096

# Tokens of the trial that tells how much memory a token takes.
_TRIAL = 16


# One pass at a time looks at a model.
_LOCKS: "weakref.WeakKeyDictionary[Any, threading.Lock]" = weakref.WeakKeyDictionary()


class Session:
    """What is the same for all traces of a call; a context, which has the model to itself and shows the progress.

    Args:
        watch: the model.
        layers: those to look at.
        loss: as for `step_saliency`, and so the others.
    """

    def __init__(
        self,
        watch: Watch,
        layers: list[int],
        loss: "str | tuple[int, int]",
        pooling: str,
        chunk_size: int | None,
        per_head: bool,
        checkpoints: bool | None,
        progress: bool,
    ):
        self.watch = watch
        self.layers = layers
        self.loss = loss
        self.pooling = pooling
        self.chunk_size = chunk_size
        self.per_head = per_head
        self.checkpoints = checkpoints
        self._progress = progress
        self._bar: Any = None
        self._bytes_per_token: float | None = None
        self._tile_heads = 1

    def __enter__(self) -> "Session":
        if any(one.is_inference() for one in self.watch.model.parameters()):
            raise StepFlowUnsupportedError(
                "the model was made inside torch.inference_mode(), so that no gradient can pass through it",
                hint="load it outside of that block",
            )
        self._lock = _LOCKS.setdefault(self.watch.model, threading.Lock())
        self._lock.acquire()
        runtime = getattr(self.watch.model, "stepflow_runtime", None)
        self._of_runtime = None if runtime is None else (runtime, runtime.last, runtime.hands_down)
        if self._progress and logging.is_progress_bar_enabled():
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return self
            self._bar = tqdm(unit="layer", desc="Step-Saliency", delay=2, file=sys.stderr, leave=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._of_runtime is not None:
            runtime, last, hands_down = self._of_runtime
            runtime.last, runtime.hands_down = last, hands_down
        self._lock.release()

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        embedding = self.watch.model.get_input_embeddings()
        if embedding.weight.device.type != "meta":
            return embedding.weight.device
        return torch.device(embedding._hf_hook.execution_device)  # offloaded by accelerate

    def plan(self, batches: list[list[int]], rows: list[torch.Tensor]) -> list[list[int]]:
        """Batches that fit into memory, before any is computed: those that do not are taken apart.

        Args:
            batches: which rows go together.
            rows: token ids, long [T] each.

        Raises:
            StepFlowMemoryError: a row that does not fit by itself.
        """
        planned: list[list[int]] = []
        for batch in batches:
            tokens = max(len(rows[index]) for index in batch)
            try:
                self._chunk_that_fits(len(batch), tokens, rows[batch[0]])
                planned.append(batch)
            except StepFlowMemoryError:
                for index in batch:
                    self._chunk_that_fits(1, len(rows[index]), rows[index])
                planned += [[index] for index in batch]
        return planned

    def run(self, rows: list[torch.Tensor], traces: list[Trace], prompt_length: int | None) -> list[StepSaliency]:
        """The maps of one batch.

        Args:
            rows: token ids, long [T] each.
            traces: their steps.
            prompt_length: of all of them.

        Raises:
            StepFlowMemoryError: they do not fit.
            StepFlowInputError: the loss is not a number.
        """
        model = self.watch.model
        device = self.device
        # Padding stands on the right, where no token of a trace sees it.
        ids = torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
        checkpoints = self._checkpoints(ids.shape[1])
        chunk_size = self._chunk_that_fits(ids.shape[0], ids.shape[1], rows[0])
        # A mean over a long trace leaves half precision little to hold.
        scale = 2.0 ** math.ceil(math.log2(ids.shape[1])) if model.dtype == torch.float16 else 1.0
        owner = threading.get_ident()
        sums = _Sums(traces, self.layers, self.per_head, self._advance)
        losses = [self._loss(trace, device) for trace in traces]

        def attend(call: AttentionCall) -> Output:
            # On other devices than the CPU, autograd computes layers again in threads of its own.
            if threading.get_ident() != owner and (call.query.device.type == "cpu" or not self.watch.is_over):
                raise StepFlowUnsupportedError(
                    "the model was called while step_saliency looks at it in another thread",
                    hint="call it afterwards, or give each thread a model of its own",
                )
            collect = sums.collector(call) if call.layer in self.layers else None
            return salient_attention(call, chunk_size, collect)

        def forward() -> None:
            model(input_ids=ids, use_cache=False, logits_to_keep=1, **self._for_stepflow(mask, prompt_length))

        with ExitStack() as attending:
            decoded = self._attended(
                attending, attend, checkpoints, lambda: decoder_output(self.watch.decoder, forward)
            )
            self.watch.forward_is_over()
            with self._stepflow_off():
                gradient, values = hidden_gradient(model, self.watch.decoder, decoded, ids, losses, scale)
            if not torch.isfinite(gradient).all():
                raise StepFlowInputError(
                    f"the model's loss or its gradient is not a number on this trace (losses {values})",
                    hint="look at the model's weights, or load it in another dtype",
                )
            torch.autograd.backward(decoded[0], gradient)
        about = describe(model, self.loss)
        return [
            StepSaliency(part / scale, list(self.layers), trace, self.pooling, about | {"loss_value": value})
            for part, trace, value in zip(sums.finished(), traces, values, strict=True)
        ]

    def _attended(
        self,
        attending: ExitStack,
        attend: Callable[[AttentionCall], Output],
        checkpoints: bool,
        run: Callable[[], Any],
    ) -> Any:
        """What `run` returns while all attention goes through `attend`, which it does until `attending` is closed."""
        attending.enter_context(self.watch.attending(attend, checkpoints=checkpoints))
        try:
            return run()
        except NotATensorError:
            attending.close()
            self.watch.masks_by_row = False
            attending.enter_context(self.watch.attending(attend, checkpoints=checkpoints))
            return run()

    def _checkpoints(self, tokens: int) -> bool:
        return tokens >= CHECKPOINTS_FROM if self.checkpoints is None else self.checkpoints

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def _loss(self, trace: Trace, device: torch.device) -> "torch.Tensor | tuple[int, int]":
        return loss_weights(self.loss, trace).to(device) if isinstance(self.loss, str) else self.loss

    def _for_stepflow(self, mask: torch.Tensor, prompt_length: int | None) -> dict[str, Any]:
        """What an attached model has to know of the batch."""
        runtime = getattr(self.watch.model, "stepflow_runtime", None)
        if runtime is None or runtime.effective is None:
            return {}
        return {"attention_mask": mask, "prompt_length": prompt_length}

    def _stepflow_off(self) -> Any:
        model = self.watch.model
        return nullcontext() if getattr(model, "stepflow_runtime", None) is None else model.disable_stepflow()

    def _chunk_that_fits(self, batch: int, tokens: int, row: torch.Tensor) -> int:
        """Queries of a tile: what was asked for, or what is fast and fits; refuses a batch that does not."""
        model, modules = self.watch.model, self.watch.modules
        if self._bytes_per_token is None:
            self._bytes_per_token = self._tried(row)
        runtime = getattr(model, "stepflow_runtime", None)
        bridged = runtime is not None and runtime.effective is not None and bool(runtime.effective.plan.tau)
        heads = max(query_heads(model, module) for module in modules.values()) if bridged else self._tile_heads
        dtype = torch.promote_types(model.dtype, torch.float32)
        text = model.config.get_text_config(decoder=True)
        cost = cost_of(
            self._bytes_per_token,
            text.num_hidden_layers - self.layers[0],  # those below are not in the graph
            text.hidden_size * model.dtype.itemsize,
            (batch, heads, tokens),
            logits=min(LOGITS, tokens * text.vocab_size),
            checkpoints=self._checkpoints(tokens),
            bridged=bridged,
            size=dtype.itemsize,
        )
        free = free_bytes(self.device)
        chunk = self.chunk_size or chunk_length(batch, heads, tokens, self.device)
        if self.chunk_size is None and free is not None:
            chunk = max(1, min(chunk, cost.largest_chunk(free)))
        demand_fit(cost, chunk, free, tokens)
        return chunk

    def _tried(self, row: torch.Tensor) -> float:
        """Bytes that autograd keeps of a token, from a short pass, which also tells the heads of a tile."""
        model = self.watch.model
        trial = row[None, :_TRIAL].to(self.device)

        def run() -> Any:
            return decoder_output(self.watch.decoder, lambda: model(input_ids=trial, use_cache=False))

        def attend(call: AttentionCall) -> Output:
            heads = tile_heads(call.query.shape[1], call.key.shape[1], call.query.device, bridged=False)
            self._tile_heads = max(self._tile_heads, heads)
            return salient_attention(call, _TRIAL, _ignore if call.layer in self.layers else None)

        with self._stepflow_off(), ExitStack() as attending:
            saved = self._attended(attending, attend, False, lambda: saved_bytes(model, run))
        return saved / trial.shape[1]


def _ignore(query: int, key: int, heads: slice, tile: torch.Tensor) -> None:
    """Collects nothing."""


class _Sums:
    """Saliency summed over pairs of steps, for the traces of a batch."""

    def __init__(self, traces: list[Trace], layers: list[int], per_head: bool, advance: Callable[[], None]):
        self._places = [(step_of_token(trace), len(trace.steps)) for trace in traces]
        self._layers = layers
        self._per_head = per_head
        self._advance = advance
        self._pools: dict[torch.device, list[StepSums]] = {}
        self._found: list[dict[int, torch.Tensor]] = [{} for _ in traces]

    def collector(self, call: AttentionCall) -> Collector:
        """What takes the tiles of one layer."""
        device, heads = call.query.device, call.query.shape[1]
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        pools = self._pools.setdefault(device, [StepSums(*place, device) for place in self._places])
        for found, (_, steps) in zip(self._found, self._places, strict=True):
            shape = (heads if self._per_head else 1, steps, steps)
            found.setdefault(call.layer, torch.zeros(shape, dtype=dtype, device=device))

        def add(query: int, key: int, heads: slice, tile: torch.Tensor) -> None:
            for row, (found, pool) in enumerate(zip(self._found, pools, strict=True)):
                pool.add(found[call.layer][heads], query, key, tile[row])

        def advance(query: int, last: int) -> None:
            if query == 0 and last == heads:
                self._advance()

        def collect_heads(query: int, key: int, own: slice, tile: torch.Tensor) -> None:
            add(query, key, own, tile)
            advance(query, own.stop)

        summed: list[torch.Tensor] = []

        def collect_mean(query: int, key: int, own: slice, tile: torch.Tensor) -> None:
            # Over the heads of a chunk first, so that they are pooled once.
            total = tile.sum(1, keepdim=True) if tile.shape[1] > 1 else tile
            summed[:] = [total if own.start == 0 else summed[0].add_(total)]
            if own.stop == heads:
                add(query, key, slice(0, 1), summed.pop() / heads)
            advance(query, own.stop)

        return collect_heads if self._per_head else collect_mean

    def finished(self) -> list[torch.Tensor]:
        """For each trace [layers, S, S], or [layers, heads, S, S], on the CPU, in float32 or float64."""
        stacks = [torch.stack([found[layer].cpu() for layer in self._layers]) for found in self._found]
        return stacks if self._per_head else [stack[:, 0] for stack in stacks]
