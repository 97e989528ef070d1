"""A seccomp filter as raw BPF, so that no library is needed to build it.

Everything is allowed except what a function that turns inputs into outputs never needs: sockets
(socketpair stays, asyncio uses it), memory that no rlimit counts (memfd, System V shared memory and
queues), and the calls that kernel exploits start from. Denied calls give EPERM; a call through
another ABI (32-bit, x32) kills the process or gives EPERM, since its numbers mean other things.
"""

import errno
import struct

_LOAD, _JUMP_EQ, _JUMP_GE, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_NR, _OFFSET_ARCH = 0, 4
_ALLOW, _KILL, _DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_X32_BIT = 0x40000000

# name: (x86_64, aarch64)
_DENIED = {
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def build_filter(machine: str) -> bytes | None:
    """The filter for this CPU (`platform.machine()`), or None when its numbers are not known."""
    if machine not in _AUDIT_ARCH:
        return None
    column = 0 if machine == "x86_64" else 1
    checks = [(_JUMP_EQ, numbers[column]) for numbers in _DENIED.values()]
    if machine == "x86_64":
        checks.insert(0, (_JUMP_GE, _X32_BIT))
    program = [
        (_LOAD, 0, 0, _OFFSET_ARCH),
        (_JUMP_EQ, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NR),
    ]
    # Each check jumps over the checks that remain and over the final "allow".
    program += [(op, len(checks) - i, 0, value) for i, (op, value) in enumerate(checks)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY)]
    return b"".join(struct.pack("=HBBI", *line) for line in program)
