"""Checks that run in processes of their own: mathematics by math-verify, and the programs that a model wrote.

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

from hf_stepflow.runtime.errors import StepFlowInputError

SECONDS = 10.0  # for each comparison, and for each test of a program

# The worker is a string, so that the process imports nothing of the caller's, not even the main module again.
_WORKER = """
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


class _Mathematics:
    """The process that compares expressions; it starts when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def same(self, right: str, given: str) -> bool:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([right, given]) + "\n")
                process.stdin.flush()
                return bool(json.loads(self._answers.get(timeout=SECONDS)))
            except (queue.Empty, OSError, json.JSONDecodeError):
                self.stop()
                return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._answers = queue.Queue()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
            self._answers.get(timeout=120)  # its imports take a while
        return self._process


def _forward(lines: Iterable[str], answers: "queue.Queue[str]") -> None:
    """Puts each line into the queue, and an empty one at the end."""
    with contextlib.suppress(ValueError):  # the pipe was closed
        for line in lines:
            answers.put(line)
    answers.put("")


_MATHEMATICS = _Mathematics()
atexit.register(_MATHEMATICS.stop)


def same_mathematics(right: str, given: str) -> bool:
    """Whether two LaTeX expressions are equal; False if math-verify cannot say so within `SECONDS`."""
    demand_math_verify()
    return _MATHEMATICS.same(right, given)


def demand_math_verify(kinds: Iterable[str] = ("math",)) -> None:
    """Raises StepFlowInputError if problems of these kinds need math-verify and it is not installed."""
    # An answer to a `number` is compared as mathematics if it is no plain number.
    if {"math", "number"}.intersection(kinds) and find_spec("math_verify") is None:
        raise StepFlowInputError(
            "comparing mathematics needs math-verify, which is not installed", hint="pip install 'hf-stepflow[eval]'"
        )


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
