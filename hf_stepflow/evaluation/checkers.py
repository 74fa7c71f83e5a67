"""Checks that run in processes of their own: math-verify, the verifiers of generators, and programs of a model.

A model may write a tower of powers, which takes all time and memory to read, and which no exception ends.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

_STARTING = 120.0  # seconds for a process to start
_MAKING = 600.0  # seconds for a generator to make a problem, or all of a data set
# What an interpreter may need of the environment; the rest may hold secrets, and some parsers evaluate answers.
_KEPT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")
SECONDS = 10.0  # for each comparison, and for each test of a program

# The worker is a string, so that the process imports nothing of the caller's, not even the main module again.
_MATHEMATICS_WORKER = """
import json, sys, warnings
warnings.simplefilter("ignore")
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
except (ImportError, ValueError, OSError):
    pass
import math_verify
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        gold, given = (math_verify.parse("\\\\boxed{" + text + "}", parsing_timeout=None) for text in json.loads(line))
        same = bool(math_verify.verify(gold, given, timeout_seconds=None))
    except (Exception, MemoryError):
        same = False
    print(json.dumps(same), flush=True)
"""


# Makes and judges the problems of generators. Some depend on the order of sets, which PYTHONHASHSEED fixes; one prints
# dots, which are no reply; and verifiers read answers by parsers that may evaluate them.
_GENERATOR_WORKER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
except (ImportError, ValueError, OSError):
    pass
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import reasoning_gym
print(json.dumps("ready"), file=replies, flush=True)
data_sets, entries = {}, {}
for line in sys.stdin:
    name, arguments, index, answer = json.loads(line)
    try:
        key = json.dumps([name, arguments])
        if key not in data_sets:
            data_sets[key] = reasoning_gym.create_dataset(name, **arguments)
        if (key, index) not in entries:
            entries[key, index] = data_sets[key][index]
        entry = entries[key, index]
        if answer is None:
            reply = {"question": str(entry["question"]), "answer": entry["answer"]}
            if not isinstance(reply["answer"], str):
                reply["answer"] = None
    except (Exception, MemoryError) as error:
        reply = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    else:
        if answer is not None:
            try:  # a verifier may pay in part for an answer that is close
                reply = float(data_sets[key].score_answer(answer=answer, entry=entry)) > 1 - 1e-6
            except (Exception, MemoryError):
                reply = False
    print(json.dumps(reply), file=replies, flush=True)
"""


class _Worker:
    """A process that answers one line of JSON by another; it starts when it is first needed."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def ask(self, question: Any, seconds: float | None = None) -> Any:
        """Returns its answer; None, and the process is ended, if it takes longer than some seconds."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                return json.loads(self._answers.get(timeout=SECONDS if seconds is None else seconds))
            except (queue.Empty, OSError, json.JSONDecodeError):
                self.stop()
                return None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._answers = queue.Queue()
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={name: os.environ[name] for name in _KEPT if name in os.environ} | {"PYTHONHASHSEED": "0"},
            )
            threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
            self._answers.get(timeout=_STARTING)  # its imports take a while
        return self._process


def _forward(lines: Iterable[str], answers: "queue.Queue[str]") -> None:
    """Puts each line into the queue, and an empty one at the end."""
    with contextlib.suppress(ValueError):  # the pipe was closed
        for line in lines:
            answers.put(line)
    answers.put("")


_MATHEMATICS, _GENERATORS = _Worker(_MATHEMATICS_WORKER), _Worker(_GENERATOR_WORKER)
atexit.register(_MATHEMATICS.stop)
atexit.register(_GENERATORS.stop)


def same_mathematics(right: str, given: str) -> bool:
    """Whether two LaTeX expressions are equal; False if math-verify cannot say so within `SECONDS`."""
    demand_math_verify()
    return _MATHEMATICS.ask([right, given]) is True


def demand_math_verify(kinds: Iterable[str] = ("math",)) -> None:
    """Raises StepFlowInputError if problems of these kinds need math-verify and it is not installed."""
    # An answer to a `number` is compared as mathematics if it is no plain number.
    if {"math", "number"}.intersection(kinds) and find_spec("math_verify") is None:
        raise StepFlowInputError(
            "comparing mathematics needs math-verify, which is not installed", hint="pip install 'hf-stepflow[eval]'"
        )


def make_problem(name: str, arguments: dict[str, Any], index: int) -> dict[str, Any]:
    """Makes a problem of reasoning-gym, the same in every process.

    Args:
        name: The generator.
        arguments: The arguments of its data set, JSON-ready.
        index: The index of the problem in the data set.

    Returns:
        `question` and `answer`, which is None where there is no single right one; or the generator's `error`.
    """
    made = _GENERATORS.ask([name, arguments, index, None], _MAKING)
    return {"error": f"it made no problem within {_MAKING:.0f} seconds"} if made is None else made


def satisfies_verifier(verifier: str, answer: str) -> bool:
    """Whether the verifier of a problem's own generator gives an answer full marks within `SECONDS`.

    Args:
        verifier: The place of the problem in its generator, as JSON: `generator`, `arguments` and `index`.
        answer: The answer.

    Raises:
        StepFlowInputError: The generator does not make the problem again.
    """
    place = json.loads(verifier)
    name, arguments, index = place["generator"], place["arguments"], place["index"]
    made = make_problem(name, arguments, index)  # which may take longer than to judge it
    if "error" in made:
        raise StepFlowInputError(
            f"the generator {name!r} did not make this problem again, so it cannot be judged: {made['error']}",
            hint="pip install 'hf-stepflow[eval]' with the release that drew the problems",
        )
    return _GENERATORS.ask([name, arguments, index, answer]) is True


# These limits stop mistakes; a program that means harm needs a machine of its own.
_LIMITED = """
import runpy, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
except ImportError:
    pass
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def passes(tests: str, program: str) -> bool:
    """Whether a program writes the expected output for every test, up to blanks.

    Each test runs in a new process without this one's environment, with limits on time, memory and output.

    Args:
        tests: Pairs of input and expected output, as JSON; without any, no program passes.
        program: Python source.
    """
    pairs = json.loads(tests)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        return bool(pairs) and all(_output(path, given) == expected.split() for given, expected in pairs)


def _output(path: Path, given: str) -> list[str] | None:
    """The words that a program writes; None if it fails or takes too long."""
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED, str(path)],
            stdin=subprocess.PIPE,
            stdout=written,
            stderr=subprocess.DEVNULL,
            cwd=path.parent,
            env={"PATH": os.environ.get("PATH", "")},
            start_new_session=True,
        )
        try:
            process.communicate(given.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(OSError, AttributeError):  # ends its children too; all may be gone already
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
        written.seek(0)
        return None if process.returncode else written.read().decode(errors="replace").split()
