"""One driver per step: two on the same steps would overwrite each other's checkpoints.

A lease is a file `<storage>/leases/<run id>.json` that names its holder and the steps at work, and
is renewed while the driver lives. Object stores have no lock, but list what was written before, so
it is taken in two strides: claim (write the file), look at all others, hold. Who is held wins; of
two claims the smaller run id goes on and the other withdraws. A holder that is gone is recognised
at once on its own machine, elsewhere by not renewing for a while: clocks are never compared.
"""

import contextlib
import functools
import getpass
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil

from bar_ray import storage
from bar_ray.graph import Step, key
from bar_ray.log import duration, some, without_keys
from bar_ray.types import UserError

TTL_S = 60.0
GONE_AFTER = 1.5  # times TTL_S without a renewal
POLL_S = 0.5
EVERYTHING = {"*": "everything"}
SAY = functools.partial(print, flush=True)

Record = dict[str, Any]


class Busy(UserError):
    """Another driver is at work on the same steps."""


class LeaseLost(UserError):
    """Another driver took over while this one could not renew."""


class Lease:
    """The right to run steps on a storage, from `taken` until it is left.

    Args:
        steps: those that will run; None for the whole storage.
        ttl_s: how long a silent holder is believed; must be the same for all drivers.
    """

    def __init__(
        self, root: str, run_id: str, steps: Iterable[Step] | None, ttl_s: float = TTL_S
    ) -> None:
        self.folder, self.ttl_s = storage.join(root, "leases"), ttl_s
        self.uri = storage.join(self.folder, f"{run_id}.json")
        labels = EVERYTHING if steps is None else {key(step): step.label for step in steps}
        self.record: Record = {
            **{"run_id": run_id, "user": _user(), "host": platform.node(), "since": time.time()},
            **{"command": without_keys(" ".join(sys.argv)), "held": False, "renewed": 0},
            **{"process": os.getpid(), "born": _born(os.getpid()), "machine": _machine()},
            **{"took_over": [], "steps": labels},
        }
        self._writing = threading.Lock()
        self._lost = ""
        self._ended = threading.Event()

    @contextlib.contextmanager
    def taken(self, say: Callable[[str], None] = SAY) -> Iterator["Lease"]:
        """Take the lease, keep it renewed, give it back; Busy when another driver has it."""
        self._write()
        renewing = threading.Thread(target=self._renew, daemon=True, name="lease")
        try:
            renewing.start()
            self._contend(say)
            yield self
        finally:
            self._ended.set()
            with self._writing, contextlib.suppress(storage.StorageError):
                storage.delete(self.uri)  # a renewal under way would bring it back

    def check(self) -> None:
        """LeaseLost when somebody else may be at work on the steps."""
        if self._lost:
            raise LeaseLost(self._lost)

    # --- taking it -------------------------------------------------------------------------------

    def _contend(self, say: Callable[[str], None]) -> None:
        """Wait until nobody else claims or holds a step of ours, then hold it."""
        seen: dict[str, tuple[int, float]] = {}  # run id -> a renewal of it, and when we saw that
        while rivals := [r for r in self._others() if self._shared(r)]:
            for rival in rivals:
                name, now = rival["run_id"], time.monotonic()
                is_here, is_gone = _is_here(rival), _is_gone(rival)
                if name not in seen:
                    seen[name] = (rival["renewed"], now)
                    if not is_here:
                        wait = duration(GONE_AFTER * self.ttl_s)
                        say(f"{_holder(rival)} may be at work; waiting up to {wait} to see")
                renewed, since = seen[name]
                is_alive = rival["renewed"] != renewed or (is_here and not is_gone)
                if is_gone or (not is_alive and now - since > GONE_AFTER * self.ttl_s):
                    self._take_over(rival, say)
                elif is_alive and (rival["held"] or name < self.record["run_id"]):
                    raise Busy(self._refusal(rival))
            time.sleep(POLL_S)
        self._write(held=True)

    def _take_over(self, rival: Record, say: Callable[[str], None]) -> None:
        say(f"{_holder(rival)} is gone: this run goes on with its steps")
        self._write(took_over=[*self.record["took_over"], rival["run_id"]])  # should it wake up
        with contextlib.suppress(storage.StorageError):  # another driver was faster
            storage.delete(storage.join(self.folder, f"{rival['run_id']}.json"))

    def _refusal(self, rival: Record) -> str:
        return (
            f"{_holder(rival)} is at work on {some(self._shared(rival))} in the same storage. "
            "Wait for it, end it, or give this run a storage of its own"
        )

    def _shared(self, rival: Record) -> list[str]:
        """What a rival works on that this run wants too."""
        mine, theirs = self.record["steps"], rival["steps"]
        if EVERYTHING.keys() & {*mine, *theirs}:
            return list(theirs.values())
        return [label for place, label in theirs.items() if place in mine]

    def _others(self) -> list[Record]:
        found = []
        for uri in storage.list_files(self.folder):
            if uri == self.uri:
                continue
            try:
                found.append(storage.read_json(uri))
            except storage.StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):  # given back meanwhile
                    raise
        return found

    # --- keeping it ------------------------------------------------------------------------------

    def _renew(self) -> None:
        renewed, mine = time.monotonic(), self.record["run_id"]
        while not self._ended.wait(self.ttl_s / 4):
            try:
                thief = next((o for o in self._others() if mine in o["took_over"]), None)
                if thief is not None:
                    self._lost = f"this run was silent and taken for gone: {_holder(thief)} goes on"
                    return
                self._write()
                renewed = time.monotonic()
            except storage.StorageError as error:
                if time.monotonic() - renewed > self.ttl_s:
                    self._lost = f"the lease could not be renewed for {self.ttl_s:.0f} s: {error}"
                    return

    def _write(self, **changed: Any) -> None:
        with self._writing:
            if self._ended.is_set():
                return
            self.record |= {**changed, "renewed": self.record["renewed"] + 1}
            storage.write_json(self.uri, self.record)


def _holder(record: Record) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record["since"]))
    return (
        f"run {record['run_id']} of {record['user']} on {record['host']} (process "
        f"{record['process']}, since {since}: {record['command']:.80})"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _machine() -> str:
    """This boot of this machine and the space of process ids: containers have their own."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{boot.read().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"


def _born(process: int) -> float | None:
    """When a process of this machine was started, None when it is gone: ids are used again."""
    try:
        return psutil.Process(process).create_time()
    except psutil.NoSuchProcess:
        return None


def _is_here(record: Record) -> bool:
    return record["machine"] == _machine()


def _is_gone(record: Record) -> bool:
    return _is_here(record) and _born(record["process"]) != record["born"]
