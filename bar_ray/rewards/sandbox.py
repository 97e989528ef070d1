"""Runs one model-written program on a list of inputs, where it can do no harm.

Every run is a fresh process under bubblewrap (see `bubble`, `seccomp`), limited in time, memory,
processes, files and output. Only the program and its inputs enter; values come back as one JSON
line with a random id on a private descriptor, and whoever knows the expected values judges them
outside. When the run ends, whatever the program started ends with it.

As root each slot has its own uid. As an ordinary user all slots share the user's uid inside
unprivileged user namespaces, which is weaker in two ways: before Linux 5.14 the process limit
counts all processes of that user (since then, those of one sandbox), so honest programs that fork
may fail; and a program that broke out of its namespaces would hold that user's rights rather than
nobody's.

Where bubblewrap cannot run, Landlock holds programs (see `landlock`); where that cannot either,
they are refused. Cgroups are left out as not portable: worst-case memory of one run is
`num_processes` x `memory_mib`.
"""

import contextlib
import json
import logging
import marshal
import os
import platform
import queue
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bar_ray.rewards import bubble, landlock
from bar_ray.rewards.seccomp import build_filter
from bar_ray.rewards.supervise import Ended, supervise
from bar_ray.types import UserError

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_CPU_TIME_EXCEEDED = (128 + 24, -24)  # SIGXCPU, as bubblewrap and as Popen report it
_START_ATTEMPTS = 3


class SandboxError(RuntimeError):
    """The machine, not the program, kept a run from starting."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_s: float = 6.0
    cpu_s: int = 2
    memory_mib: int = 512
    scratch_mib: int = 64
    file_mib: int = 16
    num_processes: int = 16
    num_files: int = 64
    output_kib: int = 64
    report_kib: int = 1024

    def as_rlimits(self) -> dict[str, tuple[int, int]]:
        """Soft and hard limits by the names of the `resource` module."""
        limits = {
            "RLIMIT_AS": self.memory_mib * _MIB,
            "RLIMIT_FSIZE": self.file_mib * _MIB,
            "RLIMIT_NPROC": self.num_processes,
            "RLIMIT_NOFILE": self.num_files,
            "RLIMIT_CORE": 0,
        }
        both = {name: (value, value) for name, value in limits.items()}
        return {**both, "RLIMIT_CPU": (self.cpu_s, self.cpu_s + 1)}


@dataclass(frozen=True)
class Call:
    """One call's returned plain value, or the name of the exception it raised."""

    ok: bool
    value: Any


@dataclass(frozen=True)
class Run:
    """How a program ended: "done", "unparsable", "timeout" or "crash", and one call per input."""

    status: str
    calls: tuple[Call, ...] = ()
    detail: str = ""
    output: str = ""
    seconds: float = field(default=0.0, compare=False)


class Sandbox:
    """`num_slots` programs at a time, from any number of threads. Checks itself before the first.

    Sandboxes in several processes of one machine better take different `first_uid`, so that no
    two runs share a uid. `allow_unsafe` lets programs run as plain subprocesses with resource
    limits where nothing can hold them: they can then read files and use the network.
    """

    def __init__(
        self,
        num_slots: int = 1,
        limits: Limits | None = None,
        allow_unsafe: bool = False,
        first_uid: int = 70_000,
    ) -> None:
        self.num_slots = num_slots
        self.limits = limits or Limits()
        self.allow_unsafe = allow_unsafe
        self._uids: queue.Queue[int] = queue.Queue()
        for slot in range(num_slots):
            self._uids.put(first_uid + 2 * slot)  # the next one is for a program of tests
        self._programs: bubble.Programs | None = None
        self._filters = {
            strict: build_filter(platform.machine(), strict) for strict in (False, True)
        }
        self._checking = threading.Lock()

    def prove(self) -> None:
        """Prove once that programs are held. UserError says what is missing and how to mend it."""
        with self._checking:
            if self._programs is None:
                self._programs = self._find_way()

    def _find_way(self) -> bubble.Programs:
        """Bubblewrap, or else Landlock, or else nothing if that is allowed."""
        reasons: list[UserError] = []
        for find in (bubble.find_programs, landlock.find_programs):
            try:
                programs = find()
                self._self_test(programs)
            except UserError as error:
                reasons.append(error)
            else:
                if reasons:
                    _log.warning("holding programs with Landlock: %s", reasons[0])
                return programs
        if not self.allow_unsafe:
            raise UserError("\n".join(str(reason) for reason in reasons))
        _log.warning("running model-written programs WITHOUT a sandbox: %s", reasons[0])
        return bubble.find_unsafe_programs()

    def run(self, program: str, entry_point: str, inputs: list[list[Any]]) -> Run:
        """Call the program's function on each input. Waits for a free slot."""
        self.prove()
        request = {"program": program, "entry_point": entry_point, "inputs": inputs}
        uid = self._uids.get()
        try:
            return self._run(uid, request, len(inputs))
        finally:
            self._uids.put(uid)

    def check(self, program: str, entry_point: str, tests: str) -> tuple[Run, Run]:
        """Call `check(candidate)` of `tests`, a program; returns the runs of program and tests.

        The two run in sandboxes of their own and only plain values cross: the program never sees
        what is expected, and the tests call a function that asks the program.
        """
        self.prove()
        uid = self._uids.get()
        try:
            (questions, asks), (hears, answers) = os.pipe(), os.pipe()
            candidate = {"program": program, "entry_point": entry_point}
            candidate |= {"questions": questions, "answers": answers}
            asking = {"program": tests, "entry_point": "check", "name": entry_point}
            asking |= {"asks": asks, "hears": hears}
            with ThreadPoolExecutor(1) as other:
                served = other.submit(self._run, uid, candidate, 0, (questions, answers))
                tested = self._run(uid + 1, asking, 1, (asks, hears))
                return served.result(), tested
        finally:
            self._uids.put(uid)

    def _run(
        self, uid: int, request: dict[str, Any], num_calls: int, fds: tuple[int, ...] = ()
    ) -> Run:
        assert self._programs is not None
        for _ in range(1 if fds else _START_ATTEMPTS):  # what it has said cannot be said again
            run_id = secrets.token_hex(8)
            ended = self._execute(self._programs, uid, {**request, "id": run_id}, fds)
            if ended.report.startswith(b"+"):
                return _interpret(ended, run_id, num_calls)
        raise SandboxError(
            f"the sandbox did not start in {_START_ATTEMPTS} attempts "
            f"(exit code {ended.returncode}): {_text(ended.output) or 'no message'}"
        )

    def _execute(
        self,
        programs: bubble.Programs,
        uid: int,
        request: dict[str, Any],
        fds: tuple[int, ...] = (),
    ) -> Ended:
        request = {**request, "limits": self.limits.as_rlimits()}
        if programs.readable is not None:
            request |= {"readable": programs.readable, "seccomp": self._filters[True]}
            if programs.setpriv is None:  # the limit would count all processes of the user
                del request["limits"]["RLIMIT_NPROC"]
        with contextlib.ExitStack() as files:
            # Memory files need no thread that feeds a pipe; every Python reads marshal format 2.
            request_fd = _memory_file(files, marshal.dumps(request, 2))
            filter_fd = _memory_file(files, self._filters[False] or b"")
            scratch_bytes = self.limits.scratch_mib * _MIB
            command = bubble.build_command(programs, uid, scratch_bytes, filter_fd)
            try:
                return supervise(command, request_fd, (filter_fd, *fds), self.limits)
            finally:
                for fd in fds:  # the other side must see the end when this one is gone
                    os.close(fd)

    def _self_test(self, programs: bubble.Programs) -> None:
        if self._filters[False] is None:
            raise UserError(
                f"there is no seccomp filter for this CPU ({platform.machine()}): code rewards "
                "need x86_64 or aarch64, or sandbox.allow_unsafe=true."
            )
        run_id = secrets.token_hex(8)
        request = {"id": run_id, "program": _PROBE, "entry_point": "probe", "inputs": [[]]}
        ended = self._execute(programs, self._uids.queue[0], request)
        if not ended.report.startswith(b"+"):
            raise UserError(_explain(programs, _text(ended.output)))
        run = _interpret(ended, run_id, 1)
        leaks = run.calls[0].value if run.status == "done" and run.calls[0].ok else [run.detail]
        if leaks:
            raise UserError(f"the sandbox does not hold programs on this machine: {leaks}")


# Each line is something a program must not be able to do; what it can do is returned by name.
_PROBE = """
import os
def can(action):
    try:
        return bool(action())
    except OSError:
        return False
def status(key):
    try:
        with open("/proc/self/status") as lines:
            return next(line.split()[1] for line in lines if line.startswith(key + ":"))
    except OSError:  # out of sight
        return None
def processes():
    return sum(name.isdigit() for name in os.listdir("/proc")) > 4
def connect():
    import _socket
    return _socket.socket()
def probe():
    leaks = {
        "network": can(connect),
        "/etc": can(lambda: os.listdir("/etc")),
        "home": can(lambda: os.listdir("/root")) or can(lambda: os.listdir("/home")),
        "write to /": can(lambda: open("/x", "w")),
        "write to /dev/shm": can(lambda: open("/dev/shm/x", "w")),
        "write to /usr": can(lambda: open("/usr/x", "w")),
        "capabilities": int(status("CapEff") or "0", 16) != 0 or can(lambda: not os.setgroups([])),
        "no seccomp": status("Seccomp") not in ("2", None),
        "host processes": can(processes),
        "environment": set(os.environ) - {"PATH", "PWD", "LD_LIBRARY_PATH", "LC_CTYPE"} != set(),
    }
    return [name for name, leaked in leaks.items() if leaked]
"""


def _explain(programs: bubble.Programs, message: str) -> str:
    if programs.bwrap is None:
        last = (message.splitlines() or ["no message"])[-1]
        return f"the kernel does not let Landlock hold programs: {last}"
    if "nknown option" in message:
        return "code rewards need bubblewrap 0.8 or newer (" + message + "): upgrade bubblewrap."
    return (
        f"the kernel does not let bubblewrap make a sandbox ({message or 'no message'}).\n"
        "Allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or "
        "kernel.apparmor_restrict_unprivileged_userns=0), or set sandbox.allow_unsafe=true."
    )


def _interpret(ended: Ended, run_id: str, num_inputs: int) -> Run:
    """Read a report that the program may have forged, garbled or never written."""

    def ending(status: str, detail: str, calls: tuple[Call, ...] = ()) -> Run:
        return Run(status, calls, detail, _text(ended.output), ended.seconds)

    if ended.timed_out:
        return ending("timeout", "wall time")
    if ended.returncode in _CPU_TIME_EXCEEDED:
        return ending("timeout", "CPU time")
    if ended.returncode != 0:
        return ending("crash", f"exit code {ended.returncode}")
    try:
        report = json.loads(ended.report[1:])
    except (ValueError, RecursionError):
        return ending("crash", "no readable report")
    if not isinstance(report, dict) or report.get("id") != run_id:
        return ending("crash", "not this run's report")
    if report.get("stage") in ("compile", "find"):
        return ending("unparsable", str(report.get("error")))
    calls = report.get("calls")
    if report.get("stage") != "calls" or not isinstance(calls, list) or len(calls) != num_inputs:
        return ending("crash", str(report.get("error")))
    if not all(isinstance(call, list) and len(call) == 2 for call in calls):
        return ending("crash", "malformed report")
    return ending("done", "", tuple(Call(ok is True, value) for ok, value in calls))


def _text(output: bytes) -> str:
    return output.decode(errors="replace").strip()


def _memory_file(files: contextlib.ExitStack, content: bytes) -> int:
    fd = os.memfd_create("sandbox")
    files.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
