"""The switch of a request, and the salt that keeps its cached prefix apart.

`SamplingParams(extra_args={"stepflow": False})`, over HTTP `"vllm_xargs": {"stepflow": false}`, turns StepFlow off for
one request. An engine that was started with `stepflow_requests` also takes an object of settings there, merged over
its own; other engines refuse it, since who runs a server chooses what it computes.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.settings import StepFlowSettings

FIELD = "stepflow"


@dataclass(frozen=True)
class EngineSettings:
    """The settings that an engine was started with.

    Attributes:
        own: Its settings, for requests that say nothing; None for the base model.
        takes_requests: Whether requests may bring settings.
    """

    own: StepFlowSettings | None
    takes_requests: bool = False

    def chosen(self, params: Any) -> StepFlowSettings | None:
        """The settings that a request runs with; None for the base model.

        Args:
            params: Its sampling parameters; a pooling request has none.
        """
        asked = None if params is None else (params.extra_args or {}).get(FIELD)
        if params is None or (asked is not None and not asked and not isinstance(asked, dict)):
            return None
        return (self.own or StepFlowSettings()).replace(**asked) if isinstance(asked, dict) else self.own

    def check(self, params: Any) -> None:
        """Checks the switch of a request.

        Args:
            params: Its sampling parameters.

        Raises:
            StepFlowInputError: It is neither true nor false, or asks for StepFlow where there is none.
            StepFlowConfigError: It holds settings that do not exist or have a wrong value.
        """
        asked = check_type(params, self.takes_requests)
        if isinstance(asked, dict):
            self.chosen(params)
        elif asked and self.own is None:
            raise StepFlowInputError(
                "a request asks for StepFlow, but this engine runs without it",
                hint='start it with --additional-config \'{"stepflow": "auto"}\'',
            )


def check_type(params: Any, takes_settings: bool = True) -> Any:
    """Checks that the switch of a request is one, whatever engine it is for, and returns it.

    Args:
        params: Its sampling parameters.
        takes_settings: Whether it may be an object of settings.

    Raises:
        StepFlowInputError: It is neither true nor false nor, where that is taken, an object.
    """
    asked = (getattr(params, "extra_args", None) or {}).get(FIELD)
    if asked is None or isinstance(asked, bool) or (takes_settings and isinstance(asked, dict)):
        return asked
    if isinstance(asked, int | float) and asked in (0, 1):  # as vLLM reads true and false over HTTP
        return asked
    raise StepFlowInputError(
        f"{FIELD!r} of a request is {str(asked)[:60]!r}, expected true or false",
        hint="settings belong to the engine: --additional-config '{\"stepflow\": {...}}'; one that is started with "
        '"stepflow_requests": true beside them takes an object of settings in requests',
    )


def salt(settings: StepFlowSettings, own: str | None) -> str:
    """The salt of a request's cached prefix: only requests with the same settings share keys.

    Args:
        settings: Its settings.
        own: The salt that the request brings, or None.
    """
    digest = hashlib.sha256(json.dumps(settings.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
    return f"stepflow-{digest}" if own is None else f"stepflow-{digest}-{own}"
