"""The command line that starts a sandboxed Python: bubblewrap, hardened by what was tried on it.

`setpriv` first, when root: a uid of its own per slot, since root is exempt from process limits and
would keep capabilities. Then every namespace; no host file but /usr, read-only, with installed
packages masked (a data set's answers may lie among them); a sized /tmp and nothing else writable
(bubblewrap's own root and /dev/shm are unbounded memory unless remounted read-only); no capability,
no further user namespaces; the seccomp filter.
"""

import glob
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from bar_ray.types import UserError

INSIDE = Path(__file__).with_name("inside.py").read_text()
_INTERPRETERS = ("/usr/bin/python3", "/usr/local/bin/python3")
_PACKAGES = ("/usr/lib/python3*/*-packages", "/usr/local/lib/python3*/*-packages")
_UNSAFE = "or set sandbox.allow_unsafe=true to run programs with resource limits only"


@dataclass(frozen=True)
class Programs:
    """The host programs a sandbox needs; without `bwrap`, what Landlock lets a program read.

    Without either, programs run unsafely.
    """

    python: str
    bwrap: str | None
    setpriv: str | None
    readable: tuple[tuple[str, int], ...] | None = None


def find_programs() -> Programs:
    """All that bubblewrap needs, or a UserError that names what to install."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError(
            "code rewards need bubblewrap, and there is no `bwrap` in PATH.\n"
            f"Install bubblewrap: apt-get install bubblewrap, {_UNSAFE}."
        )
    return Programs(find_python(), bwrap, find_setpriv())


def find_unsafe_programs() -> Programs:
    """What is needed to run without bubblewrap."""
    setpriv = shutil.which("setpriv") if os.geteuid() == 0 else None
    return Programs(find_python(), None, setpriv)


def find_python() -> str:
    for path in _INTERPRETERS:
        # Below /usr in truth: a link out of it would dangle inside the sandbox.
        if os.access(path, os.X_OK) and os.path.realpath(path).startswith("/usr/"):
            return path
    raise UserError(
        "code rewards need a system Python that every user may run, and there is none at "
        f"{' or '.join(_INTERPRETERS)}.\nInstall one: apt-get install python3-minimal."
    )


def find_setpriv() -> str | None:
    if os.geteuid() != 0:
        return None
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise UserError(
            "code rewards run by root need `setpriv` to give up root's rights.\n"
            f"Install util-linux: apt-get install util-linux, {_UNSAFE}."
        )
    return setpriv


def build_command(programs: Programs, uid: int, scratch_bytes: int, seccomp_fd: int) -> list[str]:
    """The whole command line; the request comes on stdin."""
    drop_root = []
    if programs.setpriv is not None:
        drop_root = [programs.setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    python = [programs.python, "-I", "-S", "-c", INSIDE]
    if programs.bwrap is None:
        return [*drop_root, *python]
    return [
        *drop_root,
        programs.bwrap,
        *("--unshare-user", "--unshare-all", "--disable-userns"),
        *("--die-with-parent", "--new-session", "--clearenv", "--setenv", "PATH", "/usr/bin"),
        # A Python in /usr/local keeps its library there, and /etc/ld.so.cache is not visible.
        *("--setenv", "LD_LIBRARY_PATH", "/usr/local/lib"),
        *("--ro-bind", "/usr", "/usr", *_masked_packages(), *_root_links()),
        *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--size", str(scratch_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"),
        *("--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        *("--seccomp", str(seccomp_fd)),
        *python,
    ]


def _masked_packages() -> list[str]:
    masks: list[str] = []
    for path in sorted(p for pattern in _PACKAGES for p in glob.glob(pattern)):
        masks += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    return masks


def _root_links() -> list[str]:
    """/lib and its like, which are links into /usr on most systems and folders on some."""
    links: list[str] = []
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            links += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            links += ["--ro-bind", path, path]
    return links
