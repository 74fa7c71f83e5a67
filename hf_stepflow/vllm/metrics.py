"""Metrics of StepFlow for users of a server: counters in `GET /metrics`, and a line in vLLM's log.

vLLM loads this class by the entry point group `vllm.stat_logger_plugins`, for every engine that logs statistics.
"""

from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from .counters import NAMES
from .engine import counters_in, settings_in

logger = init_logger("vllm.stepflow")


class StepFlowStatLogger(StatLoggerBase):
    """Logs the counts of an engine, and shows them to Prometheus as `vllm:stepflow_requests_total` and so on.

    Where several API servers share an engine (`--api-server-count`), Prometheus reads files that only vLLM's own
    metrics write, so the counts are in the log alone.

    Args:
        vllm_config: The engine's config.
        engine_index: The engine among those of a server; the first one shows the counts of all.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        counters = counters_in(vllm_config, 0) if engine_index == 0 else None
        self._counters, self._settings = counters, settings_in(vllm_config)
        self._shown: dict[str, int] = {}
        if counters is not None:
            _Collector.show(self)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: workers count."""

    def log_engine_initialized(self) -> None:
        """Logs the settings in force."""
        if self._counters is not None:
            own = None if self._settings is None else self._settings.own
            told = {} if own is None else {name: value for name, value in own.to_dict().items() if value is not None}
            logger.info("StepFlow: %s", told or "only in requests that bring settings")

    def log(self) -> None:
        """Logs the counts if they have grown."""
        found = self.counts()
        if found != self._shown:
            self._shown = found
            logger.info("StepFlow: %s", ", ".join(f"{name.replace('_', ' ')}: {found[name]}" for name in found))

    def counts(self) -> dict[str, int]:
        """The counts, empty where the engine runs without StepFlow."""
        return {} if self._counters is None else self._counters.read()


class _Collector:
    """Answers Prometheus' registry, which outlives engines, with the counts of the last one."""

    _shown: "StepFlowStatLogger | None" = None
    _known: "_Collector | None" = None

    @classmethod
    def show(cls, of: StepFlowStatLogger) -> None:
        cls._shown = of
        if cls._known is None:
            cls._known = cls()
            REGISTRY.register(cls._known)

    def collect(self) -> Any:
        counts = {} if self._shown is None else self._shown.counts()
        for name, count in counts.items():
            yield CounterMetricFamily(f"vllm:stepflow_{name}", NAMES[name], value=count)
