"""StepFlow in a worker of vLLM: on its model, once per pass and once per layer in which something is to be done.

Before the model runs, the tokens of the pass are labelled and their records written at their slots. In the layers of
the bridge and the injection, attention runs as vLLM has it; then the rows to which StepFlow applies are computed anew.
Layers and rows in which nothing is to be done keep vLLM's result bit for bit.

There are two forms. Where the device has kernels and the backend's caches are plain, everything runs on the device
without a host read (`device_attention`): this is meant for GPUs, and has been run by Triton's interpreter only.
Elsewhere tokens are labelled on the host, and rows are computed sequence by sequence (`attention`).
"""

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from hf_stepflow.runtime.forward import FlowRules
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from hf_stepflow.runtime.step_detector import Field

from . import attention, device_attention
from .block_layout import LayerCache, reader_for
from .device_attention import DevicePass, kernels_for
from .device_counts import DeviceCounts
from .engine import counters_in, vocabulary_of
from .key_copies import KeyCopies, LayerKeys
from .record_cache import RecordCache, RecordMetadata
from .requests import EngineSettings
from .sequences import PagedPass, Sequence


class FlowWorker:
    """StepFlow on the model of one worker.

    Args:
        runner: The model runner, whose model is loaded.
        settings: What the engine was started with.

    Raises:
        StepFlowUnsupportedError: StepFlow cannot reach the model's attention.
        StepFlowConfigError: The settings name layers or heads that the model does not have.
    """

    def __init__(self, runner: Any, settings: EngineSettings):
        config = runner.vllm_config
        self.runner, self.settings = runner, settings
        layers = attention_layers(runner.model)
        self._size, self._rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self._heads = {layer: module.num_heads for layer, module in layers.items()}
        self._rules: dict[str, FlowRules] = {}
        self.records = RecordCache(config, max(layers) + 1)
        self.counters = counters_in(config, 1 + config.parallel_config.data_parallel_rank) if self._rank == 0 else None
        self._passes: list[Any] = []
        self._readers: dict[int, Any] = {}
        self._copies = KeyCopies()
        changed = set(layers) if settings.own is None else self._rules_of(settings.own).plan.changed
        for layer in layers if settings.takes_requests else sorted(changed):
            module = layers[layer]
            module.impl.forward = functools.partial(self._attend, layer, module, module.impl.forward)
        self._layers = layers
        self._switches: tuple[Any, list[tuple[FlowRules, Tensor, Tensor | None]]] = None, []
        runner.model.register_forward_pre_hook(self._begin)
        runner.model.register_forward_hook(self._end)

    def _begin(self, model: Any, args: Any) -> None:
        """Labels the tokens of the pass."""
        self._passes = []
        metadata = get_forward_context().attn_metadata
        requests = self.runner.input_batch.num_reqs
        if not isinstance(metadata, dict) or self.records.name not in metadata or not requests:
            return  # a pass that only measures memory or warms up
        if self._kernels is not None:
            self._passes = self._label_there(metadata[self.records.name], requests)
            return
        by_plan: dict[int, list[Sequence]] = {}
        sequences = self._label(metadata[self.records.name], requests)
        self._copies.begin(sequences)
        for sequence in sequences:
            by_plan.setdefault(id(sequence.plan), []).append(sequence)
        self._passes = [PagedPass(some[0].plan, some) for some in by_plan.values()]
        if self.counters is not None:
            made = [sequence for flow in self._passes for sequence in flow.sequences]
            self.counters.add(
                bridged_tokens=sum(record[Field.ACTIVE] for one in made for record in one.made),
                injections=sum(len(one.triggers) for one in made),
            )

    def _end(self, model: Any, args: Any, output: Any) -> None:
        self._passes = []

    def _rules_of(self, settings: StepFlowSettings) -> FlowRules:
        """Settings resolved against the model, for the heads of this rank."""
        key = repr(settings)
        if key not in self._rules:
            plan = FlowPlan.resolve(settings, {layer: number * self._size for layer, number in self._heads.items()})
            self._rules[key] = FlowRules(
                _of_rank(plan, self._heads, self._rank), vocabulary_of(settings, self.runner.vllm_config)
            )
        return self._rules[key]

    @functools.cached_property
    def _kernels(self) -> Any:
        """The kernels of the device, which decide the form; None for that of the host."""
        return kernels_for(self._layers.values(), self.runner.dtype, self.records.kv_cache.device)

    @functools.cached_property
    def _counts(self) -> DeviceCounts:
        return DeviceCounts(self.records.kv_cache.device, self.counters)

    def _label_there(self, where: RecordMetadata, requests: int) -> list[DevicePass]:
        """Labels the tokens of a pass on the device, in one launch for all requests with the same settings.

        Raises:
            RuntimeError: A record was lost in an earlier pass.
        """
        if self._counts.lost:
            raise RuntimeError(self._lost("a request", self._counts.lost))
        passes = []
        for rules, on, openings in self._switched(requests):
            flow = DevicePass(
                rules.plan,
                self._kernels,
                self.records.kv_cache,
                where.table,
                where.starts_there[: requests + 1],
                where.lengths[:requests],
                where.longest,
                on,
            )
            flow.label(rules, self.runner.input_ids.gpu, openings, self._counts.sums)
            passes.append(flow)
        if passes:
            self._counts.send()
        return passes

    def _switched(self, requests: int) -> list[tuple[FlowRules, Tensor, Tensor | None]]:
        """The rules in a pass; which requests each is for, int32 [R]; and where implicit thinking starts in them.

        Most passes have the requests of the one before, and then the tensors are the same.
        """
        rows = [self._request(row) for row in range(requests)]
        chosen = [self.settings.chosen(row.sampling_params) for row in rows]
        rules = [None if settings is None else self._rules_of(settings) for settings in chosen]
        prompts = [row.num_prompt_tokens for row in rows]
        key = [*map(id, rules), *prompts]
        if self._switches[0] != key:
            found = []
            for one in {id(one): one for one in rules if one is not None}.values():
                openings = self._there(prompts) if one.plan.settings.implicit_thinking else None
                found.append((one, self._there([int(other is one) for other in rules]), openings))
            self._switches = key, found
        return self._switches[1]

    def _there(self, numbers: list[int]) -> Tensor:
        """Numbers as int32 on the device, by a copy that nobody waits for."""
        device = self.records.kv_cache.device
        tensor = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
        return tensor.to(device, non_blocking=True)

    def _label(self, where: RecordMetadata, requests: int) -> list[Sequence]:
        """The sequences with StepFlow, labelled and with their records written."""
        starts = where.starts[: requests + 1].tolist()
        rules = {}
        for row in range(requests):
            settings = self.settings.chosen(self._request(row).sampling_params)
            if settings is not None and starts[row] < starts[row + 1]:
                rules[row] = self._rules_of(settings)
        if not rules:
            return []
        lengths = where.lengths[:requests].tolist()
        ids = self.runner.input_ids.gpu[: starts[-1]].tolist()
        firsts = {row: lengths[row] - (starts[row + 1] - starts[row]) for row in rules}
        before = self._before(where, [(row, first) for row, first in firsts.items() if first])
        sequences = []
        for row, own in rules.items():
            first, start, end = firsts[row], starts[row], starts[row + 1]
            made = own.vocabulary.scan(
                ids[start:end], before.get(row), start=first, prompt_length=self._request(row).num_prompt_tokens
            )
            name = self.runner.input_batch.req_ids[row]
            sequences.append(Sequence(own.plan, name, row, start, end, first, made, self.records, where.table))
        records = torch.tensor(
            [record for one in sequences for record in one.made], dtype=torch.int32, device=where.slots.device
        )
        slots = where.slots[: starts[-1]]
        if len(records) < len(slots):
            slots = torch.cat([slots[one.start : one.end] for one in sequences])
        self.records.write(slots, records)
        return sequences

    def _before(self, where: RecordMetadata, wanted: list[tuple[int, int]]) -> dict[int, list[int]]:
        """The records before the first tokens of some requests.

        Raises:
            RuntimeError: One was lost.
        """
        if not wanted:
            return {}
        rows, firsts = torch.tensor(wanted, device=where.table.device).T
        known = self.records.read(where.table, rows, firsts - 1).tolist()
        found = {row: record for (row, _), record in zip(wanted, known, strict=True)}
        for row, first in wanted:
            if found[row][Field.COUNT] != first:
                name = self.runner.input_batch.req_ids[row]
                raise RuntimeError(self._lost(f"request {name!r}", first))
        return found

    def _lost(self, request: str, first: int) -> str:
        return (
            f"StepFlow's records of {request} were lost: token {first} does not follow a record of the token before. "
            f"Blocks of the cache were moved without the layer {self.records.name!r}; turn that off, or start the "
            "engine without StepFlow."
        )

    def _request(self, row: int) -> Any:
        return self.runner.requests[self.runner.input_batch.req_ids[row]]

    def _attend(self, layer: int, module: Any, run: Any, own: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention of one layer in place of its implementation's forward."""
        form: Any = attention if self._kernels is None else device_attention
        for flow in self._passes:
            gamma = flow.plan.gamma.get(layer)
            if gamma is not None:
                query = form.scaled_query(flow, query, gamma, module.sliding_window)
        result = run(own, query, *args, **kwargs)
        keys = None
        for flow in self._passes:
            tau = flow.plan.tau.get(layer) if flow.bridged else None
            is_injected = layer in flow.plan.inject and flow.injected
            if tau is None and not is_injected:
                continue
            output = kwargs["output"] if "output" in kwargs else args[4]
            keys = keys or LayerKeys(layer, self._cache(layer, module), self._copies, args[0], args[1])
            if tau is not None:
                form.bridge(flow, module, tau, query, keys, output)
            if is_injected:
                form.inject(flow, module, keys, output)
        return result

    def _cache(self, layer: int, module: Any) -> LayerCache:
        """Keys and values of a layer in this pass."""
        if layer not in self._readers:
            self._readers[layer] = reader_for(module)
        table = get_forward_context().attn_metadata[module.layer_name].block_table
        return LayerCache(module, self._readers[layer], table)


def attention_layers(model: torch.nn.Module) -> dict[int, Attention]:
    """The attention layers of a model of vLLM, by index.

    Raises:
        StepFlowUnsupportedError: It has none, or others besides that StepFlow cannot reach.
    """
    found: dict[int, Attention] = {}
    for module in model.modules():
        if type(module).__name__ == "MLAAttention":
            raise StepFlowUnsupportedError(
                f"{type(model).__name__} has latent attention (MLA), whose cache holds no values that StepFlow could "
                "inject",
                hint="run this model in transformers, where StepFlow supports it",
            )
        if not isinstance(module, Attention) or module.attn_type != "decoder":
            continue
        if type(module) is not Attention or getattr(module.impl, "alibi_slopes", None) is not None:
            raise StepFlowUnsupportedError(
                f"{type(model).__name__} has attention that StepFlow does not compute: {type(module).__name__}"
                + (" with ALiBi" if type(module) is Attention else ""),
                hint="run this model in transformers",
            )
        layer = extract_layer_index(module.layer_name)
        if layer in found:
            raise StepFlowUnsupportedError(
                f"{type(model).__name__} has two attention layers at index {layer}, so bands of layers mean nothing",
                hint="start the engine without StepFlow",
            )
        found[layer] = module
    if not found:
        raise StepFlowUnsupportedError(
            f"{type(model).__name__} has no decoder attention of vLLM's Attention layer, so StepFlow cannot reach it",
            hint="docs/serving.md lists the architectures",
        )
    return dict(sorted(found.items()))


def _of_rank(plan: FlowPlan, heads: dict[int, int], rank: int) -> FlowPlan:
    """The plan for the heads of one tensor-parallel rank."""

    def own(table: dict[int, Any]) -> dict[int, Any]:
        return {
            layer: value if isinstance(value, float) else value[rank * heads[layer] : (rank + 1) * heads[layer]]
            for layer, value in table.items()
        }

    return FlowPlan(plan.settings, plan.layers, own(plan.tau), plan.inject, own(plan.gamma))
