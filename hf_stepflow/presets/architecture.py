"""The fingerprint of a model's architecture, by which a preset is accepted or refused on a model."""

from dataclasses import dataclass
from typing import Any

from hf_stepflow.runtime.errors import StepFlowConfigError

_COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Architecture:
    """The parts of an architecture to which settings for layers and heads refer.

    Attributes:
        model_type: The model type of the decoder in transformers.
        num_hidden_layers: The number of layers, with or without attention.
        num_attention_heads: The number of query heads; None if the config states no single number.
        num_key_value_heads: The number of key-value heads; None if the config states no single number.
        attention_layers: The layers with softmax attention; None if all layers have it.
    """

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int | None
    num_key_value_heads: int | None
    attention_layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        heads = f", {self.num_attention_heads} query heads" if self.num_attention_heads is not None else ""
        shared = f", {self.num_key_value_heads} key-value heads" if self.num_key_value_heads is not None else ""
        some = "" if self.attention_layers is None else f" ({len(self.attention_layers)} with softmax attention)"
        return f"{self.model_type} with {self.num_hidden_layers} layers{some}{heads}{shared}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Architecture":
        """Reads the `architecture` object of a preset."""
        layers = data.get("attention_layers")
        return cls(**data | {"attention_layers": None if layers is None else tuple(layers)})

    def to_dict(self) -> dict[str, Any]:
        """Returns the `architecture` object of a preset."""
        data = dict(vars(self))
        layers = data.pop("attention_layers")
        return data if layers is None else data | {"attention_layers": list(layers)}

    @property
    def layers(self) -> list[int]:
        """The layers with softmax attention."""
        return list(range(self.num_hidden_layers) if self.attention_layers is None else self.attention_layers)

    def is_met_by(self, other: "Architecture", compare_layers: bool) -> bool:
        """Returns whether a model has this architecture.

        Args:
            other: The model's architecture.
            compare_layers: Whether `other` states which layers have softmax attention.
        """
        known = [name for name in _COUNTS if None not in (getattr(self, name), getattr(other, name))]
        same = self.model_type == other.model_type and all(
            getattr(self, name) == getattr(other, name) for name in known
        )
        return same and (not compare_layers or self.layers == other.layers)


def architecture_of(model: Any) -> Architecture:
    """Returns the architecture of a model or of a config.

    Args:
        model: A causal language model or its config. A config does not show which layers have softmax attention.

    Raises:
        StepFlowUnsupportedError: StepFlow does not support the model.
        StepFlowConfigError: The config states no number of layers.
    """
    config = getattr(model, "config", model)
    text = config.get_text_config(decoder=True)
    counts = {name: getattr(text, name, None) for name in _COUNTS}
    layers, heads, shared = (value if type(value) is int else None for value in counts.values())
    if layers is None:
        raise StepFlowConfigError(
            f"the config of {text.model_type} names no number of layers (num_hidden_layers is "
            f"{counts['num_hidden_layers']!r})",
            hint="pass settings instead of a preset",
        )
    found = None
    if is_model(model):
        from hf_stepflow.runtime.attention_interface import attention_modules

        found = tuple(attention_modules(model))
        found = None if found == tuple(range(layers)) else found
    return Architecture(text.model_type, layers, heads, heads if shared is None else shared, found)


def is_model(model: Any) -> bool:
    """Returns whether this is a model rather than its config."""
    return hasattr(model, "named_modules")
