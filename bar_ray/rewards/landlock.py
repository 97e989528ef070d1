"""What holds programs where bubblewrap cannot: the kernel's Landlock and a stricter seccomp filter.

Containers without user namespaces often forbid bubblewrap; Landlock needs no privilege. A program
sees the standard library and nothing else of the disk, writes nowhere (so honest programs that want
a temporary file fail), has no network, starts no process and signals none. Weaker than bubblewrap
in three ways: it can tell whether a path exists, it shares the machine's process numbers, and, when
not started by root, its uid is the user's.
"""

import ctypes
import glob
import os

from bar_ray.rewards.bubble import Programs, find_python, find_setpriv
from bar_ray.types import UserError

_OLDEST = 3  # the first version that can forbid truncating files
_CREATE_RULESET, _VERSION = 444, 1
_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
_PYTHONS = ("/usr/lib/python3*", "/usr/lib64/python3*", "/usr/local/lib/python3*")
_LIBRARIES = ("/usr/lib/*-linux-gnu", "/lib/*-linux-gnu", "/usr/share/zoneinfo")
_LIBRARY_FILES = ("/usr/lib64/*.so*", "/usr/local/lib/*.so*")


def find_programs() -> Programs:
    """All that this needs, or a UserError that says why it cannot be."""
    version = ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, _VERSION)
    if version < _OLDEST:
        raise UserError(
            "Landlock, the way without bubblewrap, needs Linux 6.2 or newer with Landlock enabled "
            f"(this kernel offers version {max(0, version)}, {_OLDEST} is needed)"
        )
    return Programs(find_python(), None, find_setpriv(), readable())


def readable() -> tuple[tuple[str, int], ...]:
    """What programs may read, as (path, Landlock access): no installed packages, no user's file."""
    rules = {"/dev/null": _READ_FILE | _WRITE_FILE, "/dev/urandom": _READ_FILE}
    for root in _every(_PYTHONS):
        rules[root] = _READ_DIR
        for name in sorted(os.listdir(root)):
            if not name.endswith("-packages"):
                rules[os.path.join(root, name)] = _READ_FILE
    for path in (*_every(_LIBRARIES), *_every(_LIBRARY_FILES)):
        rules[path] = _READ_FILE
    return tuple(
        (path, access | _READ_DIR if access == _READ_FILE and os.path.isdir(path) else access)
        for path, access in rules.items()
    )


def _every(patterns: tuple[str, ...]) -> list[str]:
    return sorted(path for pattern in patterns for path in glob.glob(pattern))
