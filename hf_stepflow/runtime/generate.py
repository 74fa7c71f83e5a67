"""StepFlow for one call of any loaded model, as a repository for `generate(custom_generate=...)` brings it."""

import threading
from typing import Any
from weakref import WeakKeyDictionary

from .modeling_stepflow import StepFlowModelForCausalLM

# Calls on one model take turns, since each changes it; a tokenizer that had to be loaded is loaded once.
_LOCKS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_TOKENIZERS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_MAKING_LOCKS = threading.Lock()


def generate(model: Any, inputs: Any = None, stepflow: Any = None, tokenizer: Any = None, **kwargs: Any) -> Any:
    """Generates with StepFlow on a model, and leaves the model as it was.

    Calls on one model take turns; other threads may call the model's own `generate` meanwhile, without StepFlow.

    Args:
        model: Any model that StepFlow runs on. A model that has StepFlow already keeps it, and a dict is merged over
            its settings.
        inputs: Token ids, as for `model.generate`.
        stepflow: Settings of this call, as for `StepFlowModelForCausalLM.attach`; False turns StepFlow off.
        tokenizer: The model's; None loads it from the model's own path.
        **kwargs: Passed on to `model.generate`.

    Raises:
        StepFlowError: As `attach` and the `generate` of an attached model.
    """
    with _MAKING_LOCKS:
        lock = _LOCKS.setdefault(model, threading.RLock())
    if tokenizer is not None:
        kwargs["tokenizer"] = tokenizer  # generation stops at strings with it
    with lock:
        if getattr(model, "stepflow_runtime", None) is not None:
            return type(model).generate(model, inputs, stepflow=stepflow, **kwargs)
        if stepflow is False:
            return type(model).generate(model, inputs, **kwargs)
        known = tokenizer if tokenizer is not None else _TOKENIZERS.get(model)
        StepFlowModelForCausalLM._put_on(model, None if stepflow is True else stepflow, known, is_on=False)
        try:
            runtime = model.stepflow_runtime
            if tokenizer is None:
                _TOKENIZERS[model] = runtime.tokenizer
            with runtime.override(runtime.rules):
                return type(model).generate(model, inputs, **kwargs)
        finally:
            model.detach_stepflow()
