"""A seccomp filter as raw BPF, so that no library is needed to build it.

Everything is allowed except what a function that turns inputs into outputs never needs: sockets
(socketpair stays, asyncio uses it), memory that no rlimit counts (memfd, System V shared memory and
queues), and the calls that kernel exploits start from. Denied calls give EPERM; a call through
another ABI (32-bit, x32) kills the process or gives EPERM, since its numbers mean other things.

The stricter filter is for programs without namespaces of their own: they start no process and
signal none, and they change no file's mode, owner or times, which Landlock does not watch.
"""

import errno
import struct

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_UNKNOWN = 0x00050000 | errno.ENOSYS  # the C library then takes the older call
_CLONE_THREAD = 0x10000
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
# Also denied to programs that share their namespaces with others; None: the CPU has no such call.
_DENIED_STRICTLY = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def build_filter(machine: str, strict: bool = False) -> bytes | None:
    """The filter for this CPU (`platform.machine()`), or None when its numbers are not known."""
    if machine not in _AUDIT_ARCH:
        return None
    column = 0 if machine == "x86_64" else 1
    denied = {**_DENIED, **(_DENIED_STRICTLY if strict else {})}
    found = [numbers[column] for numbers in denied.values()]
    checks = [(_JUMP_EQ, number) for number in found if number is not None]
    if machine == "x86_64":
        checks.insert(0, (_JUMP_GE, _X32_BIT))
    program = [
        (_LOAD, 0, 0, _OFFSET_ARCH),
        (_JUMP_EQ, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NR),
        *(_threads_only(column) if strict else ()),
    ]
    # Each check jumps over the checks that remain and over the final "allow".
    program += [(op, len(checks) - i, 0, value) for i, (op, value) in enumerate(checks)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY)]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def _threads_only(column: int) -> list[tuple[int, int, int, int]]:
    """Threads may be started, processes not; limits may be set for the caller itself only."""
    return [
        (_JUMP_EQ, 0, 1, _CLONE3[column]),  # its flags lie in memory, where no filter can look
        (_RETURN, 0, 0, _UNKNOWN),
        *_only_if(_CLONE[column], _JUMP_SET, _CLONE_THREAD),
        *_only_if(_PRLIMIT[column], _JUMP_EQ, 0),
    ]


def _only_if(number: int, test: int, value: int) -> list[tuple[int, int, int, int]]:
    """Allow a call when its first argument passes, else deny it; other calls go on."""
    return [
        (_JUMP_EQ, 0, 4, number),
        (_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT),
        (test, 0, 1, value),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]
