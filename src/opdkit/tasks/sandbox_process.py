"""The parent's side of a sandboxed process: start it, send it code, read what it prints, watch it, end it.

The clock, the number of threads and the size of the folder are watched here, because no limit of the kernel counts them
for every user and on every machine. Nothing that the child says is parsed but one byte per piece of code: raised or not.

Left out: deciding whether the protections suffice (`sandbox`).
"""

import base64
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.errors import OpdkitError, RecipeError
from opdkit.tasks.sandbox_kernel import system_call_filter

START = 20.0  # seconds for a process to report that it is ready; a busy machine needs one
ENTRIES = 2048  # files and folders that the code may make
FLOOD = 1 << 26  # bytes of output after which it is no longer worth reading on
_TICK = 0.05  # seconds between two looks at threads and folder
_LATE = "stopped: not finished after"
_REPLIES = (b"0", b"1")  # it raised nothing, it raised something
# A child dies with the *thread* that started it, and threads of tool calls are short-lived.
_STARTER = ThreadPoolExecutor(1, "opdkit-sandbox")


@dataclass(frozen=True)
class Limits:
    """What one child may take: seconds of a clock per call, the rest per process."""

    seconds: float = 5.0  # per call
    cpu_seconds: int = 5  # per process: a call, or a whole persistent session
    memory_mb: int = 512  # address space
    disk_mb: int = 16  # of one file, and of all together
    open_files: int = 64
    threads: int = 32
    output: int = 8000  # bytes that are kept of what a call prints, from its start and its end

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 64 if name == "memory_mb" else 0  # Python itself takes some 40
            if not value > least:
                raise RecipeError(f"the Python sandbox has {name} = {value!r}, expected more than {least}")


@dataclass(frozen=True)
class Result:
    """What a piece of code printed (with its traceback), and why its process was ended, if it was."""

    output: str
    raised: bool = False  # the code raised an exception, or its process ended
    ended: str | None = None
    timed_out: bool = False

    @property
    def text(self) -> str:
        """Output and the reason of an early end, for a reader."""
        lines = [self.output.rstrip("\n")] if self.output.strip() else []
        return "\n".join([*lines, f"[{self.ended}]"] if self.ended else lines) or "(no output)"


class Child:
    """One process, its pipes and its folder.

    `report` says for each protection None or why it is missing. `close` ends it, from any thread and more than once.
    Raises OpdkitError when the process cannot start.
    """

    def __init__(self, limits: Limits, packages: bool, without: tuple[str, ...]) -> None:
        self._limits, self._watch_folder, self._look = limits, False, 0.0
        self._folder = tempfile.mkdtemp(prefix="opdkit-python-")
        read, write = os.pipe()
        try:
            self._process = _STARTER.submit(_spawn, write, self._folder).result()
        except BaseException:
            os.close(read)
            os.rmdir(self._folder)
            raise
        finally:
            os.close(write)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout, self._control = self._process.stdin.fileno(), self._process.stdout.fileno(), read
        for pipe in (self._stdin, self._stdout, self._control):
            os.set_blocking(pipe, False)
        self.close = weakref.finalize(self, _end, self._process, self._control, self._folder)  # also at exit
        self.report = self._set_up(packages, without)

    def _set_up(self, packages: bool, without: tuple[str, ...]) -> dict[str, str | None]:
        mega, limits = 1 << 20, self._limits
        paths = sysconfig.get_paths()
        setup = {
            "limits": {"CPU": limits.cpu_seconds, "AS": limits.memory_mb * mega, "FSIZE": limits.disk_mb * mega,
                       "NOFILE": limits.open_files, "CORE": 0},
            "disk": f"size={limits.disk_mb}m,nr_inodes={ENTRIES}",
            "filter": base64.b64encode(system_call_filter(self._process.pid) or b"").decode(),
            "packages": sorted({paths["purelib"], paths["platlib"]}) if packages else [],
            # numerical libraries reserve memory for every thread
            "environment": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} if packages else {},
            "without": without,
        }  # fmt: skip
        reply, output, ended = self._exchange(setup, START, (b"\n",))
        if ended is not None:
            self.close()
            raise OpdkitError(
                f"the sandbox's process is not ready ({ended}): {output.text().strip() or 'it said nothing'}"
            )
        report: dict[str, str | None] = json.loads(reply)
        self._watch_folder = report["disk"] is not None
        return report

    def ask(self, code: str, keep: bool) -> Result:
        """Run the code; afterwards the process is stopped if it is kept, else dead."""
        if keep:
            _signal(self._process, signal.SIGCONT)
        reply, output, ended = self._exchange(code, self._limits.seconds, _REPLIES)
        # Nothing runs between two calls, and nothing writes while the rest of the output is read.
        _signal(self._process, signal.SIGSTOP if keep and ended is None else signal.SIGKILL)
        for _ in range(64):  # a pipe's worth of output, and an end even if something were still writing
            if not (rest := _read(self._stdout)):
                break
            output.add(rest)
        late = ended is not None and ended.startswith(_LATE)
        return Result(output.text(), reply != b"0" or ended is not None, ended, late)

    def _exchange(
        self, message: Any, seconds: float, replies: tuple[bytes, ...]
    ) -> "tuple[bytes, _Output, str | None]":
        """Send a message and wait for the reply: its bytes, what was printed meanwhile, and why there is none."""
        body = json.dumps(message).encode()
        waiting, reply, output = b"%08d" % len(body) + body, b"", _Output(self._limits.output)
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            while not reply.endswith(replies):
                now = time.monotonic()
                if now > deadline:
                    return reply, output, f"{_LATE} {seconds:g} s"
                if now > self._look and (reason := self._too_much()):
                    return reply, output, reason
                for key, _ in selector.select(min(_TICK, deadline - now)):
                    if key.fd == self._stdin:
                        waiting = _write(self._stdin, waiting)
                        if not waiting:
                            selector.unregister(self._stdin)
                        continue
                    data = _read(key.fd)
                    if key.fd == self._stdout:
                        output.add(data)
                        if output.total > FLOOD:
                            return reply, output, f"stopped: it printed more than {FLOOD >> 20} MB"
                        if not data:
                            selector.unregister(self._stdout)
                    elif data and len(reply) < 4096:
                        reply += data
                    else:
                        return reply, output, self._why()
        return reply, output, None

    def _too_much(self) -> str | None:
        """What the kernel does not limit: threads (RLIMIT_NPROC counts the user's, and not root's) and many files."""
        start = time.monotonic()
        try:
            threads = os.stat(f"/proc/{self._process.pid}/task").st_nlink - 2
        except OSError:  # not Linux, or it has just ended
            threads = 0
        if threads > self._limits.threads:
            return f"stopped: more than {self._limits.threads} threads"
        if self._watch_folder and _size(self._folder) > self._limits.disk_mb << 20:
            return f"stopped: its files take more than {self._limits.disk_mb} MB, or are more than {ENTRIES}"
        now = time.monotonic()
        self._look = now + max(_TICK, 10 * (now - start))  # a large folder takes long to look at
        return None

    def _why(self) -> str:
        """Why the process closed its control pipe: usually it has ended."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "stopped: it closed its connection"
        if status == -signal.SIGXCPU:
            return f"stopped: more than {self._limits.cpu_seconds} s of processor time"
        if status == -signal.SIGSEGV:
            return "crashed: segmentation fault, often from too deep a recursion"
        if status < 0:
            return f"ended by signal {-status} ({signal.strsignal(-status)})"
        return f"the process ended with exit status {status}"


class _Output:
    """The first and the last bytes of a stream of any length."""

    def __init__(self, limit: int) -> None:
        self._head, self._tail, self._half, self.total = b"", b"", max(1, limit // 2), 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail = (self._tail + data[room:])[-self._half :]

    def text(self) -> str:
        left_out = self.total - len(self._head) - len(self._tail)
        gap = f"\n[... {left_out} bytes left out ...]\n".encode() if left_out else b""
        return (self._head + gap + self._tail).decode(errors="replace")


def _spawn(control: int, folder: str) -> "subprocess.Popen[bytes]":
    script = str(Path(__file__).with_name("sandbox_child.py"))
    # -I -S: no variables, no user's or site's packages; -B: no caches written; utf8: else a variable is set for the locale
    return subprocess.Popen([sys.executable, "-I", "-S", "-B", "-X", "utf8", script, str(control)], bufsize=0, cwd=folder,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={},
                            start_new_session=True, pass_fds=(control,))  # fmt: skip


def _end(process: "subprocess.Popen[bytes]", control: int, folder: str) -> None:
    """Kill the process with its group, and remove its folder, whatever it looks like."""
    _signal(process, signal.SIGKILL)
    process.wait()
    os.close(control)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder that may be unreadable inside and far deeper than a path or Python's stack can be."""
    grave = tempfile.mkdtemp(prefix="opdkit-python-")
    waiting = [os.path.join(grave, "0")]
    os.rename(folder, waiting[0])
    for path in waiting:  # grows on the way: every inner folder is first moved up
        os.chmod(path, 0o700)
        with os.scandir(path) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)  # moving a folder changes it
                    waiting.append(os.path.join(grave, str(len(waiting))))
                    os.rename(entry.path, waiting[-1])
                else:
                    os.unlink(entry.path)
        os.rmdir(path)
    os.rmdir(grave)


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    if process.returncode is None:  # not reaped: its number still is its own
        with contextlib.suppress(PermissionError, ProcessLookupError):  # macOS: it has ended
            os.killpg(process.pid, number)


def _read(pipe: int) -> bytes:
    """What is there, up to 64 KiB; b"" at the end, and when nothing is there."""
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def _write(pipe: int, data: bytes) -> bytes:
    """Write what fits; returns the rest, which is nothing when nobody reads any more."""
    try:
        return data[os.write(pipe, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _size(folder: str) -> float:
    """Bytes in a folder; infinite when it cannot be read or has very many entries."""
    total, waiting, entries = 0.0, [folder], 0
    try:
        while waiting:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if entries > ENTRIES:
                        return float("inf")
    except FileNotFoundError:  # removed while it was looked at
        return total
    except OSError:
        return float("inf")
    return total
