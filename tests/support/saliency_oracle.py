"""The naive float64 oracle of Step-Saliency: dense attention, autograd, and loops over token pairs."""

import copy
import math

import torch
from torch import Tensor

from hf_stepflow.runtime.trace import Trace
from tests.support.oracles import OracleSettings, OracleTrace, _registered, oracle_groups, oracle_previous_step


class SaliencyOracle:
    """Token-level saliency of one trace (docs/method.md, "Step-Saliency"), on a float64 copy of the model.

    Args:
        model: a causal language model without StepFlow.
        settings: StepFlow's, for the maps of an intervened model; None for the model as it is.
    """

    NAME = "naive_float64_saliency"

    def __init__(self, model, settings: OracleSettings | None = None):
        self.model = copy.deepcopy(model).double().eval()
        self.settings = settings
        self.trace: OracleTrace | None = None
        self.weights: dict[int, Tensor] = {}

    def __call__(
        self, ids: list[int], loss, trace: OracleTrace | None = None, measure: str = "saliency"
    ) -> dict[int, Tensor]:
        """|A * dL/dA|, A or -A * dL/dA of each layer and head, {layer: [H, T, T]}.

        Args:
            ids: the trace's token ids.
            loss: the loss as a function of the logits [T, V].
            trace: its labels, where StepFlow is on.
            measure: "saliency", "attention" or "signed".
        """
        self.trace, self.weights = trace, {}
        with _registered(self.NAME, self._attention):
            self.model.set_attn_implementation(self.NAME)
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        loss(logits).backward()
        found = {
            "saliency": lambda one: (one * one.grad).abs(),
            "attention": lambda one: one,
            "signed": lambda one: -one * one.grad,
        }[measure]
        return {layer: found(one)[0].detach() for layer, one in self.weights.items()}

    def _attention(
        self,
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        softcap=None,
        s_aux=None,
        position_bias=None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        layer, (_, heads, length, width) = int(module.layer_idx), query.shape
        key, value = (one.repeat_interleave(heads // one.shape[1], 1) for one in (key, value))
        logits = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if position_bias is not None:
            logits = logits + position_bias
        visible = attention_mask[..., :length, :length].expand(1, heads, length, length)
        logits = logits.masked_fill(~visible, -math.inf)
        if s_aux is not None:
            sinks = s_aux.double().view(1, heads, 1, 1).expand(1, heads, length, 1)
            weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        weights = self._bridged(layer, weights, visible)
        weights.retain_grad()
        self.weights[layer] = weights
        output = weights @ value
        return self._injected(layer, output, value, visible).transpose(1, 2).contiguous(), None

    def _bridged(self, layer: int, weights: Tensor, visible: Tensor) -> Tensor:
        settings = self.settings
        if settings is None or layer not in settings.oeb_layers:
            return weights
        assert settings.bridge_floor == "share"
        rows = []
        for query in range(weights.shape[2]):
            groups = oracle_groups(self.trace, settings, query)
            for head in range(weights.shape[1]):
                row = weights[0, head, query]
                chosen = settings.oeb_heads is None or head in settings.oeb_heads.get(layer, [])
                if groups is not None and chosen:
                    same, bridge = ([slot for slot in group if visible[0, head, query, slot]] for group in groups)
                    if same and bridge:
                        row = self._project(row, same, bridge)
                rows.append(row)
        shape = weights.shape
        return torch.stack(rows).view(shape[2], shape[1], shape[3]).transpose(0, 1)[None]

    def _project(self, row: Tensor, same: list[int], bridge: list[int]) -> Tensor:
        tau = min(math.sqrt(len(bridge) / (len(bridge) + len(same))), self.settings.tau_max)
        in_same, in_bridge = row[same].sum(), row[bridge].sum()
        if in_bridge.item() >= tau * (in_same + in_bridge).item():
            return row
        factor = torch.ones_like(row)
        factor[same] = (1 - tau) * (in_same + in_bridge) / in_same
        factor[bridge] = tau * (in_same + in_bridge) / in_bridge
        return row * factor

    def _injected(self, layer: int, output: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        settings = self.settings
        if settings is None or layer not in settings.smi_layers or settings.alpha == 0.0:
            return output
        addition = torch.zeros_like(output)
        for query in range(output.shape[2]):
            slots = oracle_previous_step(self.trace, settings, query)
            slots = [slot for slot in slots if visible[0, 0, query, slot]]
            if slots:
                addition[:, :, query] = settings.alpha * value[:, :, slots].mean(2)
        return output + addition


def oracle_map(tokens: Tensor, trace: Trace, pooling: str) -> Tensor:
    """Step-level means [S, S] of token-level saliency [T, T], pair by pair."""
    steps = [[slot for slot in range(step.start, step.end) if trace.step_ids[slot] >= 0] for step in trace.steps]
    pooled = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for i, rows in enumerate(steps):
        for j, columns in enumerate(steps):
            pairs = [(t, k) for t in rows for k in columns if pooling == "block" or k <= t]
            if pairs:
                pooled[i, j] = math.fsum(float(tokens[pair]) for pair in pairs) / len(pairs)
    return pooled
