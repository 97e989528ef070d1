"""The sandbox under load: honest and hostile programs side by side, and what they leave behind.

Every honest program must give its right answer and no hostile one may, whoever runs beside it. At
the end no process of a slot, no open file, no file in the host's temporary folders and no memory
may be left over.
"""

import gc
import itertools
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

from bar_ray import storage
from bar_ray.log import duration
from bar_ray.rewards import bubble
from bar_ray.rewards.sandbox import Limits, Run, Sandbox

FIRST_UID = 90_000
SAY_EVERY_S = 30.0
WARM_UP_S = 10.0  # before memory is first read
COMPARED = 300  # runs of each kind in the comparison with bare Python
HOSTILE_SHARE = 0.3

HONEST = {
    "sort": ("def f(x): return sorted(x)", [3, 1, 2], [1, 2, 3]),
    "primes": (
        "def f(n): return [p for p in range(2, n) if all(p % q for q in range(2, p))]",
        20,
        [2, 3, 5, 7, 11, 13, 17, 19],
    ),
    "words": (
        "import collections\ndef f(x): return collections.Counter(x)",
        "aab",
        {"a": 2, "b": 1},
    ),
    "threads": (
        "import threading\ndef f(n):\n    seen = []\n"
        "    threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(n)]\n"
        "    [t.start() for t in threads]; [t.join() for t in threads]\n    return sorted(seen)",
        3,
        [0, 1, 2],
    ),
    "file": (
        "def f(x):\n    open('/tmp/x', 'w').write(x)\n    return open('/tmp/x').read()",
        "kept",
        "kept",
    ),
    "10 MB": ("def f(n): return len(bytes(n))", 10_000_000, 10_000_000),
}
# Each would return something if it could do what it tries.
HOSTILE = {
    "spin": "def f(x):\n    while True: pass",
    "sleep": "import time\ndef f(x): return time.sleep(600) or 1",
    "fork bomb": "import os\ndef f(x):\n    while True: os.fork()",
    "thread bomb": """
import threading, time
def f(x):
    for _ in range(10_000): threading.Thread(target=time.sleep, args=(600,)).start()
    return 1
""",
    "daemon": """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(600)
    os._exit(0)
""",
    "memory": "def f(x): return len(bytearray(1 << 31))",
    "disk": """
def f(x):
    for i in range(99): open(f"/tmp/{i}", "wb").write(bytes(1 << 23))
    return 1
""",
    "shared memory": "def f(x): return open('/dev/shm/x', 'wb').write(bytes(1 << 28))",
    "flood": "def f(x):\n    while True: print('x' * 9999)",
    "descriptors": "import os\ndef f(x): return [os.dup(0) for _ in range(9999)]",
    "network": "import socket\ndef f(x): return str(socket.socket())",
    "kill all": "import os\ndef f(x): os.kill(-1, 9); os.kill(os.getppid(), 9); os.abort()",
    "forged report": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"stage": "calls", "calls": [[true, 1]]}')
        except OSError: pass
    os._exit(0)
""",
    "exit": "import sys\ndef f(x): sys.exit(0)",
    "host files": "def f(x): return open('/etc/passwd').read()",
    "namespace": """
import ctypes
def f(x):
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    return 1
""",
}


@dataclass(frozen=True)
class Left:
    """What of this process and its sandboxes is there at a moment."""

    processes: int
    descriptors: int
    files: int
    resident_mib: float


def run(slots: int, seconds: float, root: str) -> dict[str, Any]:
    """Use `slots` sandboxes at once for `seconds`; prints as it goes, returns every figure."""
    sandbox = Sandbox(slots, Limits(wall_s=3.0, cpu_s=1), first_uid=FIRST_UID)
    sandbox.prove()
    started = time.monotonic()
    _use(sandbox, slots, min(WARM_UP_S, seconds))
    before = _left(slots)
    outcomes, mistakes = _use(sandbox, slots, seconds - (time.monotonic() - started))
    _wait_for_the_kernel(slots)
    after = _left(slots)
    results = {
        "slots": slots,
        "cores": os.cpu_count(),
        "seconds": seconds,
        "runs": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "mistakes": mistakes,
        "before": vars(before),
        "after": vars(after),
        **_against_bare_python(sandbox, slots),
    }
    storage.write_json(storage.join(root, "sandbox.json"), results)
    return results


def _use(sandbox: Sandbox, slots: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Random programs until time is up; outcomes, and what should not have been."""
    outcomes: Counter[str] = Counter()
    mistakes: list[str] = []
    started, said = time.monotonic(), time.monotonic()

    def work(number: int) -> None:
        chosen = random.Random(number)
        while time.monotonic() - started < seconds:
            outcome, mistake = _one(sandbox, chosen)
            outcomes[outcome] += 1
            mistakes.extend(mistake)

    with ThreadPoolExecutor(slots) as pool:
        threads = [pool.submit(work, number) for number in range(slots)]
        while not all(t.done() for t in threads):
            time.sleep(0.2)
            passed = time.monotonic() - started
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                left, memory = duration(max(0.0, seconds - passed)), _resident_mib()
                print(
                    f"{sum(outcomes.values()):,} runs | {sum(outcomes.values()) / passed:.1f}/s | "
                    f"{len(mistakes)} mistakes | {memory:.0f} MiB | eta {left}",
                    flush=True,
                )
        for thread in threads:
            thread.result()
    return outcomes, mistakes


def _one(sandbox: Sandbox, chosen: random.Random) -> tuple[str, list[str]]:
    """Run one program; its outcome, and a mistake if it should have ended otherwise."""
    if chosen.random() < HOSTILE_SHARE:
        name = chosen.choice(list(HOSTILE))
        found = sandbox.run(HOSTILE[name], "f", [[1]])
        bad = _answered(found) and found.calls[0].value is not None
        return f"hostile {found.status}", [f"{name}: {found}"] if bad else []
    name = chosen.choice(list(HONEST))
    program, given, expected = HONEST[name]
    found = sandbox.run(program, "f", [[given]])
    right = _answered(found) and found.calls[0].value == expected
    return "honest right" if right else "honest wrong", [] if right else [f"{name}: {found}"]


def _answered(run: Run) -> bool:
    return run.status == "done" and run.calls[0].ok


def _against_bare_python(sandbox: Sandbox, slots: int) -> dict[str, float]:
    """Runs per second of the same small program, sandboxed and as a bare process, in turns."""
    program, given, expected = HONEST["sort"]
    python = bubble.find_programs().python
    bare = [python, "-I", "-S", "-c", f"{program}\nprint(f({given!r}))"]

    def sandboxed(_: int) -> None:
        assert sandbox.run(program, "f", [[given]]).calls[0].value == expected

    def plain(_: int) -> None:
        assert subprocess.run(bare, capture_output=True, check=True).stdout.strip() == b"[1, 2, 3]"

    def seconds(work: Callable[[int], None]) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(slots) as pool:
            list(pool.map(work, range(COMPARED)))
        return time.perf_counter() - started

    kinds = (plain, sandboxed)
    times = {kind: [] for kind in kinds}
    for kind in itertools.chain(kinds, reversed(kinds)):
        times[kind].append(seconds(kind))
    rate = {kind: len(taken) * COMPARED / sum(taken) for kind, taken in times.items()}
    return {
        "bare_per_s": rate[plain],
        "sandboxed_per_s": rate[sandboxed],
        "sandboxed_over_bare": rate[sandboxed] / rate[plain],
    }


def _left(slots: int) -> Left:
    gc.collect()
    return Left(len(_processes(slots)), len(os.listdir("/proc/self/fd")), _files(), _resident_mib())


def _processes(slots: int) -> list[int]:
    """What this process started, and as root whatever runs under a slot's uid."""
    found = {p.pid for p in psutil.Process().children(recursive=True)}
    uids = set(range(FIRST_UID, FIRST_UID + 2 * slots)) if os.geteuid() == 0 else set()
    for process in psutil.process_iter(["uids", "status"]):
        owner = process.info["uids"]
        if owner and owner.real in uids and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process.pid)
    return sorted(found)


def _wait_for_the_kernel(slots: int) -> None:
    """It needs a moment to take a dead namespace down."""
    deadline = time.monotonic() + 5
    while _processes(slots) and time.monotonic() < deadline:
        time.sleep(0.05)


def _files() -> int:
    return sum(len(os.listdir(folder)) for folder in ("/tmp", "/dev/shm", "/var/tmp"))


def _resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def table(results: dict[str, Any]) -> str:
    """The figures for a reader."""
    before, after = results["before"], results["after"]
    rate = results["runs"] / max(1e-9, results["seconds"] - WARM_UP_S)
    lines = [
        f"{results['slots']} sandboxes on {results['cores']} cores for {results['seconds']:.0f} s: "
        f"{results['runs']:,} runs, {rate:.1f} a second",
        *(f"  {name:<20} {count:>8,}" for name, count in sorted(results["outcomes"].items())),
        f"mistakes: {len(results['mistakes'])}",
        *(f"  {mistake[:200]}" for mistake in results["mistakes"][:10]),
        f"{'':<22}{'before':>10}{'after':>10}",
        *(f"  {name:<20}{before[name]:>10.0f}{after[name]:>10.0f}" for name in before),
        f"small honest program: {results['sandboxed_per_s']:.1f} a second, bare Python "
        f"{results['bare_per_s']:.1f}: {results['sandboxed_over_bare']:.2f}",
    ]
    return "\n".join(lines)
