"""Finds out before a run what `hf-stepflow calibrate` was not given: problems, length of responses, batch size."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_stepflow.calibration.probe import (
    MOST,
    PROBED,
    Probe,
    decoding_speed,
    find_batch_size,
    suggest_sources,
)
from hf_stepflow.calibration.work_folder import read_setup, write_setup
from hf_stepflow.evaluation.progress import announce
from hf_stepflow.runtime.errors import StepFlowInputError

# Tokens of a response where no right one is known, and the share by which others may be longer than the longest trace.
_TOKENS, _ROOM = 2048, 1.25

# The batch size where it is not measured: with another engine, or several processes.
_BATCH = 16

# Problems for a probe are drawn from here on, beyond those of the run.
_START = 1_000_000


class Setup:
    """Finds what the command line leaves open, once: the work folder keeps it, so that a stopped run continues.

    Args:
        args: The arguments of the command.
        model: The model, without StepFlow.
        tokenizer: The model's tokenizer.
        settings: The settings to read responses by; None for the rule.
        work: The work folder.
    """

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any, settings: Any, work: Path):
        self._args, self._model, self._tokenizer, self._settings, self._work = args, model, tokenizer, settings, work
        self._known = read_setup(work)
        self._is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def problems(self) -> list[str]:
        """Returns sources of problems that the model solves 20 to 80 % of the time.

        Raises:
            StepFlowInputError: Several processes share the run, or the generator of the suite is not installed.
        """
        if "problems" not in self._known:
            if self._is_shared:
                raise StepFlowInputError(
                    "problems are looked for by one process, and several share this run", hint="pass --problems"
                )
            announce(f"Looking for problems that the model solves 20 to 80 % of the time, {PROBED} at a time.")
            found, tried = suggest_sources(_families(self._args.model), self._probe)
            self._keep(problems=found, probes=[str(one) for one in tried])
            announce(f"Problems: {', '.join(found)}.")
        return list(self._known["problems"])

    def max_new_tokens(self, problems: Sequence[Any]) -> int:
        """Returns the tokens that a response may have: as the longest trace and a quarter, or as many as fit."""
        from hf_stepflow.prompts import encode_prompt, encode_response

        traces = [one.trace for one in problems]
        if all(trace is not None for trace in traces):
            return int(_ROOM * max(len(encode_response(self._tokenizer, trace)) for trace in traces))
        room = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(len(encode_prompt(self._tokenizer, one.prompt)) for one in problems)
        return _TOKENS if room is None else max(1, min(_TOKENS, room - longest))

    def batch_size(self, problems: Sequence[Any], max_new_tokens: int) -> int:
        """Returns the batch size with which the model writes fastest."""
        from hf_stepflow.prompts import encode_prompt

        if self._is_shared or self._args.engine != "transformers":
            return _BATCH
        if "batch_size" not in self._known:
            prompts = [encode_prompt(self._tokenizer, one.prompt) for one in problems[:MOST]]
            length = max(map(len, prompts)) + max_new_tokens
            decoding_speed(self._model, prompts, 1, length)  # the first call prepares what later ones use
            size, tried, reason = find_batch_size(
                lambda rows: decoding_speed(self._model, prompts, rows, length), min(MOST, len(problems) // 2)
            )
            speeds = ", ".join(f"{rows}: {speed:,.0f}" for rows, speed in tried)
            announce(f"Batch size {size} ({reason}); tokens/s by size: {speeds}.")
            self._keep(batch_size=size, speeds=[list(one) for one in tried])
        return int(self._known["batch_size"])

    def _probe(self, source: str) -> Probe:
        from hf_stepflow.evaluation.run import evaluate
        from hf_stepflow.evaluation.sampler import prepared
        from hf_stepflow.presets.preset import rule_preset
        from hf_stepflow.problems import load_problems, reasoner_problems

        level = source.removeprefix("reasoner:")
        if level != source:
            problems = reasoner_problems(level, PROBED, "calibration", _START)
        else:
            problems = load_problems(source, PROBED, split="calibration", seed=self._args.seed + _START)
        tokens = self._args.max_new_tokens or self.max_new_tokens(problems)
        settings = rule_preset(self._model).settings if self._settings is None else self._settings
        with prepared(self._model, self._tokenizer, settings, attach=True):
            result = evaluate(
                self._model,
                problems,
                {"base": False},
                tokenizer=self._tokenizer,
                batch_size=PROBED,
                max_new_tokens=tokens,
                run_code=self._args.run_code,
                progress=False,
                check=False,
            )
        one = Probe(source, sum(row["right"] for row in result.results), PROBED)
        announce(f"  {one}")
        return one

    def _keep(self, **found: Any) -> None:
        self._known |= found
        write_setup(self._work, self._known)


def _families(model: str) -> list[list[str]]:
    """Levels of the reasoner for the reasoner, tasks of the suite for other models; each ascending in difficulty."""
    from hf_stepflow.evaluation.suite import LENGTHS, SUITE
    from hf_stepflow.reasoner.levels import LEVELS

    if model != "reasoner":
        return [[f"stepflow-suite:{task}@{length}" for length in LENGTHS] for task in SUITE]
    families: dict[str, list[str]] = {}
    for level in LEVELS:
        families.setdefault(level.partition("-")[0], []).append(f"reasoner:{level}")
    return list(families.values())
