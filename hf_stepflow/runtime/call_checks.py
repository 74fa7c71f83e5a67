"""Calls that StepFlow cannot honour, refused with what to do instead."""

from typing import Any

from transformers import PreTrainedModel

from .errors import StepFlowInputError, StepFlowUnsupportedError


def no_constructor(config: Any) -> StepFlowUnsupportedError:
    """The error for building a model from a preset's config."""
    base = getattr(config, "base_model_name_or_path", None)
    return StepFlowUnsupportedError(
        "a StepFlow model is not made from a config: a preset holds settings for a base model"
        + (f" ({base})" if base else "")
        + ", no weights",
        hint="use AutoModelForCausalLM.from_pretrained on the preset's repository, or StepFlowModelForCausalLM.attach "
        "on a model",
    )


def no_continuous_batching() -> StepFlowUnsupportedError:
    """The error for continuous batching."""
    return StepFlowUnsupportedError(
        "StepFlow cannot follow continuous batching: it packs the tokens of many requests into one row",
        hint="use generate(), or call inside `with model.disable_stepflow():`",
    )


def no_other_attention(asked: Any, base: str) -> StepFlowUnsupportedError:
    """The error for another attention implementation under StepFlow."""
    return StepFlowUnsupportedError(
        f"the attention implementation cannot become {asked} while StepFlow is attached on {base!r}",
        hint="call detach_stepflow(), set it, and attach again",
    )


def check_model(model: Any) -> None:
    """Refuses what wraps a model, before anything is changed."""
    if not isinstance(model, PreTrainedModel):
        raise StepFlowUnsupportedError(
            f"StepFlow is put on a Transformers model, got {type(model).__name__}",
            hint="attach to the model inside (of PEFT, model.get_base_model()), or before it is wrapped or compiled",
        )


def check_prompt(ids: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a prompt that steps cannot be found in.

    Args:
        ids: its token ids, None where there are none.
        kwargs: of the call of `generate`.
    """
    if kwargs.get("cache_implementation") == "paged":
        raise no_continuous_batching()
    if ids is None:
        if kwargs.get("inputs_embeds") is not None:
            raise StepFlowInputError(
                "StepFlow reads steps from token ids, but generate was given inputs_embeds",
                hint="pass input_ids, or stepflow=False",
            )
        return
    if ids.numel() == 0:
        raise StepFlowInputError(
            f"the prompt is empty (input_ids of shape {list(ids.shape)})", hint="pass at least one token a row"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.any(-1).all()):
        rows = (~mask.bool().any(-1)).nonzero().flatten().tolist()
        raise StepFlowInputError(
            f"rows {rows} of the prompt are padding only", hint="drop them, or put at least one token into each"
        )
