"""A scorer in a process of its own, with a time limit.

A student can write `9**9**9**9`, and a scorer that evaluates it never returns; signal-based timeouts neither work in
threads nor interrupt an integer power. A process can be killed. It starts with the first answer to be judged.

Left out: a sandbox. The process limits time; it does not shield the machine from a scorer that runs the answer as code.
"""

import contextlib
import logging
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from opdkit.errors import OpdkitError

SECONDS = 5.0  # for one answer; a usual one takes milliseconds
logger = logging.getLogger("opdkit")


class Isolated:
    """Call it with a request; it returns the scorer's reply, or None when the scorer had to be killed or died.

    `spec` is the worker's first message: ("math",) or ("gym", name, settings). Threads may share one instance.
    """

    def __init__(self, spec: tuple[Any, ...], seconds: float = SECONDS) -> None:
        self._spec, self._seconds = spec, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Isolated] | None = None

    def __call__(self, *request: Any) -> Any:
        with self._lock:
            for _ in range(2):  # twice: a process that died by itself, or too late to matter, is replaced once
                process = self._process or self._start()
                late = threading.Event()
                clock = threading.Timer(self._seconds, _kill, (process, late))
                clock.daemon = True
                clock.start()
                try:
                    return _ask(process, request)
                except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                    self._stop()
                    if late.is_set():
                        break
                finally:
                    clock.cancel()
            logger.warning("an answer could not be judged within %g s and counts as wrong", self._seconds)
            return None

    def _start(self) -> "subprocess.Popen[bytes]":
        script = str(Path(__file__).with_name("worker.py"))
        # -P: the script's folder must not come first on the import path
        process = subprocess.Popen([sys.executable, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = process
        self._end = weakref.finalize(self, _end, process)  # also when the interpreter exits
        try:
            error = _ask(process, self._spec)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            error = "the process ended before it was ready"
        if error is not None:
            self._stop()
            raise OpdkitError(f"the '{self._spec[0]}' scorer cannot start: {error}")
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None and process.stdout is not None
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # a request that was still in the buffer
        process.stdin.close()


def _kill(process: "subprocess.Popen[bytes]", late: threading.Event) -> None:
    late.set()
    process.kill()


def _ask(process: "subprocess.Popen[bytes]", request: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    pickle.dump(request, process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)
