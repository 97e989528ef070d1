"""The sandbox against real attacks, on the real kernel."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bar_ray.rewards import bubble, landlock, seccomp
from bar_ray.rewards.sandbox import Limits, Run, Sandbox
from bar_ray.types import UserError

_FIRST_UID = 71_000


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(num_slots=4, limits=Limits(wall_s=12.0, cpu_s=1), first_uid=_FIRST_UID)
    try:
        sandbox.prove()
    except UserError as error:
        if "the kernel does not let" in str(error):
            pytest.skip(str(error))
        raise
    yield sandbox
    assert _all_gone()


def _call(sandbox: Sandbox, body: str, *arguments: Any) -> Run:
    """Run `body` as the function f(*a)."""
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    return sandbox.run(f"def f(*a):\n{indented}", "f", [list(arguments)])


def _value(run: Run) -> Any:
    assert run.status == "done", run
    assert run.calls[0].ok, run
    return run.calls[0].value


def _survivors() -> list[str]:
    """Host processes that still run under a slot's uid (as root; else nobody can tell)."""
    uids = {str(_FIRST_UID + slot) for slot in range(20)}
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if fields["Uid"].split()[0] in uids and not fields["State"].startswith("Z"):
            found.append(fields["Name"])
    return found


def _all_gone() -> bool:
    """The kernel needs a moment to take a dead namespace down."""
    deadline = time.monotonic() + 2.0
    while _survivors() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _survivors()


def test_values_cross_as_plain_data(sandbox: Sandbox) -> None:
    program = "def f(x):\n    return {'x': x, 1: (1.5, None, True, 'é\\n\"\\U0001f600')}"
    run = sandbox.run(program, "f", [[[1, {"k": "v"}]], [float("inf")]])
    assert run.status == "done"
    assert run.calls[0].value == {"x": [1, {"k": "v"}], "1": [1.5, None, True, 'é\n"\U0001f600']}
    assert run.calls[1].value["x"] == float("inf")


def test_honest_programs_keep_the_standard_library(sandbox: Sandbox) -> None:
    body = """
import asyncio, collections, dataclasses, json, re, tempfile, threading, typing
@dataclasses.dataclass
class Point:
    x: "typing.List[int]"
threads = [threading.Thread(target=int) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
async def one(): return 1
with tempfile.TemporaryFile() as file: file.write(b"x")
return [json.loads("[1]"), asyncio.run(one()), collections.Counter("aab"), Point([2]).x]
"""
    assert _value(_call(sandbox, body)) == [[1], 1, {"a": 2, "b": 1}, [2]]


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("def f(:", "unparsable", "SyntaxError"),
        ("def g(x): return x", "unparsable", "KeyError"),
        ("raise ValueError", "crash", "ValueError"),
        ("import sys; sys.exit(0)", "crash", "SystemExit"),
        ("import os\ndef f(x): os._exit(0)", "crash", "no readable report"),
        ("import os\ndef f(x): os.kill(os.getpid(), 11)", "crash", "exit code 139"),
        ("def f(x):\n    while True: pass", "timeout", "CPU time"),
    ],
)
def test_ways_to_end(sandbox: Sandbox, program: str, status: str, detail: str) -> None:
    run = sandbox.run(program, "f", [[1]])
    assert (run.status, run.detail) == (status, detail)


def test_the_wall_clock_ends_sleepers() -> None:
    hasty = Sandbox(limits=Limits(wall_s=2.5), first_uid=_FIRST_UID)
    run = _call(hasty, "import os, time; os.fork(); time.sleep(60)")
    assert (run.status, run.detail) == ("timeout", "wall time")
    assert _all_gone()


def test_every_call_fails_alone(sandbox: Sandbox) -> None:
    program = "import sys\ndef f(x): return 1 // x if x < 5 else sys.exit(0) if x < 9 else {x}"
    run = sandbox.run(program, "f", [[1], [0], [7], [9]])
    assert [(c.ok, c.value) for c in run.calls] == [
        (True, 1),
        (False, "ZeroDivisionError"),
        (False, "SystemExit"),
        (False, "TypeError"),
    ]


def test_host_is_out_of_sight(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAR_RAY_SECRET", "hush")
    body = """
import os
def listed(path):
    try: return os.listdir(path)
    except OSError: return []
packages = [p for p in a[0] if listed(p)]
return {
    "files": [p for p in ("/etc", "/root", "/home", "/work", "/var") if listed(p)] + packages,
    "environment": [k for k in os.environ if "SECRET" in k],
    "pids": len([p for p in os.listdir("/proc") if p.isdigit()]) <= 3,
    "uid": os.getuid(),
}
"""
    packages = [
        str(p)
        for lib in ("/usr/lib", "/usr/local/lib")
        for p in Path(lib).glob("python3*/*-packages")
    ]
    seen = _value(_call(sandbox, body, packages))
    assert seen == {"files": [], "environment": [], "pids": True, "uid": 65534}


def test_network_and_kernel_calls_are_denied(sandbox: Sandbox) -> None:
    body = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
allowed = []
def attempt(name, action):
    try: allowed.append(name) if action() not in (-1, None) else None
    except (OSError, ValueError): pass
attempt("inet", lambda: socket.socket(socket.AF_INET))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("memfd", lambda: os.memfd_create("x"))
attempt("shm", lambda: libc.shmget(0, 4096, 0o1600))
attempt("userns", lambda: libc.unshare(0x10000000))
attempt("ptrace", lambda: libc.ptrace(0, 0, 0, 0))
attempt("mount", lambda: libc.mount(b"t", b"/tmp", b"tmpfs", 0, None))
attempt("setuid", lambda: os.setuid(0) or 1)
attempt("kill", lambda: os.kill(-1, 0) if os.getpid() > 5 else None)
attempt("raise limit", lambda: __import__("resource").setrlimit(0, (99, 99)) or 1)
return allowed
"""
    assert _value(_call(sandbox, body)) == []


def test_memory_is_bounded_wherever_it_is(sandbox: Sandbox) -> None:
    body = """
import os
def fill(path):
    written, number = 0, 0
    try:
        while written < 200 << 20:
            with open(f"{path}/{number}", "wb") as file:
                written += file.write(b"x" * (8 << 20))
            number += 1
    except OSError: pass
    return written >> 20
def allocate():
    try: return len(bytearray(2 << 30))
    except MemoryError: return 0
return [allocate(), fill("/dev/shm"), fill("/dev"), fill(""), fill("/run"), fill("/tmp") <= 64]
"""
    assert _value(_call(sandbox, body)) == [0, 0, 0, 0, 0, True]


def test_fork_bomb_and_daemons(sandbox: Sandbox) -> None:
    body = """
import os, time
children = 0
while children < 100:
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
    except OSError:
        break
    children += 1
return children
"""
    # That it is done at all shows that the children did not keep the run alive.
    assert 0 < _value(_call(sandbox, body)) <= Limits().num_processes
    assert _all_gone()


def test_endless_output_is_drained_and_cut(sandbox: Sandbox) -> None:
    run = _call(sandbox, "while True: print('x' * 100_000)")
    assert run.status == "timeout"
    assert len(run.output) == sandbox.limits.output_kib << 10
    flood = _call(sandbox, "return 'x' * (4 << 20)")
    assert (flood.status, flood.detail) == ("crash", "no readable report")
    assert _value(_call(sandbox, "print('x' * 1_000_000); return 1")) == 1


def test_forged_reports(sandbox: Sandbox) -> None:
    forge = """
import os
for fd in range(3, 64):
    try: os.write(fd, a[0].encode())
    except OSError: pass
os._exit(0)
"""
    forged = [
        '{"id":"x","stage":"calls","calls":[[true,1]]}\n',
        "[1]\n",
        "[" * 100_000,
        '"x"',
        "\xff",
    ]
    for report in forged:
        run = _call(sandbox, forge, report)
        assert run.status == "crash", run


def test_slots_run_side_by_side(sandbox: Sandbox) -> None:
    body = """
import os, time
os.fork() or os._exit(0)
began = time.time()
time.sleep(0.5)
return [a[0], began, time.time()]
"""
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda i: _value(_call(sandbox, body, i)), range(8)))
    assert [number for number, _, _ in runs] == list(range(8))
    alive = [sum(began <= moment < ended for _, began, ended in runs) for _, moment, _ in runs]
    assert 2 <= max(alive) <= sandbox.num_slots


def test_nothing_is_left_behind(sandbox: Sandbox) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for program in ("def f(): return 1", "import os\nos._exit(3)"):
        sandbox.run(program, "f", [[]])
    assert len(os.listdir("/proc/self/fd")) == before
    assert _all_gone()


# Without bubblewrap ------------------------------------------------------------------------------


def _refuse() -> bubble.Programs:
    raise UserError("not here")


@pytest.fixture
def landlocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox on a machine without bubblewrap."""
    monkeypatch.setattr(bubble, "find_programs", _refuse)
    sandbox = Sandbox(num_slots=2, limits=Limits(wall_s=6.0, cpu_s=1), first_uid=_FIRST_UID)
    try:
        sandbox.prove()
    except UserError as error:
        pytest.skip(str(error))
    yield sandbox
    assert _all_gone()


def test_landlock_keeps_the_standard_library(landlocked: Sandbox) -> None:
    body = """
import asyncio, collections, dataclasses, json, re, sqlite3, ssl, threading
seen = []
threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
async def one(): return 1
return [sorted(seen), asyncio.run(one()), json.loads("[1]"), re.sub("a", "b", "a")]
"""
    assert _value(_call(landlocked, body)) == [[0, 1, 2], 1, [1], "b"]


def test_landlock_holds_programs(landlocked: Sandbox) -> None:
    module = next(Path("/usr/lib/python3/dist-packages").glob("*.py"), None)
    body = """
import ctypes, os, signal, socket, subprocess, resource, threading
libc = ctypes.CDLL(None, use_errno=True)
allowed = []
def attempt(name, action):
    try: allowed.append(name) if action() not in (-1, None, b"") else None
    except (OSError, ValueError): pass
for path in ("/etc/passwd", "/proc/self/status", "/proc/1/environ", "/root", "/home", *a):
    attempt(path, lambda: open(path, "rb").read())
    attempt("list " + path, lambda: os.listdir(path))
for path in ("/x", "/tmp/x", "/dev/shm/x", "/var/tmp/x", "/usr/lib/python3/x"):
    attempt("write " + path, lambda: open(path, "w"))
    attempt("mkdir " + path, lambda: os.mkdir(path) or 1)
attempt("chmod", lambda: os.chmod("/tmp", 0o777) or 1)
attempt("chown", lambda: os.chown("/tmp", -1, -1) or 1)
attempt("utime", lambda: os.utime("/tmp") or 1)
attempt("xattr", lambda: os.setxattr("/tmp", "user.x", b"x") or 1)
attempt("fork", os.fork)
attempt("spawn", lambda: subprocess.run(["/usr/bin/true"]) and 1)
attempt("exec", lambda: os.execv("/usr/bin/true", ["true"]))
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
attempt("raw clone", lambda: libc.syscall(clone, 17, 0, 0, 0, 0))
attempt("raw clone3", lambda: libc.syscall(435, 0, 0))
attempt("kill", lambda: os.kill(os.getppid(), 0) or 1)
attempt("kill group", lambda: os.kill(0, signal.SIGTERM) or 1)
attempt("thread signal", lambda: signal.pthread_kill(threading.get_ident(), 0) or 1)
attempt("limits of others", lambda: resource.prlimit(1, resource.RLIMIT_CPU))
attempt("inet", lambda: socket.socket(socket.AF_INET))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("memory file", lambda: os.memfd_create("x"))
attempt("setuid", lambda: os.setuid(0) or 1)
attempt("user namespace", lambda: libc.unshare(0x10000000))
attempt("raise a limit", lambda: resource.setrlimit(resource.RLIMIT_CPU, (99, 99)) or 1)
return allowed
"""
    assert _value(_call(landlocked, body, *([str(module)] if module else []))) == []
    assert _call(landlocked, "return len(bytearray(2 << 30))").calls[0].value == "MemoryError"
    assert _call(landlocked, "while True: print('x' * 100_000)").status == "timeout"
    assert _call(landlocked, "import os; os.abort()").status == "crash"


def test_landlock_runs_tests_that_are_programs(landlocked: Sandbox) -> None:
    tests = "def check(candidate):\n    assert candidate(2) == 3"
    for program, passes in (("def f(x): return x + 1", True), ("def f(x): return x", False)):
        served, tested = landlocked.check(program, "f", tests)
        assert (served.status, tested.calls[0].ok) == ("done", passes)


def test_without_any_way_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(landlock, "find_programs", _refuse)
    with pytest.raises(UserError, match=r"apt-get install bubblewrap(.|\n)*not here"):
        Sandbox().run("def f(): return 1", "f", [[]])


def test_an_old_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "_OLDEST", 10_000)
    with pytest.raises(UserError, match=r"Linux 6\.2 or newer"):
        landlock.find_programs()


def test_unsafe_must_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(landlock, "find_programs", _refuse)
    unsafe = Sandbox(limits=Limits(wall_s=2.5), allow_unsafe=True)
    assert _value(unsafe.run("def f(x): return x + 1", "f", [[1]])) == 2
    assert unsafe.run("def f(x): return bytearray(2 << 30)", "f", [[1]]).calls[0].ok is False
    assert unsafe.run("import time\ndef f(x): time.sleep(9)", "f", [[1]]).status == "timeout"


def test_a_kernel_that_forbids_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    bwrap.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(landlock, "find_programs", _refuse)
    with pytest.raises(
        UserError, match=r"No permissions to create new namespace|Permission denied"
    ):
        Sandbox().prove()


def test_filter_knows_both_cpus() -> None:
    for machine in ("x86_64", "aarch64"):
        for strict in (False, True):
            program = seccomp.build_filter(machine, strict)
            assert program is not None
            assert len(program) % 8 == 0
            assert len(program) // 8 < 256  # jumps are one byte
    assert seccomp.build_filter("riscv64") is None
