"""The Python sandbox against hostile code: the parent stays healthy, no process and no folder is left behind."""

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opdkit.errors import OpdkitError, RecipeError
from opdkit.tasks import sandbox_kernel, sandbox_process
from opdkit.tasks.environments import Call, Guarded, answer, make_environment
from opdkit.tasks.environments import Limits as EngineLimits
from opdkit.tasks.problem import Problem
from opdkit.tasks.sandbox import NEEDED, OPTIONAL, Sandbox
from opdkit.tasks.sandbox_process import FLOOD, Limits, Result

# Past the interpreter's own hook: libc's functions, to see that the kernel refuses.
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
QUICK = Limits(seconds=1.0)


def children() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" ", 1)
            if rest.rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                found.add(pid)
    return found


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "gone"


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Every test: no child, no folder and no open file more than before."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before, files = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() == before
    assert os.listdir(tmp_path / "temporary") == []
    assert len(os.listdir("/proc/self/fd")) == files


def run(code: str, limits: Limits | None = None, **settings) -> str:
    return Sandbox(limits, **settings).run(code).text


def each(codes: list[str], limits: Limits | None = None, **settings) -> list[Result]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(Sandbox(limits, **settings).run, codes))


def ends(code: str, limits: Limits | None = None, **settings) -> str:
    """The last line of a run that raised."""
    result = Sandbox(limits, **settings).run(code)
    assert result.raised
    return result.text.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- usual code


USUAL = [
    ("6 * 7", "42"),
    ("print('a')\n'b'", "a\n'b'"),
    ("x = 3", "(no output)"),
    ("None", "(no output)"),
    ("", "(no output)"),
    ("# only a comment", "(no output)"),
    ("def f(n):\n    return n * 2\nf(4)", "8"),
    ("import os\ndict(os.environ), os.listdir()", "({}, [])"),
    ("__name__", "'__main__'"),
    ("print('ä€😀')", "ä€😀"),
    ("open('f', 'w').write('text')\nopen('f').read()", "'text'"),
    ("exit()", "(no output)"),
    ("import sys\nsys.stderr.write('e\\n')\nprint('o')", "e\no"),
    ("import threading\nt = threading.Thread(target=print, args=('t',))\nt.start()\nt.join()", "t"),
    ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 5\nasyncio.run(f())", "5"),
    (
        "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write('x')\n    f.seek(0)\n    print(f.read())",
        "x",
    ),
    ("import math, random, json, decimal, sqlite3, statistics, itertools\nstatistics.mean([1, 3])", "2"),
]


def test_output_is_that_of_a_notebook():
    found = each([code for code, _ in USUAL])
    assert [(r.text, r.raised, r.ended, r.timed_out) for r in found] == [
        (text, False, None, False) for _, text in USUAL
    ]


def test_errors_show_only_the_codes_own_lines():
    assert run("def f(x):\n    return 1 / x\n\nf(0)") == (
        'Traceback (most recent call last):\n  File "<python>", line 4, in <module>\n    f(0)\n'
        '  File "<python>", line 2, in f\n    return 1 / x\nZeroDivisionError: division by zero'
    )
    assert run("import json\njson.loads('{')").splitlines()[1:3] == [
        '  File "<python>", line 2, in <module>', "    json.loads('{')"
    ]  # fmt: skip
    chained = run("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('v') from e")
    assert "division by zero\n\nThe above exception was the direct cause" in chained
    assert "sandbox_child" not in chained
    assert run("x = = 1") == '  File "<python>", line 1\n    x = = 1\n        ^\nSyntaxError: invalid syntax'
    assert ends("if True:\nx = 1").startswith("IndentationError: expected an indented block")
    assert ends("'\\0' + '\0'").startswith("SyntaxError: source code string cannot contain null bytes")


ENDS = [
    ("def f():\n    return f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("exit(3)", "SystemExit: 3"),
    ("import sys\nsys.exit('why')", "SystemExit: why"),
    ("import os\nos._exit(4)", "[the process ended with exit status 4]"),
    ("import os\nos.kill(os.getpid(), 9)", "[ended by signal 9 (Killed)]"),
    ("import os\nos.abort()", "[ended by signal 6 (Aborted)]"),
    ("import ctypes\nctypes.string_at(0)", "[crashed: segmentation fault, often from too deep a recursion]"),
    ("class A:\n    def __repr__(self):\n        raise ValueError('no')\nA()", "ValueError: no"),
    ("class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E", "E: <exception str() failed>"),
    ("input()", "EOFError: EOF when reading a line"),
    ("import sys\nsys.stdout = sys.stderr = None\n1 / 0", "ZeroDivisionError: division by zero"),
    ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    ("import builtins\ndel builtins.print, builtins.repr\n1 / 0", "ZeroDivisionError: division by zero"),
]


def test_an_end_is_told():
    found = each([code for code, _ in ENDS])
    assert [r.text.splitlines()[-1] for r in found] == [last for _, last in ENDS]
    assert all(r.raised for r in found)


def test_every_call_starts_anew_unless_the_sandbox_is_persistent():
    sandbox = Sandbox()
    assert sandbox.run("x = 1").raised is False
    assert sandbox.run("x").text.endswith("NameError: name 'x' is not defined")
    kept = Sandbox(QUICK, persistent=True)
    assert kept.run("x = 1\nopen('f', 'w').write('abc')").text == "3"
    assert kept.run("1 / 0").raised
    assert kept.run("x + 1, open('f').read()").text == "(2, 'abc')"
    slow = kept.run("print('before')\nwhile True: pass")
    assert slow.text == "before\n[stopped: not finished after 1 s; all variables are lost]"
    assert slow.timed_out
    assert kept.run("x").text.endswith("NameError: name 'x' is not defined")
    kept.close()
    kept.close()


def test_nothing_runs_between_two_calls_of_a_persistent_sandbox():
    kept = Sandbox(persistent=True)
    kept.run(
        "n = 0\nimport threading\ndef f():\n    global n\n    while True:\n        n += 1\nthreading.Thread(target=f).start()"
    )
    state, deadline = "", time.monotonic() + 10
    while state != "T" and time.monotonic() < deadline:
        state = state_of(kept._child._process.pid)
    kept.close()
    assert state == "T"  # stopped


def test_a_session_outlives_the_thread_that_started_it():
    kept = Sandbox(persistent=True)
    for code, text in [("x = 5", "(no output)"), ("x", "5")]:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(kept.run, code).result().text == text
    kept.close()


def test_a_forgotten_session_ends():
    kept = Sandbox(persistent=True)
    kept.run("x = 5")
    del kept  # the fixture sees no process and no folder


def test_installed_packages_are_an_option():
    assert run("import numpy\nint(numpy.linalg.inv(numpy.eye(2) / 2).sum())", packages=True) == "4"


def test_many_at_once():
    with ThreadPoolExecutor(4) as pool:
        assert [r.text for r in pool.map(Sandbox().run, [f"{i} ** 2" for i in range(12)])] == [
            str(i * i) for i in range(12)
        ]


# ---------------------------------------------------------------------------------------------------- time and memory


ENDLESS = [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "9 ** 9 ** 9 ** 9",
    "import signal\nfor s in (1, 2, 15, 24): signal.signal(s, print)\nwhile True: pass",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "import time\nclass A:\n    def __del__(self): time.sleep(60)\na = A()\ndel a",
]


def test_endless_code_is_killed():
    for result in each(ENDLESS, Limits(seconds=0.5)):
        assert (result.text, result.raised, result.timed_out) == ("[stopped: not finished after 0.5 s]", True, True)


def test_processor_time_is_limited():
    endless = "while True: pass"
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n" + endless
    found = each([endless, ignoring], Limits(seconds=60.0, cpu_seconds=1))
    assert [r.text for r in found] == ["[stopped: more than 1 s of processor time]", "[ended by signal 9 (Killed)]"]


def test_sleeping_threads_end_with_the_call():
    assert (
        run("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n'done'", QUICK)
        == "'done'"
    )


def test_memory_is_limited():
    codes = ["bytearray(10 ** 10)", "x = []\nwhile True: x.append(bytearray(10 ** 6))", "'a' * 10 ** 10",
             "import mmap\nmmap.mmap(-1, 10 ** 10)"]  # fmt: skip
    memory, system = "MemoryError", "OSError: [Errno 12] Cannot allocate memory"
    found = each(codes, Limits(memory_mb=200))
    assert [r.text.splitlines()[-1] for r in found] == [memory, memory, memory, system]


def test_limits_cannot_be_raised():
    code = """import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "CORE"):
    try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (-1, -1))
    except ValueError as error: print(name, error)
"""
    refused = "not allowed to raise maximum limit"
    assert run(code).splitlines() == [f"{name} {refused}" for name in ("AS", "CPU", "FSIZE", "NOFILE", "CORE")]


def test_a_gigabyte_of_output_is_neither_kept_nor_waited_for():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = Sandbox(Limits(seconds=20.0)).run("import sys\nwhile True: sys.stdout.write('x' * 2 ** 20)")
    assert result.ended == f"stopped: it printed more than {FLOOD >> 20} MB"
    assert len(result.text) < 8200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


def test_start_and_end_of_long_output_are_kept():
    assert run("print('a' * 50 + 'b' * 500 + 'c' * 49)", Limits(output=100)) == (
        "a" * 50 + "\n[... 500 bytes left out ...]\n" + "c" * 49
    )
    text = run("for i in range(100_000): print(i)\n1 / 0")
    assert text.startswith("0\n1\n")
    assert text.endswith("ZeroDivisionError: division by zero")


# -------------------------------------------------------------------------------------------------------- processes


def test_new_processes_are_refused_with_a_reason():
    calls = ["while True: os.fork()", "subprocess.run(['true'])", "os.system('true')", "os.execv('/bin/sh', ['sh'])",
             "multiprocessing.Process(target=print).start()"]  # fmt: skip
    codes = [f"import os, subprocess, multiprocessing\n{call}" for call in calls]
    process, program = (f"PermissionError: the sandbox cannot start other {what}" for what in ("processes", "programs"))
    assert [r.text.splitlines()[-1] for r in each(codes)] == [process, program, program, program, process]


REFUSED_CALLS = {
    "fork": "", "unshare": "0x10000000", "setns": "0, 0", "execv": "b'/bin/sh', None", "ptrace": "16, os.getppid(), 0, 0",
    "kill": "os.getppid(), 0", "killpg": "os.getppid(), 0", "process_vm_readv": "os.getppid(), None, 0, None, 0, 0",
    "socket": "2, 1, 0", "mount": "b'tmpfs', b'/tmp', b'tmpfs', 0, None", "chroot": "b'.'", "chmod": "b'f', 0o777",
    "chown": "b'f', 0, 0", "setuid": "0", "setsid": "", "shmget": "0, 4096, 0o1777", "memfd_create": "b'x', 0",
    "truncate": "b'f', 0", "personality": "0", "sched_setaffinity": "os.getppid(), 0, None", "setpriority": "0, 0, -5",
    "fcntl": "1, 8, os.getppid()", "prlimit": "os.getppid(), 7, None, None", "utimensat": "0, b'f', 0, 0",
}  # fmt: skip


def test_the_kernel_refuses_what_reaches_beyond_the_process():
    calls = "".join(f"try_('{name}', {args})\n" for name, args in REFUSED_CALLS.items())
    code = LIBC + (
        "open('f', 'w').close()\ndef try_(name, *args):\n    if getattr(libc, name)(*args) != -1 or ctypes.get_errno() != 1:\n"
        "        print(name, ctypes.get_errno())\n" + calls
    )
    assert run(code) == "(no output)"
    # io_uring_setup and clone3, which libc has no function for: as on a kernel that does not know them
    assert run(LIBC + "[(libc.syscall(n, 8, None), ctypes.get_errno()) for n in (425, 435)]") == "[(-1, 38), (-1, 38)]"


@pytest.mark.parametrize("stack", [0, 32768])
def test_a_bomb_of_threads(stack):
    code = f"""import threading, time
threading.stack_size({stack})
while True: threading.Thread(target=time.sleep, args=(9,)).start()"""
    assert ends(code) in ("RuntimeError: can't start new thread", "[stopped: more than 32 threads]")


def test_the_parent_cannot_be_signalled():
    got = []
    old = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        assert (
            ends("import os\nos.kill(os.getppid(), 10)") == "PermissionError: the sandbox cannot signal other processes"
        )
        # a pipe that is to send a signal to its owner, the parent
        run(
            LIBC
            + "r, w = os.pipe()\nfor a in ((8, os.getppid()), (10, 10), (4, 0o20000)): libc.fcntl(r, *a)\nos.write(w, b'x')"
        )
        run(LIBC + "libc.kill(os.getppid(), 10), libc.sigqueue(os.getppid(), 10, None)")
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert got == []


def test_the_child_dies_with_its_parent(tmp_path):
    """Also when it sleeps for ever and its parent is killed."""
    program = (
        "import sys, threading, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from opdkit.tasks.sandbox import Sandbox\nfrom opdkit.tasks.sandbox_process import Limits\n"
        "kept = Sandbox(Limits(seconds=300.0), persistent=True); kept.run('1'); print(kept._child._process.pid, flush=True)\n"
        "kept.run('import time; time.sleep(300)')"
    )
    (tmp_path / "orphan").mkdir()
    command = [sys.executable, "-c", program, str(tmp_path / "orphan")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while state_of(pid) not in ("gone", "Z") and time.monotonic() < deadline:  # Z: dead, and not yet collected
        time.sleep(0.02)
    assert state_of(pid) in ("gone", "Z")


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("without", [(), ("namespaces", "disk")])
def test_files_outside_are_safe(tmp_path, without):
    secret = tmp_path / "secret"
    secret.write_text("key")
    code = f"""{LIBC}
import os, shutil
def try_(f, *a, **k):
    try: print(f.__name__, f(*a, **k))
    except OSError: pass
def read(p): return open(p).read()
def write(p): return open(p, 'w').write('x')
S, D, P = {str(secret)!r}, {str(tmp_path)!r}, f'/proc/{{os.getppid()}}/'
for f in (read, write, os.remove, os.unlink, os.listdir, os.rmdir, os.chdir): try_(f, S); f is os.chdir or try_(f, D)
for p in ('/etc/passwd', '/proc/self/environ', P + 'environ', P + 'cmdline'): try_(read, p)
try_(write, D + '/new'); try_(os.mkdir, D + '/new'); try_(os.mkfifo, D + '/new'); try_(os.symlink, 'a', D + '/new')
try_(os.rename, S, 'mine'); try_(os.link, S, 'mine'); try_(os.replace, S, D + '/other')
try_(os.truncate, S, 0); try_(os.open, S, os.O_RDONLY | os.O_TRUNC); try_(os.open, S, os.O_WRONLY | os.O_APPEND)
try_(os.chmod, S, 0); try_(os.utime, S); try_(os.chown, S, 1, 1); try_(os.setxattr, S, 'user.a', b'b')
os.symlink(S, 'link'); try_(read, 'link'); try_(write, 'link'); os.symlink(D, 'up'); try_(write, 'up/new')
try_(os.listdir, 'up')
try_(read, '../' * 20 + S[1:]); try_(os.open, '/dev/shm/x', os.O_CREAT | os.O_WRONLY); try_(os.open, '/dev/tty', os.O_RDWR)
shutil.rmtree(D, ignore_errors=True)
"""
    before = secret.stat()
    assert run(code, without=without) == "(no output)"
    assert (secret.read_text(), sorted(p.name for p in tmp_path.iterdir())) == ("key", ["secret", "temporary"])
    after = secret.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid, after.st_nlink) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
        1,
    )


def test_changing_directory_out_gives_nothing():
    assert ends("import os\nos.chdir('/')\nos.listdir()") == "PermissionError: [Errno 13] Permission denied"


def test_the_parents_open_files_are_closed(tmp_path):
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\nn = 0\nfor i in range(64):\n    try: os.fstat(i); n += 1\n    except OSError: pass\nn"
        assert int(run(code)) == 5  # three streams, requests and control


@pytest.mark.parametrize("without", [(), ("namespaces", "disk")])
def test_folders_that_resist_are_removed(without):
    codes = [
        "import os\nfor i in range(1100): os.mkdir('a'); os.chdir('a')",  # deeper than Python's stack
        "import os\nos.mkdir('a'); open('a/b', 'w').close(); os.mkdir('c', 0); os.symlink('/', 'd'); os.symlink('a', 'e')",
        "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\ntry: os.rmdir(os.getcwd())\nexcept OSError: pass",
    ]
    assert [r.text for r in each(codes, without=without)] == [
        "(no output)"
    ] * 3  # the fixture looks whether they are gone


def test_disk_is_limited():
    one = "with open('f', 'wb') as f:\n    while True: f.write(bytes(2 ** 20))"
    many = "i = 0\nwhile True:\n    i += 1\n    with open(f'f{i}', 'wb') as f: f.write(bytes(2 ** 20))"
    empty = "i = 0\nwhile True:\n    i += 1\n    open(f'f{i}', 'w').close()"
    limits = Limits(disk_mb=4)
    bare = [r.text.splitlines()[-1] for r in each([one, many, empty], limits, without=("namespaces", "disk"))]
    stopped = "[stopped: its files take more than 4 MB, or are more than 2048]"
    assert bare == ["OSError: [Errno 27] File too large", stopped, stopped]
    for result in each([many, empty], limits):
        assert result.text.splitlines()[-1].startswith("OSError: [Errno 28] No space left on device")


# ------------------------------------------------------------------------------------------------------------ network


def test_there_is_no_network():
    """By the hook, by the filter alone (raw calls, no namespace), and in the namespace."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, bytes([127, 0, 0, 1]))
        python = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert ends(python) == "PermissionError: the sandbox has no network"
        assert ends(python, allow_weaker=True, without=("syscalls",)) == "PermissionError: the sandbox has no network"
        raw = LIBC + f"s = libc.socket(2, 1, 0)\nlibc.connect(s, {address!r}, 16)"
        assert run(raw, without=("namespaces",)) == "-1"
        with pytest.raises(TimeoutError):
            server.accept()
        kept = Sandbox(persistent=True)
        kept.run("1")
        own, other = (os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", kept._child._process.pid))
        kept.close()
        assert own != other


# ---------------------------------------------------------------------------------------------- its own connections


BREAKING = [
    "import os\nos.closerange(0, 100)",
    "import os\nos.close(1), os.close(2)\nprint('lost')",
    "import os\nfor n in range(3, 10):\n    try: os.write(n, b'0' * 9000)\n    except OSError: pass",
    "import os\nfor n in range(3, 10):\n    try: os.write(n, b'\\xff{}\\n')\n    except OSError: pass\nos._exit(0)",
    "import sys\nsys.stdout.detach()\nfor m in list(sys.modules): del sys.modules[m]",
]


def test_a_child_that_breaks_its_connections_harms_only_itself():
    def session(code: str) -> list[str]:
        kept = Sandbox(QUICK, persistent=True)
        first = kept.run(code), kept.run("1")
        kept.close()
        fresh = kept.run("1 + 1")
        kept.close()
        return [type(r.text).__name__ for r in first] + [fresh.text]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(session, BREAKING)) == [["str", "str", "2"]] * len(BREAKING)
    assert [type(r.text).__name__ for r in each(BREAKING, QUICK)] == ["str"] * len(BREAKING)


# --------------------------------------------------------------------------------------------------- weaker machines


def test_this_machine_has_what_is_needed():
    report = Sandbox().protections()
    assert set(report) == {*NEEDED, *OPTIONAL}
    assert [report[name] for name in NEEDED] == [None, None, None]


@pytest.mark.parametrize("missing", NEEDED)
def test_a_machine_without_a_needed_protection_is_refused(missing):
    with pytest.raises(
        OpdkitError, match=f"cannot be shielded on this machine \\({missing}: left out on request.*allow_weaker"
    ):
        Sandbox(without=(missing,)).run("1")
    assert run("1", without=(missing,), allow_weaker=True) == "1"


def test_the_disk_is_never_mounted_where_others_would_see_it():
    report = Sandbox(without=("namespaces",)).protections()
    assert report["disk"] == "needs namespaces"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nos.fork()", "the sandbox cannot start other processes"),
        ("import subprocess\nsubprocess.run(['true'])", "the sandbox cannot start other programs"),
        ("import socket\nsocket.socket()", "the sandbox has no network"),
        ("import ctypes\nctypes.CDLL(None)", "the sandbox has no ctypes"),
        ("open('OUT', 'w')", "the sandbox cannot write 'OUT'"),
        ("open('/etc/passwd')", "the sandbox cannot read '/etc/passwd'"),
        ("import os\nopen(f'/proc/{os.getppid()}/environ')", "the sandbox cannot read '/proc/"),
        ("import os\nos.symlink('OUT', 'l')\nopen('l', 'w')", "the sandbox cannot change 'OUT'"),
        ("import os\nos.remove('OUT')", "the sandbox cannot change 'OUT'"),
        ("import os\nos.listdir('/')", "the sandbox cannot read '/'"),
    ],
)
def test_the_interpreter_refuses_where_the_kernel_does_not(tmp_path, code, why):
    out = str(tmp_path / "out")
    last = ends(code.replace("OUT", out), allow_weaker=True, without=(*NEEDED[1:], *OPTIONAL))
    assert last.startswith("PermissionError: " + why.replace("OUT", out))
    assert not Path(out).exists()


def test_harmless_code_runs_where_only_the_interpreter_refuses():
    code = "import json, os\nopen('f', 'w').write('ab')\nos.mkdir('d'), os.rename('f', 'd/f')\nopen('d/f').read()"
    assert run(code, allow_weaker=True, without=(*NEEDED[1:], *OPTIONAL)) == "'ab'"


# --------------------------------------------------------------------------------------------- the system call filter


def judge(program: bytes, arch: int, number: int, *args: int) -> int:
    """What the filter returns for a system call: classic BPF, run by hand."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    steps, at, value = list(struct.iter_unpack("HBBI", program)), 0, 0
    while True:
        code, true, false, k = steps[at]
        at += 1
        if code == 0x20:
            value = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            value &= k
        elif code == 0x06:
            return k
        else:
            at += true if (value == k if code == 0x15 else value >= k) else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_system_call_filter(monkeypatch, machine):
    monkeypatch.setattr(sandbox_kernel.platform, "machine", lambda: machine)
    monkeypatch.setattr(sandbox_kernel.sys, "platform", "linux")
    program, column = sandbox_kernel.system_call_filter(77), ["x86_64", "aarch64"].index(machine)
    arch = (0xC000003E, 0xC00000B7)[column]
    allow, refuse, unknown, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    expected = [  # numbers on both machines, arguments, verdict
        ((0, 63), (), allow), ((9, 222), (), allow), ((231, 94), (), allow),  # read, mmap, exit_group
        ((59, 221), (), refuse), ((41, 198), (2, 1), refuse), ((42, 203), (), refuse),  # execve, socket, connect
        ((101, 117), (), refuse), ((165, 40), (), refuse), ((272, 97), (), refuse),  # ptrace, mount, unshare
        ((62, 129), (77, 9), allow), ((62, 129), (78, 9), refuse), ((62, 129), (2**32 - 1, 9), refuse),  # kill
        ((56, 220), (0x3D0F00,), allow), ((56, 220), (17,), refuse),  # clone: a thread, a process
        ((257, 56), (0, 0, 0o1101), allow), ((257, 56), (0, 0, 0o1000), refuse), ((257, 56), (0, 0, 0o2000000), allow),
        ((72, 25), (0, 4), allow), ((72, 25), (0, 8), refuse),  # fcntl: F_SETFL, F_SETOWN
        ((53, 199), (1, 0o2004001), allow), ((53, 199), (1, 2), refuse), ((53, 199), (2, 1), refuse),  # socketpair
        ((302, 261), (0, 7), allow), ((302, 261), (1, 7), refuse),  # prlimit64
        ((435, 435), (), unknown), ((425, 425), (), unknown),  # clone3, io_uring_setup
        ((2**30, 2**30), (), refuse), ((2**30 + 59, 2**30 + 59), (), refuse),  # x86-64's 32-bit interface
    ]  # fmt: skip
    assert [judge(program, arch, n[column], *args) for n, args, _ in expected] == [verdict for *_, verdict in expected]
    assert judge(program, 0x40000003, 0) == kill
    monkeypatch.setattr(sandbox_kernel.platform, "machine", lambda: "riscv64")
    assert sandbox_kernel.system_call_filter(77) is None


# ------------------------------------------------------------------------------------------------------------ the tool


def test_the_python_tool():
    tool = make_environment("python", {"limits": {"seconds": 1}})
    function = tool.tools[0]["function"]
    assert (function["name"], function["parameters"]["required"]) == ("python", ["code"])
    assert "Every call starts anew" in function["description"]
    session = tool.start(Problem(id="1", prompt="?"))
    good = session.call("python", {"code": "print(1)\n2"})
    assert (good.text, good.error, good.timed_out) == ("1\n2", False, False)
    bad = session.call("python", {"code": "1 / 0"})
    assert (bad.text.splitlines()[-1], bad.error) == ("ZeroDivisionError: division by zero", True)
    late = session.call("python", {"code": "while True: pass"})
    assert (late.text, late.error, late.timed_out) == ("[stopped: not finished after 1 s]", True, True)
    for name, arguments in [
        ("python", {}),
        ("python", {"code": 3}),
        ("python", {"code": "1", "more": 1}),
        ("run", {"code": "1"}),
    ]:
        wrong = session.call(name, arguments)
        assert (wrong.text.startswith("expected python(code) with a string"), wrong.error) == (True, True)
    long = session.call("python", {"code": "#" * 1_000_001})
    assert (long.text, long.error) == ("the code has 1000001 characters, at most 1000000 are run", True)
    assert session.call("python", {"code": "'" + "a" * 300_000 + "'[:2]"}).text == "'aa'"  # more than a pipe holds
    session.close()


def test_calls_of_several_responses_at_once():
    """As the engine makes them: each in a thread of its own, which ends with the call."""
    tool = make_environment("python", {"persistent": True, "limits": {"seconds": 2}})
    sessions = [Guarded(tool, Problem(id=str(i), prompt="?")) for i in range(3)]
    first = [Call(session, "python", {"code": f"x = {i}"}) for i, session in enumerate(sessions)]
    assert [o.error for o in answer(first, EngineLimits(seconds=60.0))] == [False] * 3
    codes = ["x + 1", "while True: pass", "print('y' * 5000)"]
    found = answer(
        [Call(s, "python", {"code": c}) for s, c in zip(sessions, codes, strict=True)], EngineLimits(seconds=60.0)
    )
    assert [(o.text[:30], o.error, o.timed_out) for o in found] == [
        ("1", False, False), ("[stopped: not finished after 2", True, True), ("y" * 30, False, False)
    ]  # fmt: skip
    assert len(found[2].text) == 2000
    for session in sessions:
        session.close()


def test_sessions_do_not_share_variables():
    tool = make_environment("python", {"persistent": True})
    assert "Variables of earlier calls are kept" in tool.tools[0]["function"]["description"]
    first, second = (tool.start(Problem(id="1", prompt="?")) for _ in range(2))
    first.call("python", {"code": "x = 1"})
    assert first.call("python", {"code": "x"}).text == "1"
    assert second.call("python", {"code": "x"}).error
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limits": {"secnds": 3}}, "no limit 'secnds': did you mean 'seconds'"),
        ({"limits": {"seconds": 0}}, "seconds = 0.0, expected more than 0"),
        ({"limits": {"memory_mb": 1.5}}, "memory_mb = 1.5, expected an integer"),
        ({"limits": {"threads": True}}, "threads = True, expected an integer"),
        ({"persistent": "no"}, "persistent = 'no', expected true or false"),
        ({"colour": 1}, "do not fit environment 'python', which takes limits, persistent, packages, allow_weaker"),
        ({"limits": "few"}, "limits = 'few', expected a mapping of seconds, "),
        ({"limits": {"memory_mb": 1}}, "memory_mb = 1, expected more than 64"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(RecipeError, match=message):
        make_environment("python", settings)


def test_a_weaker_tool_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(sandbox_process, "system_call_filter", lambda pid: None)
    with pytest.raises(OpdkitError, match=r"cannot be shielded on this machine \(syscalls: not for linux on "):
        make_environment("python", {})
    tool = make_environment("python", {"allow_weaker": True})
    assert "the Python tool runs without: syscalls (allow_weaker is set)" in caplog.text
    session = tool.start(Problem(id="1", prompt="?"))
    assert session.call("python", {"code": "1 + 1"}).text == "2"


def test_an_interrupted_call_leaves_nothing(monkeypatch):
    kept = Sandbox(persistent=True)
    kept.run("x = 1")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sandbox_process.Child, "_exchange", interrupt)
        kept.run("x")
    assert kept.run("x").text.endswith("NameError: name 'x' is not defined")
    kept.close()


def test_unknown_protections_are_refused():
    with pytest.raises(RecipeError, match=r"without = \['speed'\], expected names of \['limits'"):
        Sandbox(without=("speed",))
