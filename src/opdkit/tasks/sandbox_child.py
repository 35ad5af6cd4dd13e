"""The process that runs untrusted Python code for `sandbox`: it gives up its rights one by one, then runs what it is sent.

Run as a script and not imported: it must start fast, so it imports neither opdkit nor anything outside Python. On stdin
come messages (8 digits of length, then JSON): the setup, then pieces of code. The control pipe, whose number is the first
argument, carries back one line of JSON for the setup and "0" or "1" after each piece (0: it raised nothing). What the
code prints goes to stdout, which is stderr too.

Left out: judging what is missing (the parent does) and time limits (the parent kills).
"""

import ast
import base64
import builtins
import contextlib
import ctypes
import json
import linecache
import os
import resource
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

# What Python needs to read while it runs, besides its own library.
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/System/Library", "/usr/share/zoneinfo",
             "/etc/localtime", "/etc/ld.so.cache", "/dev/zero", "/dev/random", "/dev/urandom")  # fmt: skip
NAME = "<python>"  # the file name of the code in tracebacks

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on every machine
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
# Rights by Landlock's version: what it knows must be named to be refused.
FILE_RIGHTS = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)


def main() -> None:
    """Set up, report, then answer requests until stdin closes."""
    control = int(sys.argv[1])
    os.set_inheritable(control, False)
    setup = _receive(0)
    requests = os.dup(0)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)  # input() meets the end of a file instead of the requests
    os.environ.clear()
    os.environ.update(setup["environment"])
    sys.path.extend(setup["packages"])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    os.write(control, json.dumps(shield(setup)).encode() + b"\n")
    cell = Cell()
    while True:
        code = _receive(requests)
        raised = cell.run(code)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # the code closed or replaced it
            sys.stdout.flush()
        os.write(control, b"1" if raised else b"0")


def _receive(source: int) -> Any:
    """The next message; the process ends without one."""
    data, wanted = b"", 8
    while len(data) < wanted:
        part = os.read(source, wanted - len(data))
        if not part:
            os._exit(0)
        data += part
        if wanted == 8 and len(data) == 8:
            wanted += int(data)
    return json.loads(data[8:])


# ------------------------------------------------------------------------------------------------------ running code


class Cell:
    """Runs pieces of code in one namespace, like a notebook."""

    def __init__(self) -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self._scope = module.__dict__
        builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` makes them, and is not loaded

    def run(self, code: str) -> bool:
        """Run it, print the value of a last expression and the traceback of an error; True when there was an error."""
        linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
        try:
            self._execute(code)
        except SystemExit as stop:
            if stop.code is None or stop.code == 0:
                return False
            print(f"SystemExit: {stop.code}", file=sys.stderr)
        except BaseException as error:  # noqa: BLE001  whatever the code raises is what the caller wants to read
            self._show(error)
        else:
            return False
        return True

    def _execute(self, code: str) -> None:
        tree = ast.parse(code, NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NAME, "exec"), self._scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), NAME, "eval"), self._scope)
            if value is not None:
                print(repr(value))

    def _show(self, error: BaseException) -> None:
        try:
            text = report(error)
        except MemoryError:  # the code's own objects fill it
            error.__traceback__ = None
            self._scope.clear()
            text = "MemoryError\n"
        try:
            sys.stderr.write(text)
        except (AttributeError, OSError, ValueError):  # the code closed or replaced it
            with contextlib.suppress(OSError):
                os.write(2, text.encode(errors="replace"))


def report(error: BaseException) -> str:
    """A traceback with the code's own lines only."""
    told = traceback.TracebackException.from_exception(error)
    waiting: list[traceback.TracebackException | None] = [told]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        frames = [f for f in part.stack if f.filename == NAME]
        # without columns: rows of carets tell little to a model and cost tokens
        bare = [traceback.FrameSummary(f.filename, f.lineno, f.name, line=f.line) for f in frames]
        part.stack = traceback.StackSummary.from_list(bare) if bare else None  # type: ignore[assignment]
        waiting += [part.__cause__, part.__context__, *(part.exceptions or ())]
    return "".join(told.format())


# ---------------------------------------------------------------------------------------------------- giving up rights


def shield(setup: dict[str, Any]) -> dict[str, str | None]:
    """Apply every protection; the report says for each None or why it cannot be had."""
    linux = sys.platform == "linux"
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.path.realpath(os.getcwd())
    reads = [os.path.realpath(p) for p in [*LIBRARIES, *sys.path, os.path.join(sys.base_prefix, "lib")] if p]
    os.umask(0o077)
    steps: dict[str, Callable[[], None]] = {
        "namespaces": lambda: _namespaces(libc),
        "disk": lambda: _small_disk(libc, folder, setup["disk"]),
        "files": lambda: _landlock(libc, folder, reads),
        "capabilities": lambda: _no_capabilities(libc),
        "limits": lambda: _limits(setup["limits"]),
        "syscalls": lambda: _seccomp(libc, base64.b64decode(setup["filter"])),
    }
    if linux:
        _call(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))  # die with the parent
        _call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    done: dict[str, str | None] = {}
    for name, step in steps.items():
        if name in setup["without"]:
            done[name] = "left out on request"
        elif (name != "limits" and not linux) or (name == "syscalls" and not setup["filter"]):
            done[name] = f"not for {sys.platform} on {os.uname().machine}"
        elif name == "disk" and done["namespaces"] is not None:
            done[name] = "needs namespaces"  # else everybody would see the mount
        else:
            done[name] = _attempt(step)
    if done["syscalls"] is not None:  # then this alone stops new processes, and threads with them; root is exempt
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    sys.addaudithook(_hook(folder, reads, strict=done["files"] is not None or done["syscalls"] is not None))
    return done


def _attempt(step: Callable[[], None]) -> str | None:
    try:
        step()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _call(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _namespaces(libc: ctypes.CDLL) -> None:
    """An empty network, no shared memory of others, and mounts that end with the process."""
    user, group = os.geteuid(), os.getegid()
    _call(libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _small_disk(libc: ctypes.CDLL, folder: str, size: str) -> None:
    """Put a small file system in memory over the folder; it vanishes with the process."""
    options, flags = f"{size},mode=0700".encode(), MS_NOSUID | MS_NODEV | MS_NOEXEC
    _call(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options))
    os.chdir(folder)


def _landlock(libc: ctypes.CDLL, folder: str, reads: list[str]) -> None:
    """From now on only the folder can be changed, and only it and Python's own files can be read."""
    version = _call(libc.syscall(CREATE_RULESET, None, 0, 1))
    every = FILE_RIGHTS[min(version, len(FILE_RIGHTS) - 1)]
    # version 6 also refuses signals to, and abstract sockets of, processes outside
    ruleset = struct.pack("QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _call(libc.syscall(CREATE_RULESET, ruleset, size, 0))
    for path, rights in [(folder, every), (os.devnull, READ_FILE | WRITE_FILE | TRUNCATE),
                         *((path, READ_FILE | READ_DIR) for path in reads)]:  # fmt: skip
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            only = -1 if os.path.isdir(path) else ~READ_DIR
            _call(libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights & every & only, place), 0))
            os.close(place)
    _call(libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)


def _no_capabilities(libc: ctypes.CDLL) -> None:
    """Root keeps its name but no privilege: it cannot raise a limit again."""
    number = SYS_CAPSET.get(os.uname().machine)
    if number is None:
        raise OSError(f"unknown machine {os.uname().machine}")
    _call(libc.syscall(number, struct.pack("Ii", 0x20080522, 0), bytes(24)))


def _limits(limits: dict[str, int]) -> None:
    failed = []
    for name, value in limits.items():
        # one second more for the hard limit of CPU time: the soft one sends a signal that tells it from other ends
        hard = value + 1 if name == "CPU" else value
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
        except (OSError, ValueError) as error:
            failed.append(f"RLIMIT_{name}: {error}")
    if failed:
        raise OSError("; ".join(failed))


def _seccomp(libc: ctypes.CDLL, program: bytes) -> None:
    steps = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(steps))
    _call(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))


# --------------------------------------------------------------------------------------------------------- audit hook

PROGRAMS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
REFUSED = {
    "socket.": "the sandbox has no network",
    **dict.fromkeys(PROGRAMS, "the sandbox cannot start other programs"),
    "os.fork": "the sandbox cannot start other processes",
    "os.kill": "the sandbox cannot signal other processes",
}
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
           "os.utime", "os.chflags", "os.setxattr", "os.removexattr", "os.chroot", "os.lchmod", "os.lchflags")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _hook(folder: str, reads: list[str], strict: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """Refuse with a clear sentence what the kernel refuses anyway; if `strict`, also what it does not refuse here."""
    own = os.getpid()

    def inside(path: Any, *roots: str) -> bool:
        text = os.path.realpath(os.fsdecode(path))
        return any(text == root or text.startswith(root.rstrip("/") + "/") for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if (event == "socket.__new__" and args[1] == 1) or (event == "os.kill" and args[0] == own):
            return  # a connected pair, which asyncio needs, is no network
        if event.startswith(tuple(REFUSED)):
            raise PermissionError(next(text for start, text in REFUSED.items() if event.startswith(start)))
        if not strict:
            return
        if event.startswith("ctypes."):
            raise PermissionError("the sandbox has no ctypes")
        if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str | bytes):
            writes = event == "open" and bool(args[2] & WRITES)
            if not inside(args[0], folder, os.devnull, *(() if writes else reads)):
                raise PermissionError(f"the sandbox cannot {'write' if writes else 'read'} {args[0]!r}")
        if event in CHANGES and not all(inside(path, folder) for path in args if isinstance(path, str | bytes)):
            raise PermissionError(f"the sandbox cannot change {args[0]!r}")

    return hook


if __name__ == "__main__":
    main()
