"""Comparison of mathematical expressions by math-verify, in a process that is ended when it takes too long.

What a model wrote may be a tower of powers: reading it takes for ever or all memory, and no exception ends that.
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

SECONDS = 10.0

# A program of its own, so that it needs nothing of the caller's: no path, no main module that is imported again.
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


class _Checker:
    """The process, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def same(self, right: str, given: str) -> bool:
        """Whether two expressions are equal; False where that cannot be told in time."""
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
        """Ends the process."""
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


def _forward(lines: object, answers: "queue.Queue[str]") -> None:
    """Puts each line into the queue, and an empty one at the end."""
    try:
        for line in lines:  # type: ignore[attr-defined]
            answers.put(line)
    except ValueError:  # closed
        pass
    answers.put("")


_CHECKER = _Checker()
atexit.register(_CHECKER.stop)


def same_mathematics(right: str, given: str) -> bool:
    """Whether two expressions in LaTeX are equal; False where that cannot be told within `SECONDS`.

    Raises:
        StepFlowInputError: math-verify is not installed.
    """
    demand_math_verify()
    return _CHECKER.same(right, given)


def demand_math_verify(kinds: Iterable[str] = ("math",)) -> None:
    """Checks that what compares mathematics is installed, where it may be asked for.

    Args:
        kinds: of the problems; a number is compared as mathematics where the answer is no plain number.

    Raises:
        StepFlowInputError: it is not.
    """
    if {"math", "number"}.intersection(kinds) and find_spec("math_verify") is None:
        raise StepFlowInputError(
            "comparing mathematics needs math-verify, which is not installed", hint="pip install 'hf-stepflow[eval]'"
        )


_MEMORY = 1 << 31
_OUTPUT = 1 << 24

# Limits of what a mistake can do; a program that means harm needs a machine of its own.
_LIMITED = f"""
import runpy, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({_OUTPUT}, {_OUTPUT}))
except ImportError:
    pass
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def passes(tests: str, program: str) -> bool:
    """Whether a program writes the expected output for every test, blanks aside.

    Each test runs in a process of its own, without this one's environment, with limits on time, memory and output.

    Args:
        tests: JSON: pairs of input and expected output; without any, no program passes.
        program: Python.
    """
    pairs = json.loads(tests)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        return bool(pairs) and all(_output(path, given) == expected.split() for given, expected in pairs)


def _output(path: Path, given: str) -> list[str] | None:
    """The words that a program writes, None where it fails or takes too long."""
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
            with contextlib.suppress(OSError, AttributeError):  # children of its own too; all may be gone already
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
        written.seek(0)
        return None if process.returncode else written.read().decode(errors="replace").split()
