"""Bridge, injection and length temperature of a pass by kernels on its device, without a host read.

The functions are those of `attention`, for a `DevicePass` instead of a `PagedPass`. They are run by Triton's
interpreter in the tests, and have not been run on a GPU.

Shapes: R requests, T tokens of the pass, H query heads, Hkv key-value heads, N tokens a block, D width, F record
fields.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_stepflow.runtime.flow_state import kernels_on
from hf_stepflow.runtime.forward import FlowRules
from hf_stepflow.runtime.settings import FlowPlan

from .block_layout import is_plain
from .key_copies import LayerKeys


@dataclass
class DevicePass:
    """The requests of a pass that run with the same settings; nothing about their tokens is known on the host.

    Attributes:
        plan: What happens in which layer.
        kernels: The kernels.
        records: The records at their slots, int32 [blocks, 1, N, F].
        table: The blocks of each request in them, int32 [R, blocks].
        starts: The first token of each request in the pass, and the number of all, int32 [R + 1].
        lengths: Tokens of each request with those of the pass, int32 [R].
        longest: No request has more tokens.
        on: Which requests are meant, int32 [R].
    """

    plan: FlowPlan
    kernels: Any
    records: Tensor
    table: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    on: Tensor
    bridged = injected = True  # as far as the host knows

    @property
    def where(self) -> tuple[Tensor, ...]:
        """The arguments about tokens that attention and injection share."""
        return self.records, self.table, self.starts, self.lengths, self.on

    def label(self, rules: FlowRules, ids: Tensor, openings: Tensor | None, counts: Tensor) -> None:
        """Labels the tokens of the pass.

        Args:
            rules: The rules.
            ids: Their ids, [T].
            openings: Position where implicit thinking starts in each request, int32 [R], or None.
            counts: int64 [3], as `DeviceCounts` has them.
        """
        where = self.starts, self.lengths, self.table, self.on

        def by_pages(*given: Any) -> Any:  # as the runtime's kernel
            records, ids, _, _, _, opening, _, *tables_and_rules = given
            return self.kernels.label(records, ids, *where, opening, counts, *tables_and_rules)

        # Slots are in `where`, so the one that the runtime's kernel takes means nothing here.
        rules.vocabulary.label(by_pages, self.records, ids, 0, None, openings)


def kernels_for(layers: Iterable[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The kernels (`kernels.PagedKernels`); None where the device has none, or they cannot read a layer's cache.

    Args:
        layers: The attention layers of a model of vLLM, with their caches bound.
        dtype: The dtype of queries.
        device: The device.
    """
    if kernels_on(device) is None:
        return None
    from .kernels import PAGED_KERNELS, WIDEST

    fit = all(is_plain(layer) and layer.kv_cache.dtype == dtype and layer.head_size <= WIDEST for layer in layers)
    return PAGED_KERNELS if fit else None


def bridge(flow: DevicePass, module: Any, tau: Any, query: Tensor, keys: LayerKeys, output: Tensor) -> None:
    """As `attention.bridge`."""
    settings, impl = flow.plan.settings, module.impl
    flow.kernels.attend(
        output.view(len(output), module.num_heads, -1),
        query.view(len(query), module.num_heads, -1),
        keys.cache.cache,
        keys.cache.table,
        *flow.where,
        [tau] if isinstance(tau, float) else list(tau),
        getattr(impl, "sinks", None),
        flow.longest,
        impl.scale,
        getattr(impl, "logits_soft_cap", None) or None,
        _window(module),
        settings.bridge_floor == "absolute",
        settings.bridge_scope == "step",
        settings.sink_tokens,
    )


def inject(flow: DevicePass, module: Any, keys: LayerKeys, output: Tensor) -> None:
    """As `attention.inject`."""
    settings = flow.plan.settings
    last = -1 if settings.smi_window is None else settings.smi_window
    packed = output.view(len(output), module.num_heads, -1)
    flow.kernels.inject(packed, keys.cache.cache, keys.cache.table, *flow.where, settings.alpha, _window(module), last)


def _window(module: Any) -> int:
    return -1 if module.sliding_window is None else module.sliding_window


def scaled_query(flow: DevicePass, query: Tensor, gamma: Any, window: int | None) -> Tensor:
    """As `attention.scaled_query`."""
    base = flow.plan.settings.length_temperature_base
    assert base is not None
    token = torch.arange(len(query), dtype=torch.int32, device=query.device)
    row = torch.searchsorted(flow.starts[1:], token, right=True).clamp(max=len(flow.on) - 1)
    number = flow.lengths[row] - flow.starts[row + 1] + token + 1
    if window is not None:
        number = number.clamp(max=window)
    number = torch.where(flow.on[row] > 0, number, 1).clamp(min=1)
    ratio = (number.double().log() / math.log(base)).clamp(min=1.0)
    powers = _powers(gamma if isinstance(gamma, tuple) else (gamma,), query.device)
    return query * (ratio[:, None, None] ** powers).to(query.dtype)


@lru_cache(maxsize=64)
def _powers(gamma: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(gamma, dtype=torch.float64, device=device).reshape(1, -1, 1)
