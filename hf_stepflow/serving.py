"""The server of transformers, with StepFlow on the one model that it serves and a switch for each request.

`transformers serve` finds a model by name and knows no settings of StepFlow. Here the model is loaded already, and the
request bodies of the OpenAI-compatible routes have one field more, `stepflow`: true, false, or an object of settings
that is merged over those of the server.
"""

import inspect
import time
from importlib import import_module
from typing import Any

from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError

FIELD = "stepflow"
# Arguments of transformers' `build_server`: the module and the class that each one needs. Releases have more or fewer.
_HANDLERS = {
    "chat_handler": ("chat_completion", "ChatCompletionHandler"),
    "completion_handler": ("completion", "CompletionHandler"),
    "response_handler": ("response", "ResponseHandler"),
    "systemone_handler": ("systemone", "SystemOneHandler"),
    "transcription_handler": ("transcription", "TranscriptionHandler"),
}
# Those that generate text, whose requests may have the field.
_SWITCHED = ("chat_handler", "completion_handler", "response_handler")


def build_app(model: Any, tokenizer: Any, name: str) -> Any:
    """Builds the server for one model.

    Args:
        model: A model with StepFlow attached.
        tokenizer: Its tokenizer.
        name: What requests call the model.

    Returns:
        A FastAPI application with the routes of `transformers serve`.

    Raises:
        ModuleNotFoundError: A package of the extra `serve` is missing.
        StepFlowInputError: StepFlow is not attached to the model.
    """
    import fastapi
    import openai  # noqa: F401  transformers defines its handlers only if all of these are there
    import pydantic  # noqa: F401
    import uvicorn  # noqa: F401
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    if getattr(model, "stepflow_runtime", None) is None:
        raise StepFlowInputError(
            "StepFlow is not attached to the model", hint="StepFlowModelForCausalLM.attach(model)"
        )
    manager, state = _manager(model, tokenizer, name), GenerationState()
    handlers = {"model_manager": manager, "generation_state": state}
    wanted = inspect.signature(build_server).parameters
    for argument, (module, kind) in _HANDLERS.items():
        if argument in wanted:
            found = getattr(import_module(f"transformers.cli.serving.{module}"), kind)
            handlers[argument] = (_switched(found) if argument in _SWITCHED else found)(manager, state)
    app = build_server(**handlers)

    @app.exception_handler(StepFlowError)
    async def refuse(request: Any, error: StepFlowError) -> Any:
        return fastapi.responses.JSONResponse({"detail": _text(error)}, status_code=422)

    return app


def _manager(model: Any, tokenizer: Any, name: str) -> Any:
    """A model manager of transformers that has loaded its one model."""
    from transformers.cli.serving.model_manager import ModelManager

    class OneModel(ModelManager):
        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": started, "owned_by": "hf-stepflow"}]

    started = int(time.time())
    return OneModel(device="cpu", force_model=name)


def _switched(handler: type) -> type:
    """A handler of transformers whose requests may have the field `stepflow`."""

    class Switched(handler):
        def _validate_request(self, body: dict[str, Any]) -> Any:
            return super()._validate_request({key: value for key, value in body.items() if key != FIELD})

        def _resolve_model(self, body: dict[str, Any]) -> Any:
            found = super()._resolve_model(body)
            check_switch(found[1], body.get(FIELD))
            return found

        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config(body, *args, **kwargs)
            if body.get(FIELD) is not None:
                setattr(config, FIELD, body[FIELD])
            return config

    return Switched


def check_switch(model: Any, asked: Any) -> None:
    """Checks the field `stepflow` of a request.

    Args:
        model: The model with StepFlow attached.
        asked: The value of the field; None where there is none.

    Raises:
        StepFlowInputError: It is neither a boolean nor an object.
        StepFlowConfigError: The object holds an unknown setting, or one that does not fit the model.
    """
    if asked is None or isinstance(asked, bool):
        return
    if not isinstance(asked, dict):
        raise StepFlowInputError(
            f"the field {FIELD!r} of the request is {str(asked)[:60]!r}, expected true, false or an object",
            hint='for instance "stepflow": false, or "stepflow": {"tau_max": 0.1}',
        )
    runtime = model.stepflow_runtime
    runtime.rules_for(runtime.settings.replace(**asked))


def _text(error: StepFlowError) -> str:
    return f"{FIELD}: {error.message}" + (f" ({error.hint})" if error.hint else "")
