"""Untrusted Python code in a child process: limited, shielded by the kernel, and killed when it takes too long.

The child (`sandbox_child`) gives up its rights before it sees any code: resource limits, an allow list of system calls
(`sandbox_kernel`), Landlock for files, and namespaces where they are permitted. `sandbox_process` watches and ends it.
What it prints is text for a model and never trusted.

Left out: limits by control groups (they need the administrator) and Windows.
"""

import os
import sys
import threading

from opdkit.errors import OpdkitError, RecipeError
from opdkit.tasks.sandbox_process import Child, Limits, Result

NEEDED = ("limits", "files", "syscalls")  # without one of them hostile code can do harm
OPTIONAL = ("namespaces", "disk", "capabilities")  # a second wall behind these
LONGEST = 1_000_000  # characters of code


class Sandbox:
    """Runs pieces of Python code, each in a process of its own; if `persistent`, in one whose variables live on.

    `packages` lets the code import what is installed beside opdkit. `allow_weaker` accepts a machine on which a needed
    protection cannot be had (see `protections`). `without` leaves protections out, to try how weaker machines behave.
    Raises OpdkitError where the code cannot be shielded. Threads may share an instance; a persistent one runs one
    piece of code at a time.
    """

    def __init__(self, limits: Limits | None = None, *, persistent: bool = False, packages: bool = False,
                 allow_weaker: bool = False, without: tuple[str, ...] = ()) -> None:  # fmt: skip
        if unknown := sorted(set(without) - {*NEEDED, *OPTIONAL}):
            raise RecipeError(f"the Python sandbox has without = {unknown}, expected names of {[*NEEDED, *OPTIONAL]}")
        if os.name != "posix":
            raise OpdkitError(f"the Python sandbox needs Linux or macOS; this is {sys.platform}")
        self.limits, self.persistent = limits or Limits(), persistent
        self._packages, self._allow_weaker, self._without = packages, allow_weaker, without
        self._lock = threading.Lock()
        self._child: Child | None = None

    def run(self, code: str) -> Result:
        """Run a piece of code and wait for it, at most `limits.seconds`. Nothing that it does raises here."""
        if len(code) > LONGEST:
            return Result(f"the code has {len(code)} characters, at most {LONGEST} are run", raised=True)
        if not self.persistent:
            child = self._start()
            try:
                return child.ask(code, keep=False)
            finally:
                child.close()
        with self._lock:
            child = self._child = self._child or self._start()
            try:
                result = child.ask(code, keep=True)
            except BaseException:  # Ctrl-C: the child is still at work
                self._close()
                raise
            if result.ended:
                self._close()
                return Result(result.output, True, f"{result.ended}; all variables are lost", result.timed_out)
            return result

    def protections(self) -> dict[str, str | None]:
        """Start a child and ask what protects it: name -> None, or why this protection is missing."""
        child = self._start()
        child.close()
        return child.report

    def close(self) -> None:
        """End the process of a persistent sandbox; the next piece of code starts a new one."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None

    def _start(self) -> "Child":
        child = Child(self.limits, self._packages, self._without)
        missing = {name: child.report[name] for name in NEEDED if child.report[name] is not None}
        if missing and not self._allow_weaker:
            child.close()
            why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise OpdkitError(f"Python code of a model cannot be shielded on this machine ({why}); run on Linux 5.13 or newer "
                              "with Landlock and seccomp, or set allow_weaker: true where the code is harmless or the "
                              "machine is")  # fmt: skip
        return child
