"""Starts one process and watches it from outside: deadline, caps on what is read, no survivors."""

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Protocol

_CHUNK = 1 << 16
_FAREWELL_S = 1.0


class Caps(Protocol):
    """What the watcher needs to know of a run's limits."""

    @property
    def wall_s(self) -> float: ...
    @property
    def output_kib(self) -> int: ...
    @property
    def report_kib(self) -> int: ...


@dataclass(frozen=True)
class Ended:
    """What came out of a process: its report, its output (cut at the cap) and how it ended."""

    report: bytes
    output: bytes
    returncode: int
    timed_out: bool
    seconds: float


class _Capped:
    """Keeps the first `limit` bytes of a descriptor and drains the rest, so that nobody blocks."""

    def __init__(self, fd: int, limit: int) -> None:
        self.fd, self.limit = fd, limit
        self.kept = bytearray()
        self.overflowed = False

    def read(self) -> bool:
        """Take what is there; False at the end, when nobody holds the other side any more."""
        chunk = os.read(self.fd, _CHUNK)
        room = self.limit - len(self.kept)
        self.kept += chunk[:room]
        self.overflowed |= len(chunk) > room
        return bool(chunk)


def supervise(command: list[str], stdin_fd: int, passed_fds: tuple[int, ...], caps: Caps) -> Ended:
    """Run to the end or to the deadline, then kill the group.

    The process learns the number of its report descriptor as its last argument. Its environment is
    empty, and it inherits nothing but the descriptors named here.
    """
    started = time.monotonic()
    report_read, report_write = os.pipe()
    output_read, output_write = os.pipe()
    try:
        process = subprocess.Popen(
            [*command, str(report_write)],
            stdin=stdin_fd,
            stdout=output_write,
            stderr=output_write,
            pass_fds=(report_write, *passed_fds),
            env={},
            cwd="/tmp",
            start_new_session=True,
        )
    except OSError:
        os.close(report_read)
        os.close(output_read)
        raise
    finally:
        os.close(output_write)
        os.close(report_write)
    report = _Capped(report_read, caps.report_kib << 10)
    output = _Capped(output_read, caps.output_kib << 10)
    try:
        timed_out = _watch(process.pid, (report, output), started + caps.wall_s)
    finally:
        # The process is not reaped yet, so its group number is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _drain((report, output), time.monotonic() + _FAREWELL_S)
    # One report too long is none at all; the "+" says that the program had started.
    kept = b"+" if report.overflowed else bytes(report.kept)
    seconds = time.monotonic() - started
    return Ended(kept, bytes(output.kept), process.returncode, timed_out, seconds)


def _watch(pid: int, streams: tuple[_Capped, _Capped], deadline: float) -> bool:
    """Read until the process ends (False) or the deadline passes (True)."""
    exit_fd = os.pidfd_open(pid)
    with selectors.DefaultSelector() as selector:
        selector.register(exit_fd, selectors.EVENT_READ, None)
        for stream in streams:
            selector.register(stream.fd, selectors.EVENT_READ, stream)
        try:
            while (remaining := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(remaining):
                    if key.data is None:
                        return False
                    if not key.data.read():
                        selector.unregister(key.fd)
            return True
        finally:
            os.close(exit_fd)


def _drain(streams: tuple[_Capped, _Capped], deadline: float) -> None:
    """Read to the end and close: at the end of both, all that held them are dead.

    Under bubblewrap that takes the kernel a moment. The deadline is for unsafe runs, whose
    descendants may have left the group and write for ever.
    """
    for stream in streams:
        poll = select.poll()  # unlike select.select, at home with descriptors above 1023
        poll.register(stream.fd, select.POLLIN)
        while (remaining := deadline - time.monotonic()) > 0:
            if not poll.poll(remaining * 1000) or not stream.read():
                break
        os.close(stream.fd)
